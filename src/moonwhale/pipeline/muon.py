"""MuonClip over several ranks: each orthogonalises its share of the matrices, and all make the step that one would.

Newton-Schulz is what Muon costs; momenta and AdamW are cheap, and stay with whoever has the weights.
"""

from bisect import bisect_left
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from moonwhale.optim.muonclip import MuonClip


class SharedMuonClip(MuonClip):
    """MuonClip for weights that all ranks of `group` have, with the same gradients; None: this process is alone.

    Weights and momenta stay those of one process, bit for bit where a product's bits don't depend on how many
    matrices are multiplied at once (on CPUs they don't).
    """

    def __init__(self, params, *, group: dist.ProcessGroup | None = None, **settings):
        super().__init__(params, **settings)
        self.group = group

    def _orthogonalise(self, updates: list[Tensor], split: int, dtype: torch.dtype) -> list[Tensor]:
        if self.group is None or dist.get_world_size(self.group) == 1:
            return super()._orthogonalise(updates, split, dtype)
        matrices = [m for update in updates for m in update.reshape(-1, update.size(-2) // split, update.size(-1))]
        shares = equal_shares([cost(m) for m in matrices], dist.get_world_size(self.group))
        flat = torch.empty(sum(m.numel() for m in matrices), dtype=dtype, device=matrices[0].device)
        parts = flat.split([sum(m.numel() for m in matrices[share]) for share in shares])
        rank = dist.get_rank(self.group)
        if mine := matrices[shares[rank]]:
            torch.cat([m.flatten() for m in super()._orthogonalise(mine, 1, dtype)], out=parts[rank])
        sent = [
            dist.broadcast(part, group=self.group, group_src=source, async_op=True)
            for source, part in enumerate(parts)
            if len(part)
        ]
        for work in sent:
            work.wait()
        directions = flat.split([update.numel() for update in updates])
        return [direction.view(update.shape) for direction, update in zip(directions, updates, strict=True)]


def cost(matrix: Tensor) -> int:
    """Of an iteration of Newton-Schulz, in multiplications: the Gram matrix, its square, and their product."""
    short, long = sorted(matrix.shape)
    return short * short * (2 * long + short)


def equal_shares(costs: list[int], ranks: int) -> list[slice]:
    """Cuts a row of matrices into one piece for each rank, costs as equal as whole matrices allow."""
    total, ends = sum(costs), accumulate(costs)
    middles = [end - own / 2 for end, own in zip(ends, costs, strict=True)]
    stops = [bisect_left(middles, total * (rank + 1) / ranks) for rank in range(ranks)]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
