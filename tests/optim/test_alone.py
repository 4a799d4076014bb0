"""Our mechanisms inside somebody's own GPT: initialised when constructed, balanced and clipped by `attach_hooks`."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from moonwhale.model import (
    DeepseekMoE,
    Documents,
    GroupedQueryAttention,
    MoonwhaleConfig,
    MoonwhaleForCausalLM,
    MultiheadLatentAttention,
    moba_attention,
)
from moonwhale.optim import MuonClip, attach_hooks, param_groups
from toy import TOY

CONFIG = MoonwhaleConfig(**TOY | {"bias_update_speed": 0.01, "moba_topk": 2, "moba_full_attention_layers": None})
TAU = 0.05


class MoBAHeads(nn.Module):
    """A user's own attention around `moba_attention`, with what `attach_hooks` asks for."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden), heads
        self.register_buffer("max_logit", torch.full((heads,), -torch.inf))

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        out, logits = moba_attention(q, k, v, q.shape[-1] ** -0.5, None, 8, 2)
        self.max_logit = torch.maximum(self.max_logit, logits.amax((0, 2)))
        return self.out(out.transpose(1, 2).flatten(2)), None

    @torch.no_grad()
    def clip_qk_(self, tau):
        gamma = (tau / self.max_logit).clamp(max=1).sqrt().where(self.max_logit > tau, 1.0)
        self.qkv.weight.view(3, self.heads, -1, 32)[:2] *= gamma.view(1, -1, 1, 1)
        self.qkv.bias.view(3, self.heads, -1)[:2] *= gamma.view(1, -1, 1)
        return (self.max_logit > tau).sum()


class GPT(nn.Module):
    """A user's own GPT of one block, around an attention and our MoE."""

    def __init__(self, attention: nn.Module, recompute: bool = False):
        super().__init__()
        self.embed, self.recompute = nn.Embedding(300, 32), recompute
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.attention, self.moe = attention, DeepseekMoE(CONFIG)
        self.head = nn.Linear(32, 300, bias=False)

    def block(self, x):
        x = x + self.attention(self.norms[0](x))[0]
        out, balance, _ = self.moe(self.norms[1](x))
        return x + out, balance

    def forward(self, ids):
        x = self.embed(ids)
        x, balance = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) + balance


ATTENTIONS = {
    "mla": lambda: MultiheadLatentAttention(CONFIG),
    "gqa": lambda: GroupedQueryAttention(MoonwhaleConfig(**TOY | {"attention": "gqa"})),
    "moba_attention": lambda: MoBAHeads(32, 2),
}
IDS = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))


def steps(model, n=30, tau=TAU):
    """Train for n steps. Return the losses and what the hooks saw in each step."""
    optimizer = MuonClip(param_groups(model, lr=5e-3))
    hooks, losses, seen = attach_hooks(optimizer, model, tau), [], []
    for _ in range(n):
        losses.append(model(IDS))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: value.clone() for name, value in hooks.last.items()})
    return torch.stack(losses).detach(), seen


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_a_gpt_of_ones_own_learns_balances_and_clips(attention, recompute):
    torch.manual_seed(0)
    model = GPT(attention(), recompute)
    losses, seen = steps(model)
    assert losses.isfinite().all() and losses[-1] < 0.7 * losses[0]
    assert any(step["clipped_heads"] > 0 for step in seen)
    with torch.no_grad():
        model(IDS)
    tokens = IDS.numel() * CONFIG.num_experts_per_tok
    assert all(step["loads"].sum() == tokens * (1 + recompute) for step in seen)
    bias = model.moe.gate.e_score_correction_bias
    assert bias.abs().max() >= 0.02, "the bias moved in most steps"
    assert not model.moe.load.any(), "a pass without gradients counts nothing"


def test_balancing_alone_evens_the_loads():
    """A frozen shift towards one expert is undone by the bias alone."""
    torch.manual_seed(0)
    moe = DeepseekMoE(MoonwhaleConfig(**TOY | {"bias_update_speed": 0.02, "balance_loss": "none"}))
    x = torch.randn(4, 64, 32) + 2 * moe.gate.weight.detach()[0] / moe.gate.weight.detach()[0].norm()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    hooks, imbalances = attach_hooks(optimizer, moe), []
    for _ in range(60):
        moe(x)
        optimizer.step()
        loads = hooks.last["loads"][0]
        imbalances.append((loads.max() / loads.mean()).item())
    assert imbalances[0] > 1.5 and imbalances[-1] < 1.2


@pytest.mark.parametrize("build", [lambda: DeepseekMoE(CONFIG), *ATTENTIONS.values()])
def test_parts_are_initialised_when_they_are_constructed(build, monkeypatch):
    """Memory that is not written to is NaN here, as it can be anywhere."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    torch.manual_seed(0)
    part = build()
    monkeypatch.undo()
    for name, p in part.named_parameters():
        assert p.isfinite().all(), name
        if p.ndim > 1:
            assert 0.8 < p.std() * math.sqrt(3 * p.shape[-1]) < 1.2, f"{name} starts as nn.Linear's weights do"
    assert part(torch.randn(2, 20, 32))[0].isfinite().all()


def test_a_part_alone_computes_what_it_computes_in_the_model():
    torch.manual_seed(0)
    x, model = torch.randn(2, 20, 32), MoonwhaleForCausalLM(CONFIG)
    documents = Documents.from_inputs(2, 20, "cpu")
    attention = model.model.layers[0].self_attn
    out = []
    hook = attention.register_forward_hook(lambda module, args, result: out.append((args, result)))
    model(inputs_embeds=x, use_cache=False)
    hook.remove()
    args, result = out[0]
    assert torch.equal(attention(args[0])[0], result[0]) and torch.equal(documents.positions, args[2].positions)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_a_part_alone_goes_on_from_its_cache(name):
    torch.manual_seed(0)
    attention, x, cache = ATTENTIONS[name](), torch.randn(2, 20, 32), DynamicCache()
    pieces = [attention(piece, cache=cache)[0] for piece in x.split([13, 6, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x)[0])


def test_layers_may_differ_in_heads_and_experts():
    torch.manual_seed(0)
    more = MoonwhaleConfig(**TOY | {"num_attention_heads": 4, "n_routed_experts": 8})
    parts = nn.ModuleList(part(config) for part in (MultiheadLatentAttention, DeepseekMoE) for config in (CONFIG, more))
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.0)
    hooks = attach_hooks(optimizer, parts)
    for part in parts:
        part(torch.randn(2, 20, 32))
    optimizer.step()
    logits, loads = hooks.last["max_logits"], hooks.last["loads"]
    assert logits.isfinite().tolist() == [[True, True, False, False], [True] * 4]
    assert loads.sum(1).tolist() == [2 * 20 * CONFIG.num_experts_per_tok] * 2 and not loads[0, 4:].any()


def test_statistics_and_bias_stay_fp32_in_bf16():
    gpt = GPT(MultiheadLatentAttention(CONFIG)).bfloat16()
    gpt.moe.load += 257
    assert {b.dtype for b in gpt.buffers()} == {torch.float32}
    assert gpt.to("meta").moe.load.is_meta
    assert next(gpt.parameters()).dtype == torch.bfloat16


def test_a_first_step_that_counted_nothing_is_warned_of():
    model = MoonwhaleForCausalLM(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    attach_hooks(optimizer, model)
    model(IDS).logits.mean().backward()  # a loss of one's own: without labels the model counts nothing
    with pytest.warns(UserWarning, match="give the model labels, or call it with collect_statistics=True"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        attach_hooks(torch.optim.SGD(model.parameters(), lr=1e-3), model)
        model(IDS, collect_statistics=True).logits.mean().backward()
        optimizer.step()


def test_importing_the_optimizer_does_not_import_transformers():
    code = "import sys, moonwhale.optim; sys.exit('transformers' in sys.modules or 'moonwhale.model' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
