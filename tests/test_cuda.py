"""The GPU's code paths on a real device, compared with the CPU's, which the oracles check.

Each test is one thing that could fail on a device and that no emulation on a CPU can see. MOONWHALE_TEST_DEVICE=cpu
runs them on a CPU, as a rehearsal of the tests themselves.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

from moonwhale.model.moe import Experts

DEVICE = os.environ.get("MOONWHALE_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs an NVIDIA GPU (cuda); compares it with the CPU"
)
SHAPES = {
    "hidden_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 2048,
}
MOBA = {"moba_block_size": 128, "moba_topk": 2}
CONFIGS = {
    "full attention": {},
    "MoBA, a mask over tiles": MOBA | {"moba_full_attention_layers": [1]},
    "MoBA, sorted queries": MOBA | {"long": 0},
    "convolved keys": MOBA | {"moba_key_conv": 3},
    "dense first block": {"first_k_dense_replace": 1, "intermediate_size": 64},
}
BOUNDS = {"fp32": 1e-3, "bf16": 6e-2}  # relative to the norm; bf16 has 8 bits, and its errors add up over two blocks


def step(model, tokens, dtype):
    """Return the loss and all gradients, on the CPU in fp32."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().float().cpu(), grads


def difference(found, wanted):
    """Return the largest relative difference of two (loss, gradients) over all matrices."""
    (loss, grads), (exact, exact_grads) = found, wanted
    pairs = [(loss, exact)] + [(grads[name], grad) for name, grad in exact_grads.items() if grad.ndim > 1]
    return max(((a - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in pairs)


def both(tiny_model, changes, dtype, monkeypatch, spoil=lambda model: None):
    """Return the difference of a step on the device from one on the CPU in fp32."""
    from moonwhale.model import flex

    changes = dict(changes)
    monkeypatch.setattr(flex, "LONG_CONTEXT", changes.pop("long", 99))
    model = tiny_model(**SHAPES | changes).train()
    # Every expert is chosen, so that no rounding changes a choice.
    model.config.num_experts_per_tok = 6
    for module in model.modules():
        if hasattr(module, "topk") and hasattr(module, "n_experts"):
            module.topk = 6
    tokens = torch.randint(61, (2, 256), generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(model).to(DEVICE)
    spoil(other)
    torch._dynamo.reset()
    return difference(step(other, tokens.to(DEVICE), dtype), step(model, tokens, "fp32"))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_a_training_step_equals_the_cpus(changes, dtype, tiny_model, monkeypatch):
    assert both(tiny_model, changes, dtype, monkeypatch) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_mutant_experts_in_another_order(dtype, tiny_model, monkeypatch):
    def spoil(model):
        for module in model.modules():
            if isinstance(module, Experts):
                module.down_proj.data = module.down_proj.data.roll(1, 0)

    assert both(tiny_model, MOBA, dtype, monkeypatch, spoil) > BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_mutant_an_unscaled_output_projection(dtype, tiny_model, monkeypatch):
    def spoil(model):
        model.model.layers[0].self_attn.o_proj.weight.data.mul_(1.5)

    assert both(tiny_model, MOBA, dtype, monkeypatch, spoil) > BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_without_tokens_have_zero_gradients(dtype):
    """A grouped product over no rows must write zeros: a kernel that skips the group leaves old memory."""
    a, b = torch.randn(2, 128, 32, device=DEVICE, dtype=dtype)
    torch.full((64, 4, 32, 32), torch.nan, device=DEVICE)  # fills the allocator's blocks
    ends = torch.tensor([0, 64, 64, 128], dtype=torch.int32, device=DEVICE)
    out = F.grouped_mm(a.T, b, offs=ends)
    assert not out[[0, 2]].any() and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_forces_no_host_sync(dtype, tiny_model):
    """torch reports the syncs of its own operations. In fp32 experts may sync: see docs/precision.md."""
    if DEVICE != "cuda" or dtype == torch.float32:
        pytest.skip("CUDA in bf16 only: a CPU has no syncs, and fp32's grouped product reads its ends")
    model = tiny_model(**SHAPES | MOBA).train().to(DEVICE)
    tokens = torch.randint(61, (2, 256), device=DEVICE)
    step(model, tokens, "bf16")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=tokens, labels=tokens).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_is_used_only_when_asked_for():
    from moonwhale.precision import choose

    before = torch.get_float32_matmul_precision()
    try:
        choose(DEVICE, "fp32").apply()
        x = torch.full((256, 256), 1 + 2**-12, device=DEVICE)
        assert (x @ x)[0, 0].item() != 256
        if DEVICE == "cuda":
            choose(DEVICE, "tf32").apply()
            assert (x @ x)[0, 0].item() == 256
    finally:
        torch.set_float32_matmul_precision(before)
