"""The plain twin of MLA is Llama's attention: with dense blocks our model and LlamaForCausalLM exchange all weights."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from moonwhale.model import gqa
from moonwhale.model.documents import Documents
from moonwhale.model.gqa import GroupedQueryAttention
from moonwhale.model.rope import rotation_table

TOLERANCES = {"fp32": 3e-5, "bf16": 0.12}  # relative to the largest value compared
GQA = {"attention": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "v_head_dim": 16}  # heads of 16
LLAMA = GQA | {"first_k_dense_replace": 2, "rope_interleave": False}
MOBA = {"moba_topk": 2, "moba_block_size": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": None},
    "multi-query": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True},
    "llama3's rope": {"rope_parameters": LLAMA3},
    "moba over everything": {"moba_topk": 8, "moba_block_size": 4},
}
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
SHARED += ("rms_norm_eps", "num_attention_heads", "num_key_value_heads", "attention_bias", "rope_parameters")


@pytest.fixture
def pair(tiny_model):
    """`pair(**overrides)` returns our model and transformers' Llama, with the same weights."""

    def pair(**overrides):
        ours = tiny_model(**LLAMA | overrides)
        shared = {name: getattr(ours.config, name) for name in SHARED}
        config = LlamaConfig(**shared, head_dim=16, bos_token_id=0, eos_token_id=None, attn_implementation="eager")
        theirs = LlamaForCausalLM(config).eval().to(ours.device)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return ours, theirs

    return pair


def batch(padding=None):
    """Returns ids (3, 22) and a mask; padded rows have 22, 17 and 9 tokens."""
    ids = torch.randint(61, (3, 22), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, tokens in enumerate((22, 17, 9) if padding else ()):
        mask[row, slice(22 - tokens) if padding == "left" else slice(tokens, None)] = 0
    return ids, mask


def distance(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same(ours, theirs, padding=None, dtype="fp32"):
    """Compares the loss, the logits and every gradient of our model in this precision with theirs in fp32."""
    ids, mask = batch(padding)
    labels = ids.masked_fill(mask.cumsum(1) * mask <= 1, -100)  # a row's first token is no target
    losses, logits = [], []
    for model in (ours, theirs):
        model.zero_grad()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=model is ours and dtype == "bf16"):
            logits.append(model.eval()(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
            losses.append(model.train()(ids, attention_mask=mask, labels=labels, use_cache=False).loss)
        losses[-1].backward()
    assert distance(*logits) < TOLERANCES[dtype]
    assert distance(*losses) < TOLERANCES[dtype]
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert distance(p.grad, gradients[name].grad) < TOLERANCES[dtype], name


def assert_same_decoding(ours, theirs):
    """Checks a prefill, single steps and attention weights over a cache, with rows padded on the left."""
    ids, mask = batch("left")
    caches = {ours: None, theirs: None}
    for start, stop in [(0, 16), (16, 17), (17, 19), (19, 22)]:
        outs = []
        for model in caches:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            with torch.no_grad():
                new = {"attention_mask": mask[:, :stop], "position_ids": positions, "past_key_values": caches[model]}
                outs.append(model(ids[:, start:stop], **new, use_cache=True, output_attentions=start > 0))
            caches[model] = outs[-1].past_key_values
        real = mask[:, start:stop].bool()
        assert distance(*(out.logits[real] for out in outs)) < TOLERANCES["fp32"]
        for weights in zip(*(out.attentions for out in outs), strict=True) if start else ():
            assert distance(*(w.transpose(1, 2)[real] for w in weights)) < TOLERANCES["fp32"]
    for layer in caches[ours].layers:
        heads, numbers = layer.keys.shape[1], layer.keys.shape[-1] + layer.values.shape[-1]
        assert heads * numbers == ours.config.kv_cache_numbers_per_token


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_same_model(overrides, pair):
    models = pair(**overrides)
    assert_same_decoding(*models)
    for padding in (None, "left", "right"):
        assert_same(*models, padding)
    assert_same(*models, dtype="bf16")


def test_greedy_text(pair):
    ids, mask = batch("left")
    texts = [m.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10) for m in pair()]
    assert torch.equal(*texts) and texts[0].shape == (3, 32)


def test_neighbouring_pairs_are_halves_in_another_order(pair, tiny_model):
    """`rope_interleave` reorders the rows of W_Q and W_K."""
    _, theirs = pair()
    ours, weights = tiny_model(**LLAMA | {"rope_interleave": True}), theirs.state_dict()
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] = weights[name].view(-1, 2, 8, 32).transpose(1, 2).reshape(-1, 32)
    ours.load_state_dict(weights)
    assert_same_decoding(ours, theirs)


def test_narrow_values_are_llamas_with_zeros(pair, tiny_model):
    ours, (_, theirs) = tiny_model(**LLAMA | {"v_head_dim": 8}), pair()
    weights = ours.state_dict()
    for i in range(2):
        value, out = f"model.layers.{i}.self_attn.v_proj.weight", f"model.layers.{i}.self_attn.o_proj.weight"
        weights[value] = torch.nn.functional.pad(weights[value].view(2, 8, 32), (0, 0, 0, 8)).flatten(0, 1)
        weights[out] = torch.nn.functional.pad(weights[out].view(32, 4, 8), (0, 8)).flatten(1)
    theirs.load_state_dict(weights)
    ids, _ = batch()
    assert distance(ours(ids).logits, theirs(ids).logits) < TOLERANCES["fp32"]


# --- MoBA, documents and QK-Clip --------------------------------------------------------------------------------------


def test_moba_decodes_as_it_reads(tiny_model):
    """The sparse path, which test_moba.py compares with the paper's, agrees with steps that mask what is not chosen."""
    model, (ids, _) = tiny_model(**GQA | MOBA), batch()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        masked = model(ids, use_cache=False, output_attentions=True).logits
        full = tiny_model(**GQA)(ids, use_cache=False).logits
        out, pieces = None, []
        for start, stop in [(0, 9), (9, 10), (10, 16), (16, 22)]:
            cache = out.past_key_values if out else None
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
    assert distance(masked, whole) < TOLERANCES["fp32"]
    assert distance(torch.cat(pieces, 1), whole) < TOLERANCES["fp32"]
    assert distance(full, whole) > 0.05


@pytest.mark.parametrize("moba", [{}, MOBA], ids=["full", "moba"])
def test_packed_documents_do_not_see_each_other(moba, tiny_model):
    model, (ids, _) = tiny_model(**GQA | moba), batch()
    positions = torch.cat([torch.arange(9), torch.arange(13)]).expand(3, -1)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split([9, 13], dim=1)], dim=1)
    assert distance(packed, alone) < TOLERANCES["fp32"]


def attend(attention, x):
    """Returns the heads' largest logits on x (B, T, hidden), from whole score matrices in fp64 and from the forward."""
    length, heads = x.shape[1], attention.heads
    documents = Documents.from_inputs(*x.shape[:2], x.device)
    table = rotation_table(attention.config, documents.positions, x.dtype)
    cos, sin = (t.repeat(1, 1, 1, 2).double() for t in table)  # (B, 1, T, 16), halves
    q, k = (
        f(x).unflatten(-1, (-1, 16)).transpose(1, 2).double() for f in (attention.q_proj, attention.k_proj)
    )  # (B, heads, T, 16)
    q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
    logits = torch.stack([q[:, h] @ k[:, h * k.shape[1] // heads].mT for h in range(heads)], 1) / 4
    seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    return logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3)).float(), attention(x, table, documents)[1]


@torch.no_grad()
def assert_clip_is_exact(config, draw):
    """The one head above τ reaches τ, and the logits of the others stay the same bit for bit."""
    attention = draw(GroupedQueryAttention(config, 0))
    attention.config = config
    x = torch.randn(3, 22, 32, generator=torch.Generator().manual_seed(7))
    by_hand, old = attend(attention, x)
    assert torch.allclose(old, by_hand, rtol=1e-5)
    tau = old.sort().values[-2:].mean().item()
    clipped = old > tau
    attention.max_logit.copy_(old)
    assert clipped.sum() == 1 and tau > 0 and attention.clip_qk_(tau) == 1
    _, new = attend(attention, x)
    assert torch.allclose(new[clipped], torch.full_like(new[clipped], tau), rtol=1e-5)
    assert torch.equal(new[~clipped], old[~clipped])
    assert attention.clip_qk_(old.max().item()) == 0


@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": None}, {"attention_bias": True}], ids=str)
def test_clip_is_exact(overrides, tiny_config, draw):
    assert_clip_is_exact(tiny_config(**LLAMA | overrides), draw)


def test_frozen_weights_are_not_clipped(tiny_config, draw):
    attention = draw(GroupedQueryAttention(tiny_config(**GQA), 0))
    attention.k_proj.requires_grad_(False)
    attention.max_logit.fill_(1e3)
    assert attention.clip_qk_(1.0) == 0


@pytest.mark.cpu_only
def test_sharded_weights_and_biases_are_clipped(tiny_config, draw):
    plain, sharded = (draw(GroupedQueryAttention(tiny_config(**GQA, attention_bias=True), 0)) for _ in range(2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for attention in (plain, sharded):
            attention.max_logit.fill_(9.0)
            assert attention.clip_qk_(1.0) == 4
        for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs), name
    finally:
        dist.destroy_process_group()


# --- mutants ----------------------------------------------------------------------------------------------------------


def caught(check, *args, **options):
    with pytest.raises(AssertionError):
        check(*args, **options)


def test_mutant_key_heads_in_turn(pair, monkeypatch):
    """Query head h reads key head h % kv_heads, where Llama's reads h // group."""
    in_turn = lambda x, n, dim: x.repeat(1, n, 1, 1)  # noqa: E731
    models = pair()
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", in_turn)
    ours = models[0](batch()[0], use_cache=False).logits
    monkeypatch.undo()
    assert distance(ours, models[1](batch()[0], use_cache=False).logits) > TOLERANCES["bf16"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_mutant_rope_on_a_part(dtype, pair, monkeypatch):
    def rotate(x, rotation, interleaved):
        half = tuple(table[..., :4] for table in rotation)
        return torch.cat([x[..., :8], right(x[..., 8:], half, interleaved)], dim=-1)

    right, models = gqa.rotate, pair()
    monkeypatch.setattr(gqa, "rotate", rotate)
    caught(assert_same, *models, dtype=dtype)


def test_mutant_one_position_for_a_whole_piece(pair, monkeypatch):
    def forward(self, x, rotation, documents, cache=None, *args, **options):
        rotated = tuple(t[:, :, :1].expand_as(t) for t in rotation) if cache is not None else rotation
        return right(self, x, rotated, documents, cache, *args, **options)

    right, models = GroupedQueryAttention.forward, pair()
    monkeypatch.setattr(GroupedQueryAttention, "forward", forward)
    caught(assert_same_decoding, *models)


@pytest.mark.parametrize("power", [(0.5, 0.5), (1.0, 1.0), (0.5, 0.0)], ids=str)
def test_mutant_clip(power, tiny_config, draw, monkeypatch):
    """A shared key is scaled, or the queries by √γ alone."""

    def clip(self, tau):
        gamma = torch.where(self.max_logit > tau, tau / self.max_logit, 1.0)
        self.q_proj.weight.view(4, 16, -1).mul_((gamma ** power[0])[:, None, None])
        shared = gamma.view(2, 2).amin(1) ** power[1]
        self.k_proj.weight.view(2, 16, -1).mul_(shared[:, None, None])
        return (self.max_logit > tau).sum()

    monkeypatch.setattr(GroupedQueryAttention, "clip_qk_", clip)
    caught(assert_clip_is_exact, tiny_config(**LLAMA), draw)
