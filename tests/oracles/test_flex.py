"""The GPU's attention, computed by flex_attention's own reference on a CPU, against MoBA's algorithm by hand.

The reference reads only a mask's function, not its lists of tiles. Here the lists are compared with the function, and
the forward pass of the CPU's one kernel reads them.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torch_flex

from moonwhale.model import Documents, flex, moba
from moonwhale.model.compiling import compile_unsupported_reason
from oracles.test_moba import HEADS, ROWS, SCALE, SIZE, WIDTH, caught, close, heads_of, naive, normal, read

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Allow gradients and largest scores, which CPUs refuse although the reference has them. Sizes are static."""

    def options(query, key, value, return_lse, kernel_options, return_aux=None):
        return {"BACKEND": "AUTO", "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": True}

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_apply_kernel_options", options)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attention)
    monkeypatch.setattr(moba, "needs_static_shapes", lambda device: True)
    monkeypatch.setattr(flex, "_has_flex", lambda q, v: True)
    monkeypatch.setattr(flex, "FLEX_TILE", 2)


@pytest.fixture
def masks(monkeypatch):
    """Records every BlockMask in use, its numbers of rows and heads, and its queries, keys and values."""
    seen, right = [], flex._flex

    def recorded(q, k, v, scale, mask):
        seen.append((mask, q.shape[:2], (q, k, v)))
        return right(q, k, v, scale, mask)

    monkeypatch.setattr(flex, "_flex", recorded)
    return seen


@pytest.mark.parametrize(
    ("width", "kib", "options"),
    [(64, 64, None), (96, 64, "SMALL"), (96, 227, None), (192, 99, "SMALL"), (192, 227, "WIDE")],
)
def test_fp32_tiles_fit_the_gpus_shared_memory(width, kib, options, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    given, aux = [], SimpleNamespace(lse=None, max_scores=None)
    monkeypatch.setattr(flex, "flex_attention", lambda *_, kernel_options, **__: (given.append(kernel_options), aux))
    on_gpu = SimpleNamespace(dtype=torch.float32, shape=(1, 1, 8, width), device=torch.device("cuda", 0))
    flex._flex(on_gpu, None, None, 1.0, None)
    assert given == [options and getattr(flex, f"{options}_FP32")]


def test_the_shared_memory_is_a_constant_in_a_graph(monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    compiled = torch.compile(lambda x: x + 1 if flex._shared_memory(0) < 10**6 else x, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 1


def assert_naive(rows, topk):
    """Compare output, largest logits and all three gradients at every token that is not padding."""
    layout, documents = read(rows)
    real = layout.valid[:, None].expand(-1, HEADS, -1)
    q, k, v = heads_of(layout)
    k, results = k[..., :WIDTH], []
    for function in (
        lambda *qkv: flex.attention(*qkv, SCALE, layout, SIZE, topk),
        lambda *qkv: naive(*qkv, documents, topk or 99),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, top = function(*inputs)
        (out * normal(*out.shape, seed=9))[real].sum().backward()
        results.append([out[real], top[real], *(x.grad for x in inputs)])
    for name, ours, oracle in zip(("out", "top", "dq", "dk", "dv"), *results, strict=True):
        assert close(ours, oracle), name


@pytest.mark.parametrize("way", ["short", "long", "in a graph elsewhere"])
@pytest.mark.parametrize("topk", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_flex_equals_moba(rows, topk, way, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0 if way == "long" else 99)
    monkeypatch.setattr(flex, "_has_flex", lambda q, v: way != "in a graph elsewhere")
    assert_naive(rows, topk)


def pairs(tiles_of_row, row_of_tiles, n_columns):
    """Return how often a list of tiles names each (row, column), (heads, rows, columns)."""
    found = torch.zeros(*row_of_tiles.shape[:3], n_columns, dtype=torch.int)
    for *row, index in torch.cartesian_prod(*(torch.arange(n) for n in row_of_tiles.shape)).tolist():
        if index < tiles_of_row[tuple(row)]:
            found[(*row, row_of_tiles[(*row, index)])] += 1
    return found


def assert_lists_agree(mask, heads):
    """In a tile listed as full every pair is visible, and in a tile that is not listed none is. The lists by query and
    by key name the same tiles. Partial and full lists are laid out alike, because torch 2.11's kernels read both by the
    strides of the partial ones.
    """
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        partial, whole = getattr(mask, name), getattr(mask, f"full_{name}")
        assert partial.shape == whole.shape and partial.is_contiguous() and whole.is_contiguous(), name
    n_queries, n_keys = (n // flex.FLEX_TILE for n in mask.seq_lengths)
    dense = torch_flex.create_mask(mask.mask_mod, *heads, *mask.seq_lengths, device="cpu")
    dense = dense.unflatten(3, (n_keys, -1)).unflatten(2, (n_queries, -1))
    part = pairs(mask.kv_num_blocks, mask.kv_indices, n_keys)
    full = pairs(mask.full_kv_num_blocks, mask.full_kv_indices, n_keys)
    assert torch.equal(part, pairs(mask.q_num_blocks, mask.q_indices, n_queries).mT)
    assert torch.equal(full, pairs(mask.full_q_num_blocks, mask.full_q_indices, n_queries).mT)
    assert (part + full <= 1).all()
    assert dense.all(5).all(3)[full.expand(*heads, -1, -1) == 1].all(), "a tile that is not whole"
    assert not dense.any(5).any(3)[(part + full).expand(*heads, -1, -1) == 0].any(), "a tile that is left out"


@pytest.mark.parametrize("context", ["short", "long"])
@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("rows", ["whole blocks", "packed and padded"])
def test_the_lists_of_tiles_agree_with_the_mask(rows, topk, context, masks, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0 if context == "long" else 99)
    assert_naive(ROWS[rows], topk)
    assert len(masks) == (2 if context == "long" and topk else 1)
    for mask, heads, _ in masks:
        assert_lists_agree(mask, heads)


@pytest.mark.parametrize("context", ["short", "long"])
@pytest.mark.parametrize("topk", [0, 3])
def test_blocks_go_on_across_padding(topk, context, masks, monkeypatch):
    """Padding inside a document is no key, takes no place in a block, and is in no tile that is listed as full."""
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0 if context == "long" else 99)
    real = torch.ones(1, 20, dtype=torch.bool)
    real[:, 5:8] = False
    padded = Documents.from_inputs(1, 20, "cpu", real, (real.cumsum(1) - 1).clamp(min=0))
    q, k, v = (normal(1, HEADS, 20, width, seed=width) for width in (WIDTH, WIDTH, 5))
    found = flex.attention(q, k, v, SCALE, padded, SIZE, topk)
    for mask, heads, _ in masks:
        assert_lists_agree(mask, heads)
    whole = Documents.from_inputs(1, 17, "cpu")
    expected = flex.attention(*(x[:, :, real[0]] for x in (q, k, v)), SCALE, whole, SIZE, topk)
    for ours, theirs in zip(found, expected, strict=True):
        assert close(ours[:, :, real[0]], theirs)


def test_a_long_context_reads_as_many_tiles_as_were_chosen(masks, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0)
    layout, _ = read([[64]])
    q, k, v = (normal(1, HEADS, 64, width, seed=width) for width in (WIDTH, WIDTH, 5))
    flex.attention(q, k, v, SCALE, layout, SIZE, 3)
    (own, *_), (far, *_) = masks
    assert (own.kv_num_blocks + own.full_kv_num_blocks).sum() == 16 * 3, "of 2 x 2 tiles of a block, three"
    pairs_chosen = HEADS * SIZE * (1 + 2 * 14)
    tiles = far.full_kv_num_blocks.sum() * flex.FLEX_TILE**2
    assert pairs_chosen * SIZE <= tiles <= (pairs_chosen + HEADS * 16) * SIZE, "all, and at most a query more a block"


@pytest.mark.skipif(
    bool(compile_unsupported_reason(torch.device("cpu"))), reason=compile_unsupported_reason(torch.device("cpu")) or "-"
)
@pytest.mark.slow
def test_a_kernel_that_reads_the_lists_computes_the_same(masks, monkeypatch):
    """This runs the forward pass of the CPU's kernel, which needs lists with room for every tile of keys."""
    monkeypatch.setattr(flex, "FLEX_TILE", 128)
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0)
    layout, _ = read([[1024]])
    q, k, v = (normal(1, HEADS, 1024, 32, seed=i).float() for i in range(3))
    flex.attention(q, k, v, SCALE, layout, 256, 3)
    monkeypatch.undo()
    torch._dynamo.reset()
    kernel = torch.compile(torch_flex.flex_attention)
    for mask, heads, (q, k, v) in masks:
        seen = torch_flex.create_mask(mask.mask_mod, *heads, *mask.seq_lengths, device="cpu")
        for name in ("kv_indices", "full_kv_indices"):
            listed = getattr(mask, name)
            setattr(mask, name, F.pad(listed, (0, k.shape[2] // 128 - listed.shape[-1])).contiguous())
        expected = (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ v
        torch.testing.assert_close(kernel(q, k, v, block_mask=mask, scale=SCALE), expected, rtol=1e-4, atol=1e-4)
    assert len(masks) == 2


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_mutant_blocks_counted_by_row_instead_of_sequence(monkeypatch):
    right = flex.StaticBlockTable.build

    def of(segment, offset, size):
        return right(segment, torch.arange(segment.shape[1]).expand_as(segment), size)

    monkeypatch.setattr(flex.StaticBlockTable, "build", of)
    assert_naive(ROWS["whole blocks"], 2)
    caught(assert_naive, ROWS["packed"], 2)


def test_mutant_merged_without_log_sum_exp(monkeypatch):
    right = flex._flex
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0)
    monkeypatch.setattr(flex, "_flex", lambda *args: (right(*args)[0], right(*args)[1] * 0, right(*args)[2]))
    assert_naive(ROWS["ragged"], 1)
    caught(assert_naive, ROWS["ragged"], 2)


def test_mutant_missing_tile(masks, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0)
    assert_naive(ROWS["whole blocks"], 3)
    mask, heads, _ = masks[1]
    mask.full_q_num_blocks[0, 0, 0] -= 1
    caught(assert_lists_agree, mask, heads)
