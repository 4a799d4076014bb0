"""QK-Clip (arXiv 2507.20534 §2.1) on real attention: what it measures, scales down, and leaves bitwise unchanged."""

import math
from dataclasses import replace

import pytest
import torch

from moonwhale.model.block import Block
from moonwhale.model.documents import Documents
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moba import moba_mask
from moonwhale.model.rope import rotate, rotation_table
from moonwhale.optim.step_hooks import attach_hooks

CHAIN = {"num_nextn_predict_layers": 2, "mtp_num_blocks": [2, 1]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 1.0}
VARIANTS = {
    "full attention": {},
    "moba": {"moba_topk": 2, "moba_block_size": 4},
    "moba, own block": {"moba_topk": 1, "moba_block_size": 4},
    "key convolution": {"moba_topk": 2, "moba_block_size": 4, "moba_key_conv": 3},
    "uncompressed queries": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
}
# Mostly padding, so that a padded query would have the largest logit; and two documents in the last row.
ROWS = [[-13, 7], [4, -16], [9, 6, -5]]
MASK = torch.tensor([[int(n > 0) for n in row for _ in range(abs(n))] for row in ROWS])
POSITIONS = torch.tensor([[i for n in row for i in range(abs(n))] for row in ROWS])
IDS = torch.randint(61, MASK.shape, generator=torch.Generator().manual_seed(0))
BATCH = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "position_ids": POSITIONS,
    "labels": IDS.masked_fill((MASK == 0) | (POSITIONS == 0), -100),
}


def attentions(model) -> list[MultiheadLatentAttention]:
    return [block.self_attn for block in model.modules() if isinstance(block, Block)]


def reset(model):
    for attention in attentions(model):
        attention.max_logit.fill_(-torch.inf)


@pytest.fixture
def trained(tiny_model):
    """`trained(**overrides)` returns a model with the whole MTP chain, after one training forward."""

    def trained(**overrides):
        model = tiny_model(**CHAIN, **overrides).train()
        model(**BATCH)
        return model

    return trained


# --- what is measured ------------------------------------------------------------------------------------------------


def largest_by_hand(attention, config, x, positions, documents):
    """Return each head's largest scaled logit over the valid queries, from whole score matrices in fp64."""
    nope, rope, rank, heads = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.kv_lora_rank,
        config.num_attention_heads,
    )
    table = rotation_table(config, positions, torch.float64)
    q = attention._queries(x).double()
    c, k_rope = attention.kv_a_proj_with_mqa(x).split([rank, rope], -1)
    c, k_rope = attention.kv_a_layernorm(c).unsqueeze(1), rotate(k_rope.double().unsqueeze(1), table, True)
    if config.moba_key_conv:
        c = attention._convolved(c, documents)
    w_k = attention.kv_b_proj.weight.unflatten(0, (heads, -1))[:, :nope]
    k_nope = torch.einsum("bzsr,hnr->bhsn", c, w_k).double()
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], table, True)], -1)
    products = q @ torch.cat([k_nope, k_rope.expand_as(k_nope[..., :rope])], -1).mT
    seen = (documents.document_ids[:, :, None] == documents.document_ids[:, None]).tril()[:, None]
    if config.moba_topk:
        seen = moba_mask(products, documents, config.moba_block_size, config.moba_topk)  # test_moba.py proves it
    seen = seen & documents.valid[:, None, :, None]
    return (products * config.attention_scale()).masked_fill(~seen, -torch.inf).amax((0, 2, 3)).float()


def assert_measured_by_hand(model):
    seen = {}

    def look(attention, args):
        x, _, documents, *_ = args
        positions = torch.where(documents.document_ids < 0, POSITIONS, documents.positions)
        seen[attention] = largest_by_hand(attention, model.config, x, positions, documents)

    hooks = [attention.register_forward_pre_hook(look) for attention in attentions(model)]
    reset(model)
    with torch.no_grad():
        model(**BATCH, collect_statistics=True)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 5
    for attention, largest in seen.items():
        assert torch.allclose(attention.max_logit, largest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_measured_by_hand(overrides, trained):
    assert_measured_by_hand(trained(**overrides))


def test_micro_batches_accumulate(trained):
    model = trained()
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    alone = []
    for row in range(3):
        reset(model)
        for block in blocks:
            block.mlp.load.zero_()
        model(**{name: x[row : row + 1] for name, x in BATCH.items()})
        alone.append([(b.self_attn.max_logit.clone(), b.mlp.load.clone()) for b in blocks])
    for row in (0, 1):  # the last one is still there
        model(**{name: x[row : row + 1] for name, x in BATCH.items()})
    for block, *parts in zip(blocks, *alone, strict=True):
        assert torch.equal(block.self_attn.max_logit, torch.stack([p[0] for p in parts]).amax(0))
        assert torch.equal(block.mlp.load, sum(p[1] for p in parts))


# --- what is clipped -------------------------------------------------------------------------------------------------


def measure(attention, x, documents, table):
    """Return the largest logits (heads,) of one attention on fixed inputs."""
    with torch.no_grad():
        return attention(x, table, documents)[1]


def assert_clip_is_exact(model):
    """In every attention, clipping sets the one head above τ to τ. Everything else stays the same bit for bit."""
    config, documents = model.config, Documents.from_inputs(*MASK.shape, MASK.device, MASK, POSITIONS)
    x = torch.randn(*MASK.shape, 32, generator=torch.Generator().manual_seed(7))
    table = rotation_table(config, POSITIONS, torch.float32)
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    for attention in attentions(model):
        before = {name: p.clone() for name, p in attention.state_dict().items()}
        old = measure(attention, x, documents, table)
        tau = old.sort().values[-2:].mean().item()
        clipped = old > tau
        assert clipped.sum() == 1 and tau > 0
        attention.max_logit.copy_(old)
        assert attention.clip_qk_(tau) == 1
        new, gamma = measure(attention, x, documents, table), tau / old
        assert torch.allclose(new[clipped], (gamma * old)[clipped], rtol=1e-5)
        assert torch.equal(new[~clipped], old[~clipped])

        query = "q_proj.weight" if config.q_lora_rank is None else "q_b_proj.weight"
        for name, p in attention.state_dict().items():
            if name not in (query, "kv_b_proj.weight"):
                assert torch.equal(p, before[name]), name
        q, old_q = (state[query].view(3, nope + rope, -1) for state in (attention.state_dict(), before))
        kv, old_kv = (state["kv_b_proj.weight"].view(3, nope + 7, -1) for state in (attention.state_dict(), before))
        assert torch.equal(q[~clipped], old_q[~clipped]) and torch.equal(kv[~clipped], old_kv[~clipped])
        assert torch.equal(kv[:, nope:], old_kv[:, nope:])
        g = gamma[clipped]
        assert torch.allclose(q[clipped, :nope], g.sqrt() * old_q[clipped, :nope])
        assert torch.allclose(q[clipped, nope:], g * old_q[clipped, nope:])
        assert torch.allclose(kv[clipped, :nope], g.sqrt() * old_kv[clipped, :nope])


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_clip_is_exact(overrides, trained):
    assert_clip_is_exact(trained(**overrides))


@pytest.mark.parametrize("overrides", [{}, VARIANTS["moba"]], ids=str)
def test_the_same_batch_reaches_tau_after_a_step(overrides, trained):
    """This clips the whole model through the hooks of an optimizer with a rate of 0. Later layers see other inputs."""
    model = trained(**overrides)
    first = attentions(model)[0]
    old = first.max_logit.clone()
    tau = old.sort().values[-2:].mean().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hooks = attach_hooks(optimizer, model, tau)
    optimizer.step()
    assert torch.equal(hooks.last["max_logits"][0], old) and hooks.last["max_logits"].shape == (5, 3)
    assert hooks.last["loads"].shape == (5, 6) and hooks.last["clipped_heads"] >= 1
    assert (first.max_logit == -math.inf).all()
    model(**BATCH)
    assert torch.allclose(first.max_logit, old.clamp(max=tau), rtol=1e-5)
    assert torch.equal(first.max_logit[old <= tau], old[old <= tau])


def test_nothing_above_tau_changes_nothing(trained):
    model = trained()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for attention in attentions(model):
        assert attention.clip_qk_(attention.max_logit.max().item()) == 0
        attention.max_logit.fill_(-torch.inf)  # as if no batch had run
        assert attention.clip_qk_(1.0) == 0
        attention.max_logit.fill_(-3.0)
        assert attention.clip_qk_(1.0) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# --- mutants ---------------------------------------------------------------------------------------------------------


def caught(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


@torch.no_grad()
def clip(self, tau, nope=0.5, rope=1.0, key=0.5, shared=0.0, value=0.0, one_gamma=False):
    """QK-Clip with an exponent of γ for each part. The defaults are the paper's."""
    gamma = torch.where(self.max_logit > tau, tau / self.max_logit, 1.0)
    count = (self.max_logit > tau).sum()
    if one_gamma:
        gamma = gamma.amin().expand_as(gamma)
    power = [(gamma**exponent)[:, None, None] for exponent in (nope, rope, key, value)]
    q = (self.q_b_proj if hasattr(self, "q_b_proj") else self.q_proj).weight.view(self.heads, self.nope + self.rope, -1)
    kv = self.kv_b_proj.weight.view(self.heads, self.nope + self.v_dim, -1)
    q[:, : self.nope] *= power[0]
    q[:, self.nope :] *= power[1]
    kv[:, : self.nope] *= power[2]
    kv[:, self.nope :] *= power[3]
    self.kv_a_proj_with_mqa.weight[self.rank :] *= gamma.amin() ** shared
    return count


MUTANTS = {
    "no γ": {"nope": 0.0, "rope": 0.0, "key": 0.0},
    "√γ on all rows": {"rope": 0.5},
    "γ on queries and keys": {"nope": 1.0, "key": 1.0},
    "one γ for all heads": {"one_gamma": True},
    "W_KR instead of W_QR": {"rope": 0.0, "shared": 1.0},
    "√γ on W_QR and W_KR": {"rope": 0.5, "shared": 0.5},
    "values too": {"value": 0.5},
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutant_clip(mutant, trained, monkeypatch):
    model = trained()
    monkeypatch.setattr(MultiheadLatentAttention, "clip_qk_", clip)
    assert_clip_is_exact(model)
    monkeypatch.setattr(MultiheadLatentAttention, "clip_qk_", lambda self, tau: clip(self, tau, **mutant))
    caught(assert_clip_is_exact, model)


def test_mutant_unclipped_heads_rounded(trained, monkeypatch):
    @torch.no_grad()
    def rounding(self, tau):
        count = clip(self, tau)
        self.q_b_proj.weight *= 1 - 2**-23
        return count

    monkeypatch.setattr(MultiheadLatentAttention, "clip_qk_", rounding)
    caught(assert_clip_is_exact, trained())


def test_mutant_columns_instead_of_rows(trained, monkeypatch):
    @torch.no_grad()
    def columns(self, tau):
        gamma = torch.where(self.max_logit > tau, tau / self.max_logit, 1.0)
        self.q_b_proj.weight *= gamma.repeat_interleave(7)[:20]
        return (self.max_logit > tau).sum()

    monkeypatch.setattr(MultiheadLatentAttention, "clip_qk_", columns)
    caught(assert_clip_is_exact, trained())


def test_mutant_padding_measured(trained, monkeypatch):
    right = MultiheadLatentAttention.forward

    def forward(self, x, table, documents, cache=None, *args, **options):
        out = right(self, x, table, documents, cache, *args, **options)[0]
        documents = replace(documents, valid=torch.ones_like(documents.valid))
        return out, right(self, x, table, documents, cache, *args, **options)[1]

    model = trained()
    assert_measured_by_hand(model)
    monkeypatch.setattr(MultiheadLatentAttention, "forward", forward)
    caught(assert_measured_by_hand, model)


def test_mutant_other_documents_measured(trained, monkeypatch):
    right = Documents.from_inputs
    model = trained()
    monkeypatch.setattr(Documents, "from_inputs", lambda *args: right(*args[:-1], None))
    with torch.no_grad():
        reset(model)
        model(**BATCH, collect_statistics=True)
    wrong = attentions(model)[0].max_logit.clone()
    monkeypatch.undo()
    reset(model)
    model(**BATCH)
    assert not torch.allclose(wrong, attentions(model)[0].max_logit, rtol=1e-4)
