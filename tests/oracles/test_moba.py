"""MoBA against its algorithm by hand (arXiv 2502.13189 §2.2), alone and inside the model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from moonwhale.model import MoonwhaleForCausalLM, attention, moba
from moonwhale.model.documents import BlockTable, Documents
from moonwhale.model.mla import MultiheadLatentAttention

SIZE = 4  # keys in a block
HEADS, WIDTH, V_WIDTH, SCALE = 2, 6, 5, 0.7
TOPK = [1, 2, 3, 99]

# For each row, the length of each document; a negative number is the length of padding.
ROWS = {
    "ragged": [[13], [13]],
    "whole blocks": [[16], [16]],
    "shorter than a block": [[3], [3]],
    "one token": [[1], [1]],
    "padded on the left": [[17], [-4, 13], [-14, 3]],
    "padded on the right": [[17], [13, -4], [1, -16]],
    "packed": [[5, 9, 4], [18], [1, 16, 1]],
    "packed and padded": [[-2, 6, 9, -3], [5, -1, 13, -1]],
}


def read(rows) -> tuple[Documents, list[list[range]]]:
    """Return the documents of these rows, and the range of tokens of each document in each row."""
    mask = torch.tensor([[int(n > 0) for n in row for _ in range(abs(n))] for row in rows])
    position_ids = torch.tensor([[i for n in row for i in range(abs(n))] for row in rows])
    documents = []
    for row in rows:
        ends = torch.tensor(row).abs().cumsum(0).tolist()
        documents.append([range(end - n, end) for n, end in zip(row, ends, strict=True) if n > 0])
    return Documents.from_inputs(*mask.shape, mask.device, mask, position_ids), documents


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(layout: Documents):
    batch, length = layout.document_ids.shape
    return [normal(batch, HEADS, length, width, seed=width) for width in (WIDTH, WIDTH + 1, V_WIDTH)]


def naive_mask(q, k, documents, size, topk):
    """Return which keys each query attends to, (B, H, T, T), one query of one head of one document at a time."""
    mask = torch.eye(q.shape[2], dtype=torch.bool).repeat(*q.shape[:2], 1, 1)
    for row, sequences in enumerate(documents):
        for tokens in sequences:
            blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
            for head in range(q.shape[1]):
                keys = k[row, head]
                for i, token in enumerate(tokens):
                    own = i // size
                    gates = [(q[row, head, token] @ keys[list(block)].mean(0)).item() for block in blocks[:own]]
                    history = sorted(range(own), key=lambda j: gates[j], reverse=True)[: topk - 1]  # own block counts
                    for j in history:
                        mask[row, head, token, list(blocks[j])] = True
                    mask[row, head, token, blocks[own][0] : token + 1] = True
    return mask


def naive(q, k, v, documents, topk):
    logits = (q @ k.mT * SCALE).masked_fill(~naive_mask(q, k, documents, SIZE, topk), -torch.inf)
    return logits.softmax(-1) @ v, logits.amax(-1)


def close(ours, oracle):
    return torch.allclose(ours.double(), oracle, rtol=1e-5, atol=1e-5)


def assert_naive(rows, topk):
    """Compare output, largest logits and all three gradients at every token that is not padding."""
    layout, documents = read(rows)
    real = layout.valid[:, None].expand(-1, HEADS, -1)
    q, k, v = heads_of(layout)
    k = k[..., :WIDTH]
    results = []
    for function, dtype in (
        (lambda *qkv: moba.moba_attention(*qkv, SCALE, layout, SIZE, topk), torch.float32),
        (lambda *qkv: naive(*qkv, documents, topk), torch.float64),
    ):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, top = function(*inputs)
        (out * normal(*out.shape, seed=9).to(dtype))[real].sum().backward()
        results.append([out[real], top[real], *(x.grad for x in inputs)])
    for name, ours, oracle in zip(("out", "top", "dq", "dk", "dv"), *results, strict=True):
        assert close(ours, oracle), name


def assert_naive_mask(rows, topk, newest=None):
    """Compare the dense twin, for all queries or for the newest ones."""
    layout, documents = read(rows)
    q, k, _ = heads_of(layout)
    k = k[..., :WIDTH]
    newest = newest or q.shape[2]
    ours = moba.moba_mask((q @ k.mT)[:, :, -newest:], layout, SIZE, topk)
    real = layout.valid[:, None, -newest:].expand(-1, HEADS, -1)
    assert torch.equal(ours[real], naive_mask(q, k, documents, SIZE, topk)[:, :, -newest:][real])


@pytest.fixture(params=["chunks as they are", "small chunks"])
def chunks(request, monkeypatch):
    if request.param == "small chunks":
        monkeypatch.setattr(attention, "QUERIES_PER_TILE", 3)
        monkeypatch.setattr(attention, "SCORES_PER_TILE", 64)
        monkeypatch.setattr(moba, "MAX_CHUNK_WIDTH", 2)


@pytest.mark.parametrize("topk", TOPK)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
class TestNaive:
    def test_the_sparse_path(self, rows, topk, chunks):
        assert_naive(rows, topk)

    def test_the_dense_mask(self, rows, topk):
        assert_naive_mask(rows, topk)
        assert_naive_mask(rows, topk, newest=1)
        assert_naive_mask(rows, topk, newest=-(-len(rows[0]) // 2))


@pytest.mark.parametrize("topk", [0, *TOPK])
@pytest.mark.parametrize("length", [13, 16])
@pytest.mark.parametrize("first", [0, 4, 12])
def test_the_last_queries_give_the_same_as_among_all(first, length, topk, chunks):
    layout, _ = read([[length], [length]])
    q, k, v = (normal(2, HEADS, length, width, seed=width) for width in (WIDTH, WIDTH, V_WIDTH))
    if topk:
        whole, part = (moba.moba_attention(x, k, v, SCALE, layout, SIZE, topk) for x in (q, q[:, :, first:]))
    else:
        whole, part = (attention.attend(x, k, v, SCALE, causal=True) for x in (q, q[:, :, first:]))
    for all_of_them, last in zip(whole, part, strict=True):
        torch.testing.assert_close(last, all_of_them[:, :, first:])


def test_blocks_that_cover_everything_are_full_attention():
    """This includes the sparse path itself: a top-k of 2 covers three documents of two blocks each. 0 is the same."""
    layout, _ = read([[8, 7, 5]])
    q, k, v = (x.float() for x in heads_of(layout))
    k = k[..., :WIDTH]
    full = attention.attend(q, k, v, SCALE, True, layout.document_ids)
    for topk in (0, 2, 99):
        ours = moba.moba_attention(q, k, v, SCALE, layout, SIZE, topk)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, full, strict=True))


def count_scores(monkeypatch, length, topk, size=16):
    """Count the scores q·k that the attention of one head computes."""
    computed = 0

    def scores(q, k, *args):
        nonlocal computed
        head, rows, keys = args[-1]
        computed += len(range(len(q))[head]) * len(range(q.shape[1])[rows]) * len(range(k.shape[1])[keys])
        return all_scores(q, k, *args)

    all_scores = attention._scores
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_scores", scores)
        patch.setattr(attention, "QUERIES_PER_TILE", length)  # a block is one piece, so that causality saves nothing
        q, k, v = (normal(1, 1, length, 4, seed=i).float() for i in range(3))
        moba.moba_attention(q, k, v, 0.5, Documents.from_inputs(1, length, q.device, None, None), size, topk)
    return computed


def test_work_is_sparse_and_linear(monkeypatch):
    assert count_scores(monkeypatch, 1024, 1) == 1024 * 16
    needed = 1024 * 3 * 16
    assert count_scores(monkeypatch, 1024, 3) < 2.5 * needed < 0.13 * 1024**2  # chunks of queries are not all full
    assert count_scores(monkeypatch, 4096, 3) < 4.5 * count_scores(monkeypatch, 1024, 3)
    assert count_scores(monkeypatch, 1024, 64) == 1024**2  # the full attention that the mutant below falls back to


# --- exact attention itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [None, [[0] * 11, [-1, -1, 0, 0, 0, 1, 1, 1, 1, 2, 2]]], ids=["plain", "packed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("chunk", "tile"), [(128, 1 << 19), (3, 1 << 19), (3, 1), (128, 300)])
def test_attend_is_softmax_attention(segment, causal, chunk, tile, monkeypatch):
    """Compare output, row maxima, log-sum-exp and gradients, in tiles of any size."""
    monkeypatch.setattr(attention, "QUERIES_PER_TILE", chunk)
    monkeypatch.setattr(attention, "SCORES_PER_TILE", tile)
    n_queries = 11 if causal or segment else 7
    segment = None if segment is None else torch.tensor(segment)
    inputs = [normal(2, 3, n, d, seed=d) for n, d in ((n_queries, WIDTH), (11, WIDTH), (11, V_WIDTH))]

    def plain(q, k, v):
        logits = q @ k.mT * SCALE
        if segment is not None:
            logits = logits.masked_fill((segment[:, :, None] != segment[:, None])[:, None], -torch.inf)
        if causal:
            logits = logits.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
        return logits.softmax(-1) @ v, logits.amax(-1), logits.logsumexp(-1)

    def ours(q, k, v):
        lse = attention.attend_forward(*(x.detach().flatten(0, 1) for x in (q, k, v)), SCALE, causal, segment)[1]
        return *attention.attend(q, k, v, SCALE, causal, segment), lse.view(q.shape[:3])

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, top, lse = function(*leaves)
        (out * normal(*out.shape).to(dtype)).sum().backward()
        return [out, top, lse, *(x.grad for x in leaves)]

    found = run(ours, torch.float32)
    for a, b in zip(found, run(plain, torch.float64), strict=True):
        assert close(a, b)
    assert not found[1].requires_grad


def test_gates_are_fp32_under_autocast(monkeypatch):
    """Rounded to bf16, these gates would choose other blocks for some queries."""
    q, k, v = (normal(1, 4, 256, 32, seed=seed).bfloat16() for seed in range(3))
    seen, right = [], moba.choose_blocks
    monkeypatch.setattr(moba, "choose_blocks", lambda *args: seen.append(right(*args)) or seen[-1])
    layout = Documents.from_inputs(1, 256, q.device, None, None)
    moba.moba_attention(q, k, v, 1.0, layout, 16, 4)
    with torch.autocast(normal(1).device.type, torch.bfloat16):
        moba.moba_attention(q, k, v, 1.0, layout, 16, 4)
    assert torch.equal(*seen)


def test_bf16_gradients_of_many_tiles_are_as_good_as_of_one(monkeypatch):
    inputs, weights = [normal(1, 2, 256, 16, seed=i) for i in range(3)], normal(1, 2, 256, 16, seed=3)

    def gradients(dtype, chunk):
        monkeypatch.setattr(attention, "QUERIES_PER_TILE", chunk)
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        (attention.attend(*leaves, 0.25, True)[0].double() * weights).sum().backward()
        return [x.grad.double() for x in leaves]

    exact = gradients(torch.float64, 256)
    for one, many, exactly in zip(gradients(torch.bfloat16, 256), gradients(torch.bfloat16, 4), exact, strict=True):
        assert (many - exactly).norm() < 1.2 * (one - exactly).norm() < 0.02 * exactly.norm()


# --- inside the model ------------------------------------------------------------------------------------------------

SPARSE = {
    "num_hidden_layers": 3,
    "moba_topk": 2,
    "moba_block_size": SIZE,
    "moba_full_attention_layers": [1],
    "moba_key_conv": 3,
}
DOCUMENTS = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)) for n in (22, 17, 5)]


@pytest.fixture
def sparse_model(tiny_model):
    return tiny_model(**SPARSE)


def alone(model):
    with torch.no_grad():
        return [model(ids[None], use_cache=False).logits[0] for ids in DOCUMENTS]


def padded(side):
    width = max(len(ids) for ids in DOCUMENTS)
    rows, masks = [], []
    for ids in DOCUMENTS:
        gap = (width - len(ids), 0) if side == "left" else (0, width - len(ids))
        rows.append(F.pad(ids, gap, value=7))
        masks.append(F.pad(torch.ones_like(ids), gap))
    return torch.stack(rows), torch.stack(masks)


def assert_close_rows(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def assert_padding_changes_nothing(model, side):
    ids, mask = padded(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close_rows([row[m.bool()] for row, m in zip(logits, mask, strict=True)], alone(model))


def assert_packing_changes_nothing(model):
    position_ids = torch.cat([torch.arange(len(ids)) for ids in DOCUMENTS])[None]
    with torch.no_grad():
        logits = model(torch.cat(DOCUMENTS)[None], position_ids=position_ids, use_cache=False).logits[0]
    assert_close_rows(logits.split([len(ids) for ids in DOCUMENTS]), alone(model))


def assert_decoding_is_prefill(model, pieces):
    """Run the padded batch through the cache in pieces of these lengths, and compare with one pass over all of it."""
    ids, mask = padded("left")
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache, logits, stop = None, [], 0
        for start, stop in zip([0, *torch.tensor(pieces).cumsum(0)], torch.tensor(pieces).cumsum(0), strict=False):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert stop == ids.shape[1]
    assert_close_rows([torch.cat(logits, dim=1)[mask.bool()]], [whole[mask.bool()]])


PIECES = [[18, 1, 1, 1, 1], [19, 3], [17, 5], [1] * 22]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, sparse_model):
    assert_padding_changes_nothing(sparse_model, side)


def test_packing_changes_nothing(sparse_model):
    assert_packing_changes_nothing(sparse_model)


@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_decoding_is_prefill(pieces, sparse_model):
    assert_decoding_is_prefill(sparse_model, pieces)


def test_topk_and_full_layers_count(tiny_model):
    """Otherwise the tests above would pass for a model without MoBA, too."""
    ids = DOCUMENTS[0][None]
    outs = [
        tiny_model(**SPARSE | changed)(ids).logits
        for changed in ({}, {"moba_topk": 0}, {"moba_topk": 1}, {"moba_topk": 3}, {"moba_full_attention_layers": []})
    ]
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert torch.allclose(a[:, :SIZE], b[:, :SIZE], atol=1e-5) and not torch.allclose(a, b, atol=1e-3)


# --- the short convolution on keys -----------------------------------------------------------------------------------


def assert_key_conv_is_causal(model):
    ids = DOCUMENTS[0][None].clone()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        ids[0, 9] += 1
        after = model(ids, use_cache=False).logits
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_key_conv_is_causal(sparse_model):
    assert_key_conv_is_causal(sparse_model)


def test_key_conv_starts_as_nothing_and_learns(tiny_config, tiny_model):
    with_conv = tiny_model(**SPARSE).train()
    fresh = MoonwhaleForCausalLM(tiny_config(**SPARSE))
    for layer, new in zip(with_conv.model.layers, fresh.model.layers, strict=True):
        layer.self_attn.key_conv.data.copy_(new.self_attn.key_conv)
    without = tiny_model(**SPARSE | {"moba_key_conv": 0}).train()
    without.load_state_dict(with_conv.state_dict(), strict=False)
    ids = DOCUMENTS[0][None]
    loss = with_conv(ids, labels=ids).loss
    assert torch.equal(loss, without(ids, labels=ids).loss)
    loss.backward()
    for layer in with_conv.model.layers:
        assert layer.self_attn.key_conv.grad.abs().min() > 0


def test_key_conv_by_hand(tiny_model):
    """Keys are computed from c + silu(Σ w_j c_{t-j}), and values from c."""
    module = tiny_model(**SPARSE).model.layers[0].self_attn
    c = normal(1, 1, 6, 14).float()
    layout, _ = read([[4, 2]])
    expected = c.clone()
    for start, stop in ((0, 4), (4, 6)):
        for t in range(start, stop):
            taps = [c[0, 0, t - back] * module.key_conv[:, 0, 2 - back] for back in range(min(3, t - start + 1))]
            expected[0, 0, t] += F.silu(sum(taps))
    assert torch.allclose(module._convolved(c, layout), expected, atol=1e-6)


# --- mutants ---------------------------------------------------------------------------------------------------------


def caught(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def mutate_topk(monkeypatch, change):
    right = moba.moba_attention
    monkeypatch.setattr(moba, "moba_attention", lambda *args: right(*args[:-1], change(args[-1])))


def test_mutant_topk_1_becomes_full_attention(monkeypatch):
    mutate_topk(monkeypatch, lambda topk: 99 if topk == 1 else topk)
    assert_naive(ROWS["ragged"], 2)
    caught(assert_naive, ROWS["ragged"], 1)


def test_mutant_topk_does_not_count_the_own_block(monkeypatch):
    mutate_topk(monkeypatch, lambda topk: topk + 1)
    caught(assert_naive, ROWS["ragged"], 1)
    caught(assert_naive, ROWS["ragged"], 2)


def blocks_by_column(layout, size):
    length = layout.document_ids.shape[1]
    count = -(-length // size)
    return BlockTable(size, count, None, None, torch.zeros(1, count, dtype=torch.long))


@pytest.mark.parametrize("rows", ["padded on the left", "packed"])
def test_mutant_padding_shifts_the_blocks(rows, monkeypatch):
    monkeypatch.setattr(Documents, "block_table", blocks_by_column)
    assert_naive(ROWS["ragged"], 2)
    assert_naive_mask(ROWS["ragged"], 2)
    caught(assert_naive, ROWS[rows], 2)
    caught(assert_naive_mask, ROWS[rows], 2)


def test_mutant_padding_shifts_the_blocks_of_the_model(sparse_model, monkeypatch):
    monkeypatch.setattr(Documents, "block_table", blocks_by_column)
    caught(assert_padding_changes_nothing, sparse_model, "left")
    caught(assert_packing_changes_nothing, sparse_model)


def choose_any_block(q, k, table, n):
    means = k.unflatten(2, (table.count, table.size)).mean(3)
    return (q @ means.mT).topk(min(n, table.count), dim=-1).indices


def choose_other_sequences(q, k, table, n):
    table = dataclasses.replace(table, first=torch.zeros_like(table.first))
    return right_choose_blocks(q, k, table, n)


right_choose_blocks = moba.choose_blocks


def test_mutant_gates_open_to_the_future_and_to_other_documents(monkeypatch):
    monkeypatch.setattr(moba, "choose_blocks", choose_any_block)
    caught(assert_naive, ROWS["ragged"], 2)
    monkeypatch.setattr(moba, "choose_blocks", choose_other_sequences)
    assert_naive(ROWS["ragged"], 2)
    caught(assert_naive, ROWS["packed"], 2)


def test_mutant_merged_without_log_sum_exp(monkeypatch):
    def forward(*args, **kwargs):
        out, lse, top = attention.attend_forward(*args, **kwargs)
        return out, lse if kwargs["causal"] else torch.zeros_like(lse), top

    monkeypatch.setattr(moba, "attend_forward", forward)
    assert_naive(ROWS["ragged"], 1)
    caught(assert_naive, ROWS["ragged"], 2)


def test_mutant_gradient_of_a_part_as_if_it_were_the_whole(monkeypatch):
    def backward(d_out, along, probs, q, k, v, scale, causal):
        out = attention.attend_forward(q, k, v, scale, causal)[0]
        own = (d_out * out).sum(-1, keepdim=True)
        return attention.attend_backward(d_out, own, probs, q, k, v, scale, causal)

    monkeypatch.setattr(moba, "attend_backward", backward)
    assert_naive(ROWS["ragged"], 1)
    caught(assert_naive, ROWS["ragged"], 2)


def test_mutant_gradients_of_queries_that_only_fill_a_chunk(monkeypatch):
    def of(*args):
        chunks = right(*args)
        return dataclasses.replace(chunks, empty=torch.zeros_like(chunks.empty))

    right = moba.Chunks.line_up
    monkeypatch.setattr(moba.Chunks, "line_up", of)
    caught(assert_naive, ROWS["ragged"], 2)


def test_mutant_decoding_with_full_attention(sparse_model, monkeypatch):
    def everything(products, layout, block_size, topk):
        return moba_mask(products, layout, block_size, 99)

    moba_mask = moba.moba_mask
    monkeypatch.setattr("moonwhale.model.core.moba_mask", everything)
    caught(assert_decoding_is_prefill, sparse_model, PIECES[0])


def test_mutant_key_conv_reads_other_documents_and_padding(sparse_model, monkeypatch):
    right = MultiheadLatentAttention._convolved

    def convolved(self, latent, layout):
        offset = torch.arange(latent.shape[2]).expand_as(layout.positions)
        return right(self, latent, dataclasses.replace(layout, positions=offset))

    monkeypatch.setattr(MultiheadLatentAttention, "_convolved", convolved)
    caught(assert_packing_changes_nothing, sparse_model)
    caught(assert_padding_changes_nothing, sparse_model, "left")


def test_mutant_key_conv_looks_ahead(sparse_model, monkeypatch):
    right = MultiheadLatentAttention._convolved
    monkeypatch.setattr(MultiheadLatentAttention, "_convolved", lambda *args: right(*args).roll(-1, 2))
    caught(assert_key_conv_is_causal, sparse_model)


def test_mutant_key_conv_of_the_new_token_alone(sparse_model, monkeypatch):
    convolved, absorbed = MultiheadLatentAttention._convolved, MultiheadLatentAttention._absorbed

    def without_past(self, latent, layout):
        offset = layout.positions.clone()
        offset[:, -1] = 0
        return convolved(self, latent, dataclasses.replace(layout, positions=offset))

    def absorb(*args):
        with monkeypatch.context() as patch:
            patch.setattr(MultiheadLatentAttention, "_convolved", without_past)
            return absorbed(*args)

    monkeypatch.setattr(MultiheadLatentAttention, "_absorbed", absorb)
    caught(assert_decoding_is_prefill, sparse_model, PIECES[0])
