"""Apple's MPS emulated on a CPU: a mode raises on operations without an MPS kernel, and on every fp64 tensor."""

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
def table() -> dict[str, bool]:
    """Whether each operation of this torch has a kernel on MPS, its own or one made of others, as torch declares it."""
    source = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(source.read_text(encoding="utf-8"), yaml.CSafeLoader)
    own, of = {}, {}
    for entry in entries:
        name, kernels = entry["func"].partition("(")[0], " ".join(entry.get("dispatch", {}))
        of[name] = entry.get("structured_delegate", name)
        own[name] = bool(re.search("MPS|Composite", kernels)) or not (kernels or "structured_delegate" in entry)
    return {f"aten::{name}": own[name] or own[of[name]] for name in own}


class LikeMPS(TorchDispatchMode):
    def __init__(self, table: dict[str, bool]):
        super().__init__()
        self.table = table

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert self.table.get(name, not name.startswith("aten::")), f"{name} has no kernel on MPS"
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            assert getattr(tensor, "dtype", None) is not torch.float64, f"{name} computes in fp64, which MPS has not"
        return out


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_training_needs_nothing_that_mps_lacks(tiny_model, table, autocast):
    sparse = {"moba_topk": 2, "moba_block_size": 8, "num_nextn_predict_layers": 2, "moba_key_conv": 3}
    model = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, moba_full_attention_layers=[1], **sparse).train()
    optimizer = MuonClip(param_groups(model, lr=1e-3))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=1.0)
    with LikeMPS(table):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(TOKENS, position_ids=DOCUMENTS, labels=TOKENS)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert out.loss.isfinite() and hooks.last["clipped_heads"] > 0


def test_generating_needs_nothing_that_mps_lacks(small_model, table):
    prompt = torch.tensor([[5, 6, 7, 8, 9] * 3])
    with LikeMPS(table):
        answer = small_model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert answer.shape[1] > prompt.shape[1]


def test_what_it_lacks_is_refused(table):
    assert len(table) > 2000
    with LikeMPS(table), pytest.raises(AssertionError, match="fp64"):
        torch.zeros(2, dtype=torch.float64)
    missing = [name for name, has in table.items() if not has]
    assert "aten::mkldnn_rnn_layer" in missing
    ones = torch.ones(2)
    with LikeMPS(table | {"aten::sin": False}), pytest.raises(AssertionError, match="sin has no kernel"):
        ones.sin()
