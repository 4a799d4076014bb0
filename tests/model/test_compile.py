"""torch.compile captures the whole model as one graph, with MoBA, experts and documents, and computes the same."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from moonwhale import fp8
from moonwhale.model import compiling
from moonwhale.train.pretrain import compile_blocks

TOKENS = (torch.arange(40) * torch.tensor([[1], [3]])) % 61
DOCUMENTS = torch.tensor([[*range(17), *range(23)], [*range(40)]])
PADDED = torch.tensor([[0] * 9 + [1] * 31, [1] * 40])
INSIDE = torch.tensor([[1] * 11 + [0] * 5 + [1] * 24, [1] * 40])
LABELS = TOKENS.masked_fill(DOCUMENTS < 3, -100)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tiny_model):
    """A model with every mechanism: a dense block with full attention, a MoBA block with experts, two MTP modules."""
    return tiny_model(
        num_hidden_layers=2,
        first_k_dense_replace=1,
        moba_topk=2,
        moba_block_size=8,
        moba_full_attention_layers=[0],
        latent_embedding_every=2,
        num_nextn_predict_layers=2,
    ).train()


def graph_breaks(run, *inputs) -> list[str]:
    """Return the graph breaks of `run(*inputs)`, as "file:function"."""
    found = torch._dynamo.explain(run)(*inputs)
    frames = [reason.user_stack[-1] for reason in found.break_reasons]
    return [f"{Path(frame.filename).name}:{frame.name}" for frame in frames]


def results(model, forward, **inputs) -> dict[str, torch.Tensor]:
    """Run one batch. Return the loss, its parts, every gradient, and the statistics for QK-clip and the bias update."""
    model.zero_grad()
    for module in model.modules():
        if hasattr(module, "max_logit"):
            module.max_logit.fill_(-torch.inf)
        if hasattr(module, "load"):
            module.load.zero_()
    out = forward(input_ids=TOKENS, labels=LABELS, **inputs)
    out.loss.backward()
    found = {"loss": out.loss, "losses": out.losses, "accuracies": out.accuracies}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers() if name.endswith(("max_logit", "load"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [{}, {"position_ids": DOCUMENTS}, {"attention_mask": PADDED}], ids=["rows", "documents", "padded"]
)
def test_a_training_step_is_one_graph_and_computes_the_same(model, inputs):
    expected = results(model, model, **inputs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    found = results(model, compiled, **inputs)
    assert counter.frame_count == 1
    assert found.keys() == expected.keys() and len(found) > 60
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_a_bf16_training_step_is_one_graph(model):
    def run(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return model(tokens, labels=LABELS, position_ids=DOCUMENTS).loss

    assert graph_breaks(run, TOKENS) == []


@pytest.mark.slow
def test_an_emulated_fp8_training_step_is_one_graph_and_computes_the_same(tiny_model):
    """A compiled step in emulated FP8 is one graph and computes the same.

    Only norms are compared: a different rounding in fp32 can send a number to another E4M3 value.
    """
    model = tiny_model(first_k_dense_replace=1, moba_topk=2, moba_block_size=8, num_nextn_predict_layers=1).train()
    plain = results(model, model, position_ids=DOCUMENTS)
    fp8.convert(model, "blockwise", emulate=True)
    expected = results(model, model, position_ids=DOCUMENTS)
    counter = CompileCounterWithBackend("aot_eager")
    found = results(model, torch.compile(model, backend=counter, fullgraph=True), position_ids=DOCUMENTS)
    assert counter.frame_count == 1
    assert found.keys() == expected.keys() and len(found) > 50
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm(), name
    moved = [(plain[name] - value).norm() > 1e-2 * value.norm() for name, value in expected.items() if value.ndim > 1]
    assert all(moved), "computed in bf16 or fp32 as before"


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs",
    [{}, {"attention_mask": INSIDE, "position_ids": (INSIDE.cumsum(1) - 1).clamp(min=0)}],
    ids=["rows", "padded inside"],
)
def test_a_forward_pass_without_labels_is_one_graph_and_computes_the_same(model, inputs):
    model.eval()
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False, **inputs).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(TOKENS, use_cache=False, **inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_on_a_gpu_blocks_and_loss_are_compiled(model, monkeypatch):
    compiled, expected = [], results(model, model)["loss"]
    loss, blocks = model.losses, [layer._call_impl for layer in model.model.layers]
    monkeypatch.setattr(compiling, "compile_unsupported_reason", lambda device: "")

    def run(function, *args, **kwargs):
        compiled.append(function)
        return function(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", lambda function, **_: partial(run, function))
    compile_blocks(model, torch.device("meta"))
    assert torch.equal(results(model, model)["loss"], expected)
    assert compiled == [*blocks, loss]


def test_a_graph_break_is_detected(tiny_model, monkeypatch):
    model = tiny_model(first_k_dense_replace=2, moba_topk=0)
    norm, forward = type(model.model.norm), type(model.model.norm).forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x) if x.sum().item() else x)
    assert set(graph_breaks(lambda tokens: model(tokens, use_cache=False).logits, TOKENS)) == {
        "test_compile.py:<lambda>"
    }
