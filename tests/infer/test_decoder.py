"""The decoder compared with the model: the same hidden states, for any division of tokens and any other sequences."""

import pytest
import torch

from moonwhale.infer import decoder as decoder_module
from moonwhale.infer.decoder import Decoder
from moonwhale.native import build
from moonwhale.native.packed_linear import PackedLinear

MOBA = {"moba_block_size": 4, "moba_topk": 2}
CONFIGS = {
    "full attention": {},
    "moba": MOBA,
    "moba, own block only": {**MOBA, "moba_topk": 1},
    "moba, wide": {**MOBA, "moba_topk": 3, "moba_full_attention_layers": [1]},
    "moba, convolved keys": {**MOBA, "moba_key_conv": 3},
    "convolved keys": {"moba_key_conv": 3},
    "convolved embeddings": {"embedding_conv": 3},
    "embeddings on latents": {"latent_embedding_every": 2},
    "moba, embeddings on latents": {**MOBA, "moba_key_conv": 2, "latent_embedding_every": 1},
    "uncompressed queries": {"q_lora_rank": None, "rope_interleave": False},
    "dense first block": {"first_k_dense_replace": 1, "attention_bias": True},
    "most experts": {"num_experts_per_tok": 4, "n_shared_experts": 2, "scoring_func": "softmax"},
    "no shared experts": {"num_experts_per_tok": 5, "n_shared_experts": 0, "routed_scaling_factor": 2.5},
    "groups of experts": {"n_group": 3, "topk_group": 2, "n_shared_experts": 0},
}
CUTS = {"at once": [45], "a prompt and steps": [40, 1, 1, 1, 1, 1], "pieces": [32, 8, 5], "drafts": [4, 3, 3] + [5] * 7}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request, tiny_model):
    return tiny_model(num_nextn_predict_layers=2, mtp_num_blocks=[2, 1], **request.param)


def tokens(*shape, seed=0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, params=["native", "pytorch", "pytorch, long"])
def way(request, monkeypatch):
    """Selects how steps run: in native code or in PyTorch. In PyTorch a step reads all entries or only the chosen
    blocks, depending on the length. "long" always reads only the chosen blocks.
    """
    if request.param == "native":
        if reason := build.unavailable_reason("step"):
            pytest.skip(reason)
    else:
        monkeypatch.setattr(build, "supports", lambda weight: False)
    if request.param == "pytorch, long":
        monkeypatch.setattr(decoder_module.DecoderAttention, "_over_all_entries", _as_if_long)
    return request.param


_over_all_entries = decoder_module.DecoderAttention._over_all_entries


def _as_if_long(self, q, cache, placement, chooses):
    return (
        self._over_chosen_blocks(q, cache, placement)
        if chooses
        else _over_all_entries(self, q, cache, placement, chooses)
    )


def run(decoder, ids, cuts, cache=None, slot=0, start=0):
    """Return hidden states (1, T, hidden) of ids (1, T), run in calls of these lengths."""
    cache, out, at = cache or decoder.cache(), [], 0
    cache.resize(max(cache.slots, slot + 1), max(cache.length, start + ids.shape[1]))
    for length in cuts:
        placement = decoder.place(cache, slot, [start + at], length)
        out.append(decoder.run(ids[:, at : at + length], cache, placement))
        at += length
    return torch.cat(out, dim=1)


def hidden_of(model, ids):
    return model.model(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@torch.inference_mode()
def test_the_decoder_equals_the_model(model, cuts, monkeypatch):
    ids = tokens(1, 45)
    for many in (32, 2):  # with 2, pieces of any length are expanded
        if many == 2 and model.config.moba_topk and any(n % 4 for n in cuts[:-1]):
            continue  # expanded pieces must begin with a block
        monkeypatch.setattr(decoder_module, "EXPAND_FROM_TOKENS", many)
        torch.testing.assert_close(run(Decoder(model), ids, cuts), hidden_of(model, ids), atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_rows_of_different_lengths_do_not_see_each_other(model):
    decoder, lengths = Decoder(model), [3, 21, 12]
    cache, ids = decoder.cache(), tokens(3, 30)
    cache.resize(4, 40)
    for tensor in (*cache.keys, *cache.values, *cache.means):
        if tensor is not None:
            tensor.fill_(torch.nan if tensor.dim() == 0 else 50.0)  # unwritten entries must not matter
    for slot, n in enumerate(lengths):
        run(decoder, ids[slot : slot + 1, :n], [n], cache, slot + 1)
    for step in range(3):
        placement = decoder.place(cache, 1, [n + 2 * step for n in lengths], 2)
        new = torch.stack([ids[i, n + 2 * step : n + 2 * step + 2] for i, n in enumerate(lengths)])
        got = decoder.run(new, cache, placement)
        for i, n in enumerate(lengths):
            alone = hidden_of(model, ids[i : i + 1, : n + 2 * step + 2])
            torch.testing.assert_close(got[i], alone[0, -2:], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_rejected_draft_leaves_no_trace(model):
    decoder, ids = Decoder(model), tokens(1, 24)
    cache = decoder.cache()
    cache.resize(1, 40)
    run(decoder, ids[:, :9], [9], cache)
    at = 9
    while at < 24:
        wrong = tokens(1, 4, seed=at)
        wrong[0, 0] = ids[0, at]  # followed by three drafts that are all rejected
        got = decoder.run(wrong, cache, decoder.place(cache, 0, [at], 4))
        torch.testing.assert_close(got[0, 0], hidden_of(model, ids[:, : at + 1])[0, -1], atol=2e-5, rtol=1e-4)
        at += 1


@torch.inference_mode()
def test_a_sequence_moves_and_the_cache_grows(model):
    decoder, ids = Decoder(model), tokens(1, 24)
    cache = decoder.cache()
    run(decoder, ids[:, :18], [18], cache, slot=2)
    cache.resize(5, 64)
    cache.move(2, 0, 18)
    got = decoder.run(ids[:, 18:], cache, decoder.place(cache, 0, [18], 6))
    torch.testing.assert_close(got, hidden_of(model, ids)[:, 18:], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_failed_allocation_leaves_the_cache_as_it_was(tiny_model, monkeypatch):
    """Whichever allocation fails, the cache goes on: it computes the same, and can grow when there is memory."""
    model = tiny_model(**MOBA, moba_key_conv=3, embedding_conv=2)
    decoder, ids, zeros = Decoder(model), tokens(1, 24), torch.zeros
    cache, fail_at, whole = decoder.cache(), 0, False
    run(decoder, ids[:, :18], [18], cache, slot=2)
    before = cache.slots, cache.length, cache.bytes
    while not whole:
        allocated = 0

        def failing(*args, fail_at=fail_at, **kwargs):
            nonlocal allocated
            allocated += 1
            if allocated > fail_at:
                raise MemoryError
            return zeros(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "zeros", failing)
            try:
                cache.resize(5, 64)
                whole = True
            except MemoryError:
                fail_at += 1
                assert (cache.slots, cache.length, cache.bytes) == before
        got = decoder.run(ids[:, 18:20], cache, decoder.place(cache, 2, [18], 2))
        torch.testing.assert_close(got, hidden_of(model, ids)[:, 18:20], atol=2e-5, rtol=1e-4)
    assert (cache.slots, cache.length) == (5, 64) and fail_at > 3 * len(cache.layers)


@torch.inference_mode()
def test_the_mtp_chain_equals_the_models(model):
    decoder, ids = Decoder(model), tokens(1, 40)
    want = model.model(ids, use_cache=False, with_mtp=True)
    for cuts in ([40], [33, 7], [8] * 5):
        cache, at = decoder.cache(), 0
        cache.resize(1, 40)
        for length in cuts:
            placement = decoder.place(cache, 0, [at], length)
            hidden = decoder.run(ids[:, at : at + length], cache, placement)
            for depth in (1, 2):
                ahead = ids.roll(-depth, dims=1)[:, at : at + length]
                hidden = decoder.draft(depth, hidden, ahead, cache, placement)
                known = min(at + length, 40 - depth) - at
                theirs = want.mtp_hidden_states[depth - 1][:, at : at + known]
                torch.testing.assert_close(hidden[:, :known], theirs, atol=5e-5, rtol=1e-4)
            at += length


@torch.inference_mode()
def test_a_step_reads_only_the_chosen_blocks(tiny_model):
    """A step reads topk blocks for each of 3 heads, however long the context. Other entries may hold anything."""
    decoder, ids = Decoder(tiny_model(**MOBA, num_hidden_layers=1)), tokens(1, 61)
    cache = decoder.cache()
    cache.resize(1, 64)
    run(decoder, ids[:, :60], [60], cache)
    poisoned = []
    for block in range(15):
        before = cache.keys[0].clone()
        cache.keys[0][0, block * 4 : block * 4 + 4] = torch.nan
        if run(decoder, ids[:, 60:], [1], cache, start=60).isnan().any():
            poisoned.append(block)
        cache.keys[0].copy_(before)
    assert 2 <= len(poisoned) + 1 <= 3 * (2 - 1) + 1  # + 1: the last block, which holds only this token


@torch.inference_mode()
def test_a_step_in_pytorch_reads_each_block_once_or_those_chosen(tiny_model, monkeypatch, way):
    if way == "native":
        pytest.skip("these are PyTorch's two ways")
    decoder, seen = Decoder(tiny_model(**MOBA)), []
    monkeypatch.setattr(decoder_module, "EXPAND_FROM_TOKENS", 32)
    scores = decoder_module.DecoderAttention._scores

    def recorded(self, q, keys):
        seen.append(keys.shape[0] * keys.shape[1])
        return scores(self, q, keys)

    monkeypatch.setattr(decoder_module.DecoderAttention, "_scores", recorded)
    run(decoder, tokens(1, 60), [40] + [1] * 20)
    assert set(seen) == {3 * 2 * 4}


@torch.inference_mode()
def test_cache_bytes_equal_the_count(tiny_model):
    for changes in ({}, MOBA, {"moba_key_conv": 3}):
        cache = Decoder(tiny_model(**changes)).cache()
        cache.resize(3, 128)
        allocated = {t.data_ptr(): t.nbytes for t in (*cache.keys, *cache.values, *cache.means) if t is not None}
        assert sum(allocated.values()) == cache.bytes == cache.bytes_per_token * 3 * 128


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@torch.inference_mode()
def test_fewer_bits_are_close(tiny_model, int8):
    ids = tokens(1, 45)
    want = hidden_of(tiny_model(**MOBA), ids)
    got = run(Decoder(tiny_model(**MOBA).to(torch.bfloat16), int8=int8), ids, [40, 1, 2, 2]).float()
    assert torch.cosine_similarity(got, want, dim=-1).mean() > 0.97


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_weights_are_within_half_a_step(rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    weight[3] = 0
    bias, x = torch.randn(48, generator=generator), torch.randn(2, rows, 64, generator=generator)
    got = PackedLinear(weight, bias, int8=True)(x)
    rounding = weight.abs().amax(1) / 127 / 2
    assert ((got - x @ weight.T - bias).abs() <= x.abs().sum(-1, keepdim=True) * rounding + 1e-4).all()
    half = PackedLinear(weight.bfloat16(), bias.bfloat16(), int8=True)(x.bfloat16())
    assert (half.float() - got).norm() < 0.01 * got.norm()


# --- mutants ---------------------------------------------------------------------------------------------------------


def caught(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


@torch.inference_mode()
def test_mutants_are_caught(tiny_model, monkeypatch, way):
    if way == "native":
        pytest.skip("tests/native/test_native.py has its mutants")
    model, ids = tiny_model(**MOBA), tokens(1, 45)

    def check(cuts=CUTS["a prompt and steps"]):
        torch.testing.assert_close(run(Decoder(model), ids, cuts), hidden_of(model, ids), atol=2e-5, rtol=1e-4)

    check()
    with monkeypatch.context() as patch:  # block means are never written
        patch.setattr(decoder_module.DecoderAttention, "_write_entries", _without_means)
        patch.setattr(decoder_module.DecoderAttention, "_over_all_entries", _as_if_long)
        caught(check)
    with monkeypatch.context() as patch:  # every token is rotated as if it were the first
        right = decoder_module.rotation_table
        patch.setattr(decoder_module, "rotation_table", lambda c, p, d: right(c, p * 0, d))
        caught(check)
    with monkeypatch.context() as patch:  # a step takes full attention
        patch.setattr(decoder_module.DecoderAttention, "_over_chosen_blocks", _everything)
        patch.setattr(
            decoder_module.DecoderAttention, "_over_all_entries", lambda *args: _over_all_entries(*args[:-1], False)
        )
        caught(check)
    with monkeypatch.context() as patch:  # the gate takes the worst blocks
        right_choice = decoder_module.DecoderAttention._choose
        patch.setattr(decoder_module.DecoderAttention, "_choose", lambda self, gates, s: right_choice(self, -gates, s))
        caught(check)


def _without_means(self, latent, k_rope, cache, placement):
    entry = torch.cat([latent, k_rope], dim=-1)
    cache.keys[self.layer].flatten(0, 1).index_copy_(0, placement.entry_index, entry.flatten(0, 1))


def _everything(self, q, cache, placement):
    return _over_all_entries(self, q, cache, placement, False)
