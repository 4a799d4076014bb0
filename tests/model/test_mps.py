"""Training and generation use only what Apple's MPS supports.

The tests run on a CPU under a mode that raises on every operation without an MPS kernel and on every fp64 tensor.
"""

import re
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks

TOKENS = torch.arange(80).view(2, 40) * 7 % 61
DOCUMENTS = torch.tensor([[*range(17), *range(23)], [*range(40)]])


@pytest.fixture(scope="module")
def has_mps_kernel() -> dict[str, bool]:
    """Map each operation of this torch to whether torch declares an MPS kernel, either native or composite."""
    source = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(source.read_text(encoding="utf-8"), yaml.CSafeLoader)
    own, of = {}, {}
    for entry in entries:
        name, kernels = entry["func"].partition("(")[0], " ".join(entry.get("dispatch", {}))
        of[name] = entry.get("structured_delegate", name)
        own[name] = bool(re.search("MPS|Composite", kernels)) or not (kernels or "structured_delegate" in entry)
    return {f"aten::{name}": own[name] or own[of[name]] for name in own}


class EmulatedMPS(TorchDispatchMode):
    def __init__(self, has_mps_kernel: dict[str, bool]):
        super().__init__()
        self.has_mps_kernel = has_mps_kernel

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert self.has_mps_kernel.get(name, not name.startswith("aten::")), f"{name} has no kernel on MPS"
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            assert getattr(tensor, "dtype", None) is not torch.float64, f"{name} computes in fp64, which MPS has not"
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_training_uses_only_what_mps_supports(tiny_model, has_mps_kernel, autocast):
    sparse = {"moba_topk": 2, "moba_block_size": 8, "num_nextn_predict_layers": 2, "moba_key_conv": 3}
    model = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, moba_full_attention_layers=[1], **sparse).train()
    optimizer = MuonClip(param_groups(model, lr=1e-3))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=1.0)
    with EmulatedMPS(has_mps_kernel):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(TOKENS, position_ids=DOCUMENTS, labels=TOKENS)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert out.loss.isfinite() and hooks.last["clipped_heads"] > 0


def test_generation_uses_only_what_mps_supports(small_model, has_mps_kernel):
    prompt = torch.tensor([[5, 6, 7, 8, 9] * 3])
    with EmulatedMPS(has_mps_kernel):
        answer = small_model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert answer.shape[1] > prompt.shape[1]


def test_unsupported_operations_are_detected(has_mps_kernel):
    assert len(has_mps_kernel) > 2000
    with EmulatedMPS(has_mps_kernel), pytest.raises(AssertionError, match="fp64"):
        torch.zeros(2, dtype=torch.float64)
    missing = [name for name, has in has_mps_kernel.items() if not has]
    assert "aten::mkldnn_rnn_layer" in missing
    ones = torch.ones(2)
    with EmulatedMPS(has_mps_kernel | {"aten::sin": False}), pytest.raises(AssertionError, match="sin has no kernel"):
        ones.sin()
