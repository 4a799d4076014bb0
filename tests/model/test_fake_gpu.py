"""Fake tensors stand for tensors on a GPU: they have a device, a dtype and a shape, but no values.

Code that mixes devices fails as it would on a GPU. Code that reads a value fails where a GPU would sync.
"""

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from test_decoder import CONFIGS
from test_host_sync import dense
from test_scheduler import request
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from moonwhale import fp8
from moonwhale.infer import graphs, scheduler
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.drafting import Drafting
from moonwhale.model import MoonwhaleForCausalLM, flex, routed
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks

CUDA, MPS, META = 1, 13, 14  # c10::DeviceType
SPARSE = {"moba_topk": 2, "moba_block_size": 8, "moba_full_attention_layers": [1], "num_nextn_predict_layers": 2}


@pytest.fixture
def devices():
    """Let a CPU build of torch switch to a GPU device: it gets the device guard of the meta device."""
    library = Path(torch.__file__).parent / "lib" / ("libc10.dylib" if sys.platform == "darwin" else "libc10.so")
    name = "_ZN3c104impl26device_guard_impl_registryE"
    switches = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), name)
    before = list(switches)
    for device in (CUDA, MPS):
        switches[device] = switches[device] or switches[META]
    yield
    switches[:] = before


@pytest.fixture
def fake(devices, monkeypatch):
    """Run a test with fake tensors, and without flex_attention's own compilation."""
    monkeypatch.setattr(flex, "can_compile", lambda device: True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attention)
    monkeypatch.setattr(flex, "_flex", dense_on_device)
    monkeypatch.setattr(flex, "FLEX_TILE", 8)
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield


def dense_on_device(q, k, v, scale, mask):
    with q.device:
        return dense(q, k, v, scale, mask)


@pytest.fixture
def model_on(tiny_config, fake):
    """`model_on(device, dtype, **overrides)` builds a tiny model on a device."""

    def model_on(device, dtype=torch.float32, **overrides):
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = MoonwhaleForCausalLM(tiny_config(**overrides))
        finally:
            torch.set_default_dtype(torch.float32)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
        return model

    return model_on


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("context", ["short", "long"])
@pytest.mark.parametrize("recipe", [None, "blockwise"])
def test_losses_and_optimizer_steps_stay_on_one_gpu(autocast, context, recipe, model_on, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0 if context == "long" else 99)
    if not autocast or recipe:  # torch has no fake kernel for these grouped products
        monkeypatch.setattr(routed, "grouped_product", routed._grouped_product)
        monkeypatch.setattr(fp8, "grouped_product", routed._grouped_product)
    model = model_on("cuda", num_hidden_layers=3, first_k_dense_replace=1, **SPARSE).train()
    if recipe:
        fp8.convert(model, recipe, emulate=True)
    optimizer = MuonClip(param_groups(model, lr=1e-3))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=1.0)
    tokens = torch.zeros(2, 64, dtype=torch.long, device="cuda")
    number = torch.zeros(3, dtype=torch.long, device="cuda")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            assert torch.is_autocast_enabled("cuda") == autocast
            out = model(tokens, position_ids=tokens, labels=tokens, num_items_in_batch=number)
        for parameter in model.parameters():  # torch cannot run a backward pass without the device
            parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert {t.device.type for t in (out.loss, norm, hooks.last["max_logits"], hooks.last["loads"])} == {"cuda"}


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_decoding_steps_stay_on_one_gpu(device, changes, model_on):
    decoder = Decoder(
        model_on(device, torch.bfloat16, num_nextn_predict_layers=2, mtp_num_blocks=[2, 1], **changes).eval()
    )
    decoder.graphs = None
    cache = decoder.cache()
    cache.resize(4, 64)
    for length in (1, 3):
        placement = decoder.place(cache, 0, [2, 21, 12], length)
        tokens = torch.zeros(3, length, dtype=torch.long, device=device)
        hidden = decoder.run(tokens, cache, placement)
        guess = decoder.draft(1, hidden, tokens, cache, placement)
        assert decoder.head(guess).device.type == device and guess.dtype == torch.bfloat16


@pytest.fixture
def capturing(monkeypatch):
    """Replace CUDA graph capture with one plain run of the step, and capture from the first step on."""
    monkeypatch.setattr(graphs, "capture", lambda function, device, pool: (lambda: None, function(), None))
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 0)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_captured_decoding_steps_stay_on_one_gpu(changes, model_on, capturing):
    decoder = Decoder(model_on("cuda", num_nextn_predict_layers=2, mtp_num_blocks=[2, 1], **changes).eval())
    cache = decoder.cache()
    cache.resize(4, 64)
    tokens = torch.zeros(3, 3, dtype=torch.long, device="cuda")
    hidden = decoder.run(tokens, cache, decoder.place(cache, 0, [2, 21, 12], 3))
    assert hidden.shape == (3, 3, 32) and hidden.device.type == "cuda" and decoder.graphs._captured


class Noise:
    """Noise without a random generator, since a generator needs a real GPU."""

    def __init__(self, device):
        self.device = device

    def of(self, n):
        return torch.ones(61, device=self.device)

    def forget(self, n):
        pass


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.1}], ids=str
)
@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("device", ["cuda", "mps"])
@torch.no_grad()
def test_the_scheduler_stays_on_one_gpu(device, draft, options, model_on, capturing, monkeypatch):
    """The scheduler's tensors stay on one device while requests come and go. Every token it reads back is 7."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [7] * len(self))
    model = model_on(device, max_position_embeddings=128, mtp_num_blocks=[1, 2], **SPARSE).eval()
    server = scheduler.Scheduler(Decoder(model), 10**8, 8, Drafting(2, draft))
    waiting = [request([5] * n, tokens=m, **options) for n, m in ((1, 12), (9, 4), (40, 6))]
    for one in waiting:
        one.noise = Noise(device)
        server.submit(one)
    while any(one.finish_reason is None for one in waiting):
        scheduler.Scheduler.step.__wrapped__(server)
    assert [len(one.token_ids) for one in waiting] == [12, 4, 6]
    assert (waiting[0].drafted != []) == (draft > 0)
    assert device != "cuda" or server.decoder.graphs._captured


def test_mixed_devices_and_a_host_sync_are_detected(fake):
    x = torch.zeros(4, device="cuda")
    with pytest.raises((RuntimeError, ValueError), match="device"):
        x + torch.zeros(4)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()


@pytest.mark.parametrize(("key_width", "value_width", "has"), [(16, 16, True), (8, 16, False), (16, 8, False)])
def test_narrow_heads_take_the_dense_path(key_width, value_width, has, fake):
    """flex_attention's kernels refuse keys or values of fewer than 16 features."""
    q, v = (torch.empty(1, 1, 8, width, device="cuda") for width in (key_width, value_width))
    assert flex._has_flex(q, v) == has
