"""The GPU's code paths on a real device, compared with the CPU's, which the oracles check.

Each test is one thing that could fail on a device and that no emulation on a CPU can see. MOONWHALE_TEST_DEVICE=cpu
runs them on a CPU, as a rehearsal of the tests themselves.
"""

import copy
import io
import os
import threading
from itertools import starmap

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moonwhale.infer import graphs
from moonwhale.infer.decoder import Decoder
from moonwhale.model import flex
from moonwhale.model.block import Block
from moonwhale.model.moe import Experts
from moonwhale.optim.muon_distributed import DistributedMuonClip
from moonwhale.optim.muonclip import param_groups
from moonwhale.parallel.expert_parallel import AllToAll
from moonwhale.precision import choose
from moonwhale.train.pretrain import build, compile_blocks
from relative_error import relative_error

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
    "MoBA, sorted queries, blocks of two tiles": MOBA | {"long": 0, "length": 768, "moba_block_size": 256},
    "convolved keys": MOBA | {"moba_key_conv": 3},
    "DeepSeek-V3's wide heads": MOBA | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
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
    return max(starmap(relative_error, pairs))


def both(tiny_model, changes, dtype, monkeypatch, spoil=lambda model: None):
    """Return the difference of a step on the device from one on the CPU in fp32."""
    changes = dict(changes)
    length = changes.pop("length", 256)
    monkeypatch.setattr(flex, "LONG_CONTEXT", changes.pop("long", 99))
    model = tiny_model(**SHAPES | changes).train()
    # Every expert is chosen, so that no rounding changes a choice.
    model.config.num_experts_per_tok = 6
    for module in model.modules():
        if hasattr(module, "topk") and hasattr(module, "n_experts"):
            module.topk = 6
    tokens = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(0))
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


def test_autocast_leaves_the_residual_stream_in_bf16(tiny_model):
    """CUDA's autocast returns fp32 from sums, norms and softmax, where a CPU's keeps bf16."""
    model, seen = tiny_model(**SHAPES | MOBA).train().to(DEVICE), []
    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda module, inputs, out: seen.append(out[0].dtype))
    step(model, torch.randint(61, (2, 256), device=DEVICE), "bf16")
    assert set(seen) == {torch.bfloat16}


def test_rows_of_many_lengths_compile_few_times(tiny_model, monkeypatch):
    """GRPO's batches have a new length each. From the ninth graph on torch would run attention uncompiled."""
    model, compiled = tiny_model(**SHAPES | MOBA).train().to(DEVICE), []
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    right = flex._compiled
    monkeypatch.setattr(flex, "_compiled", lambda: lambda q, *rest: compiled.append(q.shape[2]) or right()(q, *rest))
    for length in (40, 130, 131, 200, 255, 300, 301, 400, 500, 511, 640, 700):
        model(input_ids=torch.randint(61, (2, length), device=DEVICE), use_cache=False).logits.sum().backward()
    assert DEVICE == "cpu" or set(compiled) == {128, 256, 512, 1024}


def test_fused_adamw_and_muon_equal_the_cpus(tiny_model):
    """Two steps, the second from a state that was saved and loaded: its step counters must be on the device."""
    updated = []
    for device in (DEVICE, "cpu"):
        model = tiny_model(**SHAPES).to(device)
        groups = [group | {"newton_schulz_dtype": torch.float32} for group in param_groups(model, 1e-3)]
        optimizer = DistributedMuonClip(groups)
        for seed in range(2):
            draw = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draw).to(device)
            optimizer.step()
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        updated.append([p.detach().cpu() for p in model.parameters()])
    for on_device, on_cpu in zip(*updated, strict=True):
        torch.testing.assert_close(on_device, on_cpu, rtol=2e-3, atol=2e-5)


def test_compiled_blocks_equal_uncompiled_ones(tiny_model):
    model, tokens = tiny_model(**SHAPES | MOBA).train(), torch.randint(61, (2, 256))
    other = copy.deepcopy(model).to(DEVICE)
    if DEVICE == "cuda":
        compile_blocks(other, torch.device(DEVICE))
    model = model.to(DEVICE)
    assert difference(step(other, tokens.to(DEVICE), "fp32"), step(model, tokens.to(DEVICE), "fp32")) < 1e-3


def test_pinned_and_asynchronous_copies_bring_every_batch(tiny_run):
    """The losses of a run on the device are the CPU's: a batch that is read before it has arrived changes them."""
    losses = []
    for device in (DEVICE, "cpu"):
        run = build(tiny_run(device=device, out=tiny_run().out + device, steps=6, model=SHAPES))
        trainer = run.make_trainer()
        trainer.train()
        losses.append([entry["loss_main"] for entry in trainer.state.log_history if "loss_main" in entry])
    assert len(losses[0]) == 6
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-2, atol=0)


def test_a_capture_bears_a_thread_that_allocates(tiny_model, monkeypatch):
    """A server's other threads may use the GPU while a graph is captured."""
    if DEVICE != "cuda":
        pytest.skip("needs CUDA graphs")
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 0)
    ended, sizes = threading.Event(), []

    def allocate():
        while not ended.is_set():
            sizes.append(torch.randn(2**20 + len(sizes) % 7 * 2**22, device=DEVICE).numel())

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        with torch.inference_mode():
            decoder = Decoder(tiny_model(**SHAPES).to(DEVICE))
            cache = decoder.cache()
            cache.resize(2, 64)
            ids = torch.randint(61, (2, 20), device=DEVICE)
            found = [decoder.run(ids[:, i : i + 1], cache, decoder.place(cache, 0, [i, i], 1)) for i in range(20)]
    finally:
        ended.set()
        thread.join()
    assert sizes and decoder.graphs._captured and all(x.isfinite().all() for x in found)


def test_nccl_serves_what_the_groups_ask_of_it(tmp_path):
    """One rank has no other to talk to, but each call must exist for its dtypes, with empty parts too."""
    nccl = DEVICE == "cuda" and dist.is_nccl_available()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=0, world_size=1)
    try:
        group, control = dist.new_group([0]), dist.new_group([0], backend="gloo")
        x = torch.randn(4, 8, device=DEVICE)
        for sent in (x, x.bfloat16(), x[:0]):
            for counts in (None, [len(sent)]):
                [received] = AllToAll(group)([sent], counts, counts)
                assert torch.equal(received, sent)
            dist.broadcast(sent, group=group, group_src=0, async_op=True).wait()
        for kind in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            total = x.clone()
            dist.all_reduce(total, kind, group=group)
            assert torch.equal(total, x)
        gathered = [None]
        dist.all_gather_object(gathered, {"a": 1}, group=control)
        assert gathered == [{"a": 1}]
    finally:
        dist.destroy_process_group()
