"""Attention whose sizes the data do not decide: for a GPU, which would have to be waited for, and for compiled graphs.

On an NVIDIA GPU it is block-sparse `flex_attention`: only tiles of 128 x 128 in which some query attends to some key,
and each query's largest logit from the same kernel. Each query has its own blocks, though, and 128 queries together
nearly all. In a short context every query all the same sees its blocks through a mask; in a long one queries are lined
up by the blocks they chose, and the parts merged. Neither was measured on a GPU yet.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .documents import Documents, _take
from .moba import Chunks

TILE = 128
LONG = 8  # times topk * block_size tokens make a context long


def serves(q: Tensor, documents: Documents) -> bool:
    """Whether this is the way: in a graph, and in training on CUDA (a prompt of any length would be compiled anew)."""
    if q.shape[2] != documents.segment.shape[1]:
        return False
    return torch.compiler.is_compiling() or (q.device.type == "cuda" and torch.is_grad_enabled())


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents, block_size: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Attention of q, k (B, H, T, D) and v (B, H, T, Dv) over MoBA's blocks, or full where `topk` is 0.

    Returns:
        out (B, H, T, Dv), and each query's largest scaled logit (B, H, T) in fp32.
    """
    run = _attention if torch.compiler.is_compiling() else _compiled()
    return run(q, k, v, documents.segment, documents.offset, scale, block_size, topk)


def _attention(q, k, v, segment, offset, scale, block_size, topk) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    missing = -length % TILE
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    segment, offset = F.pad(segment, (0, missing), value=-1), F.pad(offset, (0, missing))
    blocks = Blocks.of(segment, offset, block_size if topk else len(segment[0]))  # full attention: one block a sequence
    chosen = blocks.choose(q, k, topk - 1) if topk > 1 and length > block_size else None
    lined_up = chosen is not None and _has_flex(q) and block_size % TILE == 0 and length > LONG * topk * block_size
    out, top = _gathered(q, k, v, scale, blocks, chosen) if lined_up else _masked(q, k, v, scale, blocks, chosen)[::2]
    return out[:, :, :length], top[:, :, :length].detach()


@cache
def _compiled():
    return torch.compile(_attention, dynamic=False)


def _has_flex(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.shape[-1] >= 16  # the least width of its kernels


@dataclass
class Blocks:
    """MoBA's blocks of S tokens. Only whole ones can be chosen, and of these there are at most T // S in a row."""

    size: int
    own: Tensor  # (B, T) first token of each token's own block
    whole: Tensor  # (B, T) number of the whole block that a token is in; `count` if it is in none
    first: Tensor  # (B, count) first token of each whole block; T where there are fewer
    segment: Tensor  # (B, T)

    @property
    def count(self) -> int:
        return self.first.shape[1]

    @classmethod
    def of(cls, segment: Tensor, offset: Tensor, size: int) -> "Blocks":
        batch, length = segment.shape
        count, index = length // size, torch.arange(length, device=segment.device).expand(batch, -1)
        own = index - offset % size
        last = F.pad(segment, (0, size), value=-2)[:, size - 1 : size - 1 + length]
        opens = (offset % size == 0) & (segment >= 0) & (last == segment)
        number = torch.where(opens, opens.cumsum(1) - 1, count)
        first = torch.full((batch, count + 1), length, device=segment.device).scatter_(1, number, index)
        return cls(size, own, number.gather(1, own), first[:, :-1], segment)

    def take(self, x: Tensor) -> Tensor:
        """Tokens (B, H, T, D) of the whole blocks, (B, H, count * S, D)."""
        index = self.first[..., None] + torch.arange(self.size, device=x.device)
        return _take(x, index.clamp(max=x.shape[2] - 1).flatten(1))

    def choose(self, q: Tensor, k: Tensor, n: int) -> Tensor:
        """The `n` earlier blocks with the best gates, (B, H, T, n); -1 where there are fewer."""
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            gates = q.float() @ self.take(k).float().unflatten(2, (self.count, -1)).mean(3).mT
            segment = self.segment.gather(1, self.first.clamp(max=q.shape[2] - 1))
            earlier = (self.first[:, None] < self.own[..., None]) & (segment[:, None] == self.segment[..., None])
            values, index = gates.masked_fill_(~earlier[:, None], -torch.inf).topk(min(n, self.count), dim=-1)
            return index.masked_fill(values == -torch.inf, -1)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Blocks, chosen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Own blocks and the chosen ones (B, H, T, n) through a mask; out (B, H, T, Dv), log-sum-exp and largest logit."""
    own, whole = blocks.own, blocks.whole

    def mask(b, h, query, key):
        seen = (own[b, query] == own[b, key]) & (query >= key)
        for j in range(0 if chosen is None else chosen.shape[-1]):
            seen = seen | (chosen[b, h, query, j] == whole[b, key])
        return seen

    if not _has_flex(q):
        return _dense(q, k, v, scale, mask)
    length = q.shape[2]
    tile = torch.arange(length // TILE, device=q.device)
    begins = own.unflatten(1, (-1, TILE))  # of the blocks of each tile's queries
    earlier = tile[:, None] >= tile
    seen = (earlier & (begins.amin(2)[..., None] // TILE <= tile))[:, None]  # (B, 1, T / TILE, T / TILE)
    full = ((tile[:, None] > tile) & (begins.amax(2)[..., None] <= tile * TILE))[:, None]
    if chosen is not None:
        taken = chosen.new_zeros(*chosen.shape[:2], len(tile), blocks.count + 1, dtype=torch.float32)
        by_tile = chosen.masked_fill(chosen < 0, blocks.count).unflatten(2, (-1, TILE)).flatten(3)
        taken = taken.scatter_(3, by_tile, 1.0)[..., :-1]
        begin, end = blocks.first[..., None] // TILE, (blocks.first[..., None] + blocks.size - 1) // TILE
        covers = ((begin <= tile) & (tile <= end)).float()  # (B, count, T / TILE)
        seen = seen | (taken @ covers[:, None] > 0)
    partly = BlockMask.from_kv_blocks(
        *_listed(seen & ~full), *_listed(full.expand_as(seen)), TILE, mask, seq_lengths=(length, length)
    )
    return _flex(q, k, v, scale, partly)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Of (…, rows, columns): how many tiles of each row are set, and their columns, first."""
    return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
    out, aux = flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True, max_scores=True))
    return out, aux.lse, aux.max_scores


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, mask) -> tuple[Tensor, Tensor, Tensor]:
    """What `_flex` gives, with all scores at once."""
    sizes = (*q.shape[:3], k.shape[2])
    seen = mask(*(torch.arange(n, device=q.device)[(..., *[None] * (3 - i))] for i, n in enumerate(sizes)))
    logits = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).to(v.dtype) @ v, logits.logsumexp(-1), logits.amax(-1)


def _gathered(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Blocks, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The same in two parts, own blocks, and queries lined up by the block they chose, merged by their log-sum-exp."""
    own_out, own_lse, own_top = _masked(q, k, v, scale, blocks, None)
    chunks = Chunks.of(chosen, blocks.count, TILE)
    place, missing, empty = chunks.place, chunks.missing, chunks.empty.view(-1, 1)
    pair = torch.zeros(len(empty) + 1, dtype=torch.long, device=q.device)  # that sits in each row
    pair.scatter_(0, place.masked_fill(missing, len(empty)).flatten(), torch.arange(place.numel(), device=q.device))

    def home(rows: Tensor) -> Tensor:
        return _Take.apply(rows, place.flatten(), pair[:-1, None], empty).unflatten(0, place.shape)

    queries = _Take.apply(q.flatten(0, 2), chunks.query.flatten(), place, missing)
    far = (queries, *(blocks.take(x).flatten(0, 2) for x in (k, v)))
    parts = _flex(*(x[None, None] for x in far), scale, _chunk_mask(chunks, blocks.size, len(far[1]), q.shape[2]))
    far_out, far_lse, far_top = (home(x[0, 0]) for x in parts)
    far_lse, far_top = (x.masked_fill(missing, -torch.inf) for x in (far_lse, far_top))
    weights = torch.cat([own_lse.reshape(-1, 1), far_lse], dim=1).softmax(1)[..., None]
    out = own_out.flatten(0, 2) * weights[:, 0] + (far_out * weights[:, 1:]).sum(1)
    return out.to(v.dtype).view_as(own_out), torch.maximum(own_top, far_top.amax(1).view_as(own_top))


class _Take(torch.autograd.Function):
    """Rows `index` of x. The gradient is taken in the same way, not added up by atomics: row i of x went to the places
    back[i], but for those that are absent.
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
    """Every chunk attends to all tiles of its block, and an unused one to none.

    Written out from both sides: BlockMask would find the second by a matrix of all chunks and all keys.
    """
    device, groups, m = chunks.block.device, n_keys // size, size // TILE
    used = ~chunks.empty[:, 0]
    owner = torch.where(used, chunks.block, groups)
    begin = torch.searchsorted(owner, torch.arange(groups + 1, device=device))  # of each block's chunks
    per_block, most = begin.diff(), torch.arange(-(-length // TILE), device=device)
    key_tiles = chunks.block[:, None] * m + torch.arange(m, device=device)
    query_tiles = (begin[:-1, None] + most).clamp(max=len(owner) - 1)
    full_keys, full_queries = (used * m, key_tiles), (x.repeat_interleave(m, 0) for x in (per_block, query_tiles))
    none_of = [(x.new_zeros(len(x)), x.new_zeros(len(x), 1)) for x in (owner, begin[:-1].repeat_interleave(m))]
    lists = (*none_of[0], *full_keys, *none_of[1], *full_queries)
    return BlockMask(
        (len(owner) * TILE, n_keys),
        *(x.int().contiguous()[None, None] for x in lists),
        (TILE, TILE),
        lambda b, h, query, key: owner[query // TILE] == key // size,
    )
