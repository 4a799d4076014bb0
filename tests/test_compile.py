"""How far torch.compile sees: where a graph of the model breaks, and that it breaks nowhere else."""

import pytest
import torch
import torch._dynamo

TOKENS = (torch.arange(40) * torch.tensor([[1], [3]])) % 61
# What is sized by the data: blocks that were chosen, tokens of an expert, targets of a batch. On a CPU that is where
# the speed comes from, and `moonwhale train --compile` leaves these out of its graphs.
DATA_DEPENDENT = {("moba.py", "of"), ("moe.py", "_line_up"), ("loss.py", "forward")}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def places(model, **inputs) -> set[tuple[str, str]]:
    """Files and functions in which a graph of the model breaks."""

    def run(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return model(tokens, use_cache=False, **inputs).to_tuple()

    found = torch._dynamo.explain(run)(TOKENS)
    frames = [reason.user_stack[-1] for reason in found.break_reasons]
    assert found.graph_break_count <= 50 and bool(frames) is (found.graph_break_count > 0)
    return {(frame.filename.replace("\\", "/").rsplit("/", 1)[-1], frame.name) for frame in frames}


@pytest.mark.slow
def test_dense_blocks_and_full_attention_are_one_graph(tiny_model):
    model = tiny_model(first_k_dense_replace=2, moba_topk=0)
    assert not places(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


@pytest.mark.slow
def test_attention_over_blocks_and_experts_break_it_where_the_data_decides(tiny_model):
    model = tiny_model(moba_topk=2, moba_block_size=8)
    assert places(model) == {("moba.py", "of"), ("moe.py", "_line_up")}


@pytest.mark.slow
def test_so_does_the_loss(tiny_model):
    model = tiny_model(moba_topk=2, moba_block_size=8, num_nextn_predict_layers=1).train()
    assert places(model, labels=TOKENS) == DATA_DEPENDENT


def test_a_break_elsewhere_is_seen(tiny_model, monkeypatch):
    model = tiny_model(first_k_dense_replace=2, moba_topk=0)
    norm, forward = type(model.model.norm), type(model.model.norm).forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x) if x.sum().item() else x)
    assert places(model) == {("test_compile.py", "<lambda>")}
