"""Attention with data-independent shapes, for training on CUDA (no host sync) and for torch.compile.

On an NVIDIA GPU it uses block-sparse `flex_attention`, which computes only tiles of 128 x 128 in which some query
attends to some key, and gives each query's largest logit from the same kernel.

Each query chooses its own MoBA blocks, so 128 neighbouring queries together choose nearly all of them. In a short
context the tiles cover all these blocks, and a mask hides what a query did not choose. In a long context queries are
lined up by the block they chose, as in moba.py, and the parts are merged. Neither was measured on a GPU yet.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .compiling import triton_unsupported_reason
from .documents import Documents, take_rows
from .moba import Chunks
from .thresholds import LONG_CONTEXT

FLEX_TILE = 128  # queries, and keys, per tile of flex_attention
# Tiles of the forward kernel for fp32 heads wider than 128, as torch 2.13 has them on Hopper for 192. On paper, those
# that torch 2.11 takes there, and both on Ampere, need more shared memory than there is.
WIDE_FP32 = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 64, "fwd_num_stages": 1, "fwd_num_warps": 8}
# And tiles for fp32 heads wider than 64 on GPUs with little shared memory, such as the T4 (64 KiB a block) and the RTX
# 3090 and 4090 (99 KiB): on paper, torch's own tiles need 80 KiB and more there.
SMALL_FP32 = {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}
LITTLE_SHARED_MEMORY = 160 << 10  # bytes per block; the A100 and its large successors have more
MAX_GRAPHS = 64  # compiled graphs of attention, of different lengths and settings


def serves(q: Tensor, documents: Documents) -> bool:
    """Return whether attention should take this path: while a graph is compiled, and in training on CUDA.

    Inference on CUDA takes the other paths, since every prompt length would be compiled anew. So does a GPU for which
    nothing can be compiled.
    """
    if q.shape[2] != documents.document_ids.shape[1]:
        return False
    if torch.compiler.is_compiling():
        return True
    return q.device.type == "cuda" and torch.is_grad_enabled() and can_compile(q.device)


@cache
def can_compile(gpu: torch.device) -> bool:
    """Return whether torch can compile for this GPU. It asks only once, since each forward pass of a block does."""
    return not triton_unsupported_reason(gpu)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Compute attention of q, k (B, H, T, D) and v (B, H, T, Dv) over MoBA's blocks, or full attention if `topk` is 0.

    Returns:
        out (B, H, T, Dv), and the largest scaled logit of each query (B, H, T) in fp32.
    """
    if torch.compiler.is_compiling():
        return _attention(q, k, v, documents.document_ids, documents.ranks, scale, block_size, topk)
    length = q.shape[2]
    missing = compiled_length(length) - length
    padded = _padded(q, k, v, documents.document_ids, documents.ranks, missing)
    out, max_logit = _compiled()(*padded, scale, block_size, topk)
    return out[:, :, :length], max_logit[:, :, :length]


def compiled_length(length: int) -> int:
    """Return the length to which rows are padded: a power of two of tiles.

    Each length is compiled anew, and GRPO's answers have a new one in nearly every batch. Tiles of padding cost
    little, because no query attends to them.
    """
    return FLEX_TILE << (-(-length // FLEX_TILE) - 1).bit_length()


def _padded(q, k, v, document_ids, ranks, missing: int) -> tuple[Tensor, ...]:
    if not missing:
        return q, k, v, document_ids, ranks
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    return q, k, v, F.pad(document_ids, (0, missing), value=-1), F.pad(ranks, (0, missing))


def _attention(q, k, v, document_ids, ranks, scale, block_size, topk) -> tuple[Tensor, Tensor]:
    """Compute `attention` for rows of any length. `document_ids` and `ranks` are those of `Documents`, both (B, T)."""
    length = q.shape[2]
    # (B, H, T', D) and (B, T'), with T' a multiple of FLEX_TILE
    q, k, v, document_ids, ranks = _padded(q, k, v, document_ids, ranks, -length % FLEX_TILE)
    # Full attention is one block that holds a whole document.
    table = StaticBlockTable.build(document_ids, ranks, block_size if topk else len(document_ids[0]))
    chosen = table.choose(q, k, topk - 1) if topk > 1 and length > block_size else None

    is_long = length > LONG_CONTEXT * topk * block_size
    if chosen is not None and is_long and _has_flex(q, v) and block_size % FLEX_TILE == 0:
        out, max_logit = _lined_up(q, k, v, scale, table, chosen)
    else:
        out, _, max_logit = _masked(q, k, v, scale, table, chosen)
    return out[:, :, :length], max_logit[:, :, :length].detach()


@cache
def _compiled():
    # By default torch keeps 8 graphs of a function and then runs it uncompiled. Here each `compiled_length` has two,
    # with and without MoBA. (An argument of torch.compile could say so from torch 2.12 on.)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    return torch.compile(_attention, dynamic=False)


def _has_flex(q: Tensor, v: Tensor) -> bool:
    least = min(q.shape[-1], v.shape[-1])
    return q.device.type == "cuda" and least >= 16  # the least head width of its kernels


@dataclass
class StaticBlockTable:
    """MoBA's blocks of S tokens, in shapes that only B and T decide.

    Only full blocks can be chosen, since a block that a later query sees is full. A row has at most T // S of them.
    """

    size: int  # S
    own: Tensor  # (B, T) first token of each token's own block; of padding, its own index
    full_block: Tensor  # (B, T) index of the full block that a token is in, `count` if it is in none
    token: Tensor  # (B, count * S) the tokens of each full block, T where a row has fewer
    document_ids: Tensor  # (B, T)

    @property
    def count(self) -> int:
        return self.token.shape[1] // self.size

    @property
    def first(self) -> Tensor:
        """The first token of each full block (B, count), T where a row has fewer."""
        return self.token[:, :: self.size]

    @classmethod
    def build(cls, document_ids: Tensor, ranks: Tensor, size: int) -> "StaticBlockTable":
        """Find the blocks from `Documents`' document ids and ranks, both (B, T)."""
        batch, length = document_ids.shape
        count, index = length // size, torch.arange(length, device=document_ids.device).expand(batch, -1)
        real = document_ids >= 0
        opens_block = real & (ranks % size == 0)
        own = torch.where(real, torch.where(opens_block, index, 0).cummax(1).values, index)
        n_tokens = torch.zeros_like(own).scatter_add_(1, own, real.long())  # of the block that a token opens
        opens_full_block = opens_block & (n_tokens == size)
        number = torch.where(opens_full_block, opens_full_block.cumsum(1) - 1, count)
        full_block = number.gather(1, own)
        # Tokens of no full block go to one extra block, which is cut off.
        token = torch.full((batch, (count + 1) * size), length, device=document_ids.device)
        token.scatter_(1, full_block * size + ranks % size, index)
        return cls(size, own, full_block, token[:, : count * size], document_ids)

    def take(self, x: Tensor) -> Tensor:
        """Gather the tokens of full blocks from x (B, H, T, D): (B, H, count * S, D)."""
        return take_rows(x, self.token.clamp(max=x.shape[2] - 1))

    def choose(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        """Return the `n` earlier blocks with the largest gates, (B, H, T, n), and -1 where there are fewer."""
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            means = self.take(k).float().unflatten(2, (self.count, -1)).mean(3)  # (B, H, count, D)
            gates = q.float() @ means.mT  # (B, H, T, count)
            ids = self.document_ids.gather(1, self.first.clamp(max=q.shape[2] - 1))  # (B, count)
            same_document = ids[:, None] == self.document_ids[..., None]
            earlier = (self.first[:, None] < self.own[..., None]) & same_document  # (B, T, count)
            values, index = gates.masked_fill_(~earlier[:, None], -torch.inf).topk(min(n, self.count), dim=-1)
            return index.masked_fill(values == -torch.inf, -1)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: StaticBlockTable, chosen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to own blocks and to the `chosen` ones (B, H, T, n) through a mask.

    Returns:
        out (B, H, T, Dv), the log-sum-exp, and the largest logit of each query, both (B, H, T).
    """
    own, full_block = table.own, table.full_block

    def mask(b, h, query, key):
        visible = (own[b, query] == own[b, key]) & (query >= key)
        for j in range(0 if chosen is None else chosen.shape[-1]):
            visible = visible | (chosen[b, h, query, j] == full_block[b, key])
        return visible

    if not _has_flex(q, v):
        return _dense(q, k, v, scale, mask)
    return _flex(q, k, v, scale, _tile_mask(table, chosen, mask, q.shape[2]))


def _tile_mask(table: StaticBlockTable, chosen: Tensor | None, mask, length: int) -> BlockMask:
    """List the tiles in which some query sees some key, and among them those in which every query sees every key."""
    tile = torch.arange(length // FLEX_TILE, device=table.own.device)
    own_begins = table.own.unflatten(1, (-1, FLEX_TILE))  # (B, T / tile, tile)
    earlier = tile[:, None] >= tile
    visible = (earlier & (own_begins.amin(2)[..., None] // FLEX_TILE <= tile))[:, None]  # (B, 1, T / tile, T / tile)
    unpadded = (table.document_ids >= 0).unflatten(1, (-1, FLEX_TILE)).all(2)[:, None]  # (B, 1, T / tile)
    full = (unpadded & (tile[:, None] > tile) & (own_begins.amax(2)[..., None] <= tile * FLEX_TILE))[:, None]
    if chosen is not None:
        by_tile = chosen.masked_fill(chosen < 0, table.count).unflatten(2, (-1, FLEX_TILE)).flatten(3)
        taken = chosen.new_zeros(*chosen.shape[:2], len(tile), table.count + 1, dtype=torch.float32)
        taken = taken.scatter_(3, by_tile, 1.0)[..., :-1]  # (B, H, T / tile, count)
        begin, last = (table.token[:, i :: table.size, None] // FLEX_TILE for i in (0, table.size - 1))
        covers = ((begin <= tile) & (tile <= last)).float()  # (B, count, T / tile)
        visible = visible | (taken @ covers[:, None] > 0)
    partial, full = visible & ~full, full.expand_as(visible)
    lists = [listed for tiles in (partial, full, partial.mT, full.mT) for listed in _list_tiles(tiles)]
    return BlockMask((length, length), *_contiguous(lists), (FLEX_TILE, FLEX_TILE), mask)


def _list_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of booleans (…, rows, columns), return how many are set, and the columns with the set ones first."""
    return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()


@torch.library.custom_op("moonwhale::contiguous", mutates_args=())
def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    """Copy lists of tiles to contiguous tensors, also in a graph.

    flex_attention's kernels take contiguous lists for granted, but torch 2.11's compiler may lay out what it computes
    in another order. It leaves the result of an operator that it does not know as it is.
    """
    return [x.clone(memory_format=torch.contiguous_format) for x in tensors]


@_contiguous.register_fake
def _(tensors):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _shared_memory(gpu: int) -> int:
    """Return the bytes of shared memory that a block of threads may ask for."""
    return torch.cuda.get_device_properties(gpu).shared_memory_per_block_optin


# A constant in a graph: what `torch.compiler.assume_constant_result` does, which takes a second to import.
_shared_memory._dynamo_marked_constant = True


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention of q (B, H, Tq, D) to k (B, H, Tk, D) and v (B, H, Tk, Dv) with torch's kernel.

    Returns:
        out (B, H, Tq, Dv), and the log-sum-exp and the largest scaled logit of each query, both (B, H, Tq) in fp32.
    """
    aux, options = AuxRequest(lse=True, max_scores=True), None
    if q.dtype == torch.float32 and 64 < q.shape[-1] <= 256:
        if q.device.type == "cuda" and _shared_memory(q.device.index) < LITTLE_SHARED_MEMORY:
            options = SMALL_FP32
        elif q.shape[-1] > 128:
            options = WIDE_FP32
    out, aux = flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=aux, kernel_options=options)
    return out, aux.lse, aux.max_scores


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, mask) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_flex` does, from the whole score matrix."""
    sizes = (*q.shape[:3], k.shape[2])
    visible = mask(*(torch.arange(n, device=q.device)[(..., *[None] * (3 - i))] for i, n in enumerate(sizes)))
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    logits = logits.masked_fill(~visible, -torch.inf)  # (B, H, T, T)
    return logits.softmax(-1).to(v.dtype) @ v, logits.logsumexp(-1), logits.amax(-1)


def _lined_up(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: StaticBlockTable, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the same in two parts, merged by their log-sum-exp: own blocks, and queries lined up by chosen block."""
    own_out, own_lse, own_max = _masked(q, k, v, scale, table, None)
    chunks = Chunks.line_up(chosen, table.count, FLEX_TILE, static_shapes=True)
    place, missing = chunks.place, chunks.missing

    def to_queries(rows: Tensor) -> Tensor:
        taken = _Take.apply(rows, place.flatten(), chunks.pair.view(-1, 1), chunks.empty.view(-1, 1))
        return taken.unflatten(0, place.shape)

    queries = _Take.apply(q.flatten(0, 2), chunks.query.flatten(), place, missing)  # (C * tile, D)
    far_k, far_v = (table.take(x).flatten(0, 2) for x in (k, v))  # (B * H * count * S, D)
    mask = _chunk_mask(chunks, table.size, len(far_k), q.shape[2])
    far = _flex(*(x[None, None] for x in (queries, far_k, far_v)), scale, mask)
    far_out, far_lse, far_max = (to_queries(x[0, 0]) for x in far)  # (B * H * T, n, …)
    far_lse, far_max = (x.masked_fill(missing, -torch.inf) for x in (far_lse, far_max))

    weights = torch.cat([own_lse.reshape(-1, 1), far_lse], dim=1).softmax(1)[..., None]
    out = own_out.flatten(0, 2) * weights[:, 0] + (far_out * weights[:, 1:]).sum(1)
    return out.to(v.dtype).view_as(own_out), torch.maximum(own_max, far_max.amax(1).view_as(own_max))


class _Take(torch.autograd.Function):
    """Takes rows `index` of x. Its gradient is gathered too, where autograd's would be added up by atomics.

    Row i of x was taken to the places `back[i]`, of which those marked in `absent` do not count.
    """

    @staticmethod
    def forward(ctx, x, index, back, absent):
        ctx.save_for_backward(back, absent)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, d_rows):
        back, absent = ctx.saved_tensors
        d_x = d_rows.index_select(0, back.flatten()).unflatten(0, back.shape)
        return d_x.masked_fill(absent.view(*absent.shape, *[1] * (d_x.ndim - 2)), 0.0).sum(1), None, None, None


def _chunk_mask(chunks: Chunks, size: int, n_keys: int, length: int) -> BlockMask:
    """Let every chunk attend to all tiles of its block, and an unused chunk to none.

    Both lists of tiles, by query and by key, are written out here. BlockMask would find the second one through a matrix
    of all chunks and all keys. Both partial lists are empty, but as wide as the full ones: torch 2.11's kernels find a
    row of a full list by the strides of the partial one.
    """
    device, n_blocks, tiles_per_block = chunks.block.device, n_keys // size, size // FLEX_TILE
    used = ~chunks.empty[:, 0]
    owner = torch.where(used, chunks.block, n_blocks)  # (C,)
    begin = torch.searchsorted(owner, torch.arange(n_blocks + 1, device=device))  # first chunk of each block
    chunks_per_block, most = begin.diff(), torch.arange(-(-length // FLEX_TILE), device=device)
    key_tiles = chunks.block[:, None] * tiles_per_block + torch.arange(tiles_per_block, device=device)
    query_tiles = (begin[:-1, None] + most).clamp(max=len(owner) - 1)
    full_keys = used * tiles_per_block, key_tiles
    full_queries = [x.repeat_interleave(tiles_per_block, 0) for x in (chunks_per_block, query_tiles)]
    no_partial_keys, no_partial_queries = ([torch.zeros_like(x) for x in full] for full in (full_keys, full_queries))
    lists = (*no_partial_keys, *full_keys, *no_partial_queries, *full_queries)
    return BlockMask(
        (len(owner) * FLEX_TILE, n_keys),
        *_contiguous([x.int()[None, None] for x in lists]),
        (FLEX_TILE, FLEX_TILE),
        lambda b, h, query, key: owner[query // FLEX_TILE] == key // size,
    )
