"""A training step looks at no tensor on the way: on a GPU every look waits for all that was asked of it before.

Run on a CPU that takes the GPU's paths, under a mode that refuses each operation whose result the host has to know.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moonwhale.model import flex, layout, loss, mla, moba, moe
from moonwhale.optim.muonclip import MuonClip, attach_hooks, param_groups

ATEN = torch.ops.aten
WAITS = {
    ATEN._local_scalar_dense,
    ATEN.is_nonzero,
    ATEN.equal,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN.bincount,
    ATEN._unique2,
    ATEN.unique_consecutive,
    ATEN.histc,
}
TOKENS = torch.arange(128).view(2, 64) * 7 % 61
DOCUMENTS = torch.tensor([[*range(17), *range(47)], [*range(64)]])


class Refuses(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = function.overloadpacket
        masks = kind in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_) and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        repeats = kind is ATEN.repeat_interleave and (kwargs or {}).get("output_size") is None
        assert not (kind in WAITS or masks or (repeats and isinstance(args[0], torch.Tensor))), f"{function} waits"
        return function(*args, **(kwargs or {}))


def dense(q, k, v, scale, mask):
    """What flex_attention gives; as there, a query that sees nothing is no NaN."""
    index = (torch.arange(n)[(..., *[None] * (3 - i))] for i, n in enumerate((*q.shape[:3], k.shape[2])))
    logits = (q @ k.mT * scale).masked_fill(~mask.mask_mod(*index), -1e9)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), logits.amax(-1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (layout, loss, moba, moe):
        monkeypatch.setattr(module, "unseen", lambda device: True)
    monkeypatch.setattr(mla, "flex_serves", lambda q, layout: True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attention)
    monkeypatch.setattr(flex, "_has_flex", lambda q: True)
    monkeypatch.setattr(flex, "_flex", dense)
    monkeypatch.setattr(flex, "TILE", 8)


def make_step(model):
    """Forward, backward and an optimizer's step with its hooks, to be called."""
    optimizer = MuonClip(param_groups(model, lr=1e-3))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=1.0)

    def step():
        out = model(TOKENS, position_ids=DOCUMENTS, labels=TOKENS, num_items_in_batch=torch.tensor([100, 98, 96]))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [out.loss.detach(), norm, hooks.last["max_logits"], hooks.last["loads"]]

    return step


@pytest.fixture
def model(tiny_model):
    sparse = {"moba_topk": 2, "moba_block_size": 8, "moba_full_attention_layers": [1], "num_nextn_predict_layers": 2}
    return lambda: tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **sparse).train()


@pytest.mark.parametrize("context", ["short", "long"])
def test_a_step_never_waits(context, model, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(flex, "LONG", 0 if context == "long" else 99)
    step = make_step(model())
    step()  # makes the optimizer's state
    with Refuses():
        step()


def test_the_gpus_paths_learn_the_same(model, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(flex, "LONG", 0)
    step = make_step(model())
    found = [step(), step()]
    monkeypatch.undo()
    step = make_step(model())
    torch.testing.assert_close(found, [step(), step()], rtol=1e-3, atol=1e-4)


def test_a_cpus_own_paths_look(model):
    with Refuses(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        make_step(model())()


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), torch.nonzero])
def test_a_look_is_refused(look):
    with Refuses(), pytest.raises(AssertionError, match="waits"):
        look(torch.arange(4.0))
