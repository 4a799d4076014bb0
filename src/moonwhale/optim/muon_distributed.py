"""MuonClip over several ranks: each orthogonalises its share of the matrices, and all make the step that one would.

Newton-Schulz is what Muon costs; momenta and AdamW are cheap, and stay with whoever has the weights.
"""

from bisect import bisect_left
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonwhale.optim.muonclip import MuonClip


class SharedMuonClip(MuonClip):
    """MuonClip for weights that all ranks of `group` have, with the same gradients; None: this process is alone. Those
    of `experts` have the same stacks of experts, which may be fewer.
    Weights in shards (FSDP2's, cut along dimension 0) are shared by the ranks that hold them, and so are their momenta.

    Weights and momenta stay those of one process, bit for bit where a product's bits don't depend on how many
    matrices are multiplied at once (on CPUs they don't).
    """

    def __init__(
        self, params, *, group: dist.ProcessGroup | None = None, experts: dist.ProcessGroup | None = None, **settings
    ):
        super().__init__(params, **settings)
        self.group, self.experts = group, experts or group

    def _orthogonalise(self, updates: list[Tensor], split: int, dtype: torch.dtype) -> list[Tensor]:
        if isinstance(updates[0], DTensor):
            return self._of_shards(updates, split, dtype)
        directions: dict[int, Tensor] = {}
        for stacks, group in ((False, self.group), (True, self.experts)):
            held = [i for i, update in enumerate(updates) if (update.ndim == 3) == stacks]
            directions |= zip(held, self._of_copies([updates[i] for i in held], split, dtype, group), strict=True)
        return [directions[i] for i in range(len(updates))]

    def _of_copies(
        self, updates: list[Tensor], split: int, dtype: torch.dtype, group: dist.ProcessGroup | None
    ) -> list[Tensor]:
        """Each rank of a group sends the others its matrices' directions."""
        if not updates or group is None or dist.get_world_size(group) == 1:
            return super()._orthogonalise(updates, split, dtype)
        matrices = [m for update in updates for m in update.reshape(-1, update.size(-2) // split, update.size(-1))]
        shares = equal_shares([cost(m.shape) for m in matrices], dist.get_world_size(group))
        flat = torch.empty(sum(m.numel() for m in matrices), dtype=dtype, device=matrices[0].device)
        parts = flat.split([sum(m.numel() for m in matrices[share]) for share in shares])
        rank = dist.get_rank(group)
        if mine := matrices[shares[rank]]:
            torch.cat([m.flatten() for m in super()._orthogonalise(mine, 1, dtype)], out=parts[rank])
        sent = [
            dist.broadcast(part, group=group, group_src=source, async_op=True)
            for source, part in enumerate(parts)
            if len(part)
        ]
        for work in sent:
            work.wait()
        directions = flat.split([update.numel() for update in updates])
        return [direction.view(update.shape) for direction, update in zip(directions, updates, strict=True)]

    def _of_shards(self, updates: list[DTensor], split: int, dtype: torch.dtype) -> list[DTensor]:
        """A matrix travels to one rank, and its direction back. Of a stack, a rank's shard is whole matrices."""
        local = [update.to_local() for update in updates]
        stacks = [i for i, shard in enumerate(local) if shard.ndim == 3 and len(shard)]
        directions = [shard.to(dtype) for shard in local]  # what is empty stays so
        for i, direction in zip(stacks, super()._orthogonalise([local[i] for i in stacks], split, dtype), strict=True):
            directions[i] = direction
        if matrices := [i for i, shard in enumerate(local) if shard.ndim == 2]:
            meeting = Meeting([updates[i].shape for i in matrices], updates[0].device_mesh.get_group())
            mine = super()._orthogonalise(meeting.gather([local[i] for i in matrices]), split, dtype)
            for i, direction in zip(matrices, meeting.scatter(mine, local[0].new_empty(0, dtype=dtype)), strict=True):
                directions[i] = direction
        return [
            DTensor.from_local(direction, u.device_mesh, u.placements, shape=u.shape, stride=u.stride())
            for direction, u in zip(directions, updates, strict=True)
        ]


class Meeting:
    """Brings matrices of some `shapes`, whose rows are spread over a group's ranks as by `torch.chunk`, together, each
    on one rank, and back.
    """

    def __init__(self, shapes: list[torch.Size], group: dist.ProcessGroup):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        shares = equal_shares([cost(shape) for shape in shapes], ranks)
        self.shapes, self.group, self.mine = shapes, group, shares[rank]
        # Elements that a rank holds of each matrix, and that this one sends to each rank and gets from it
        self.held = [[b * max(0, min(-(-a // ranks), a - r * -(-a // ranks))) for a, b in shapes] for r in range(ranks)]
        self.sends = [sum(self.held[rank][share]) for share in shares]
        self.gets = [sum(held[self.mine]) for held in self.held]

    def gather(self, shards: list[Tensor]) -> list[Tensor]:
        """Whole matrices, those of this rank's share, from its shard of every one."""
        arrived = self._exchange(torch.cat([shard.flatten() for shard in shards]), self.sends, self.gets)
        pieces = [part.split(held[self.mine]) for part, held in zip(arrived.split(self.gets), self.held, strict=True)]
        return [torch.cat(p).view(shape) for *p, shape in zip(*pieces, self.shapes[self.mine], strict=True)]

    def scatter(self, matrices: list[Tensor], empty: Tensor) -> list[Tensor]:
        """Its shard of every matrix, from those of this rank's share; `empty` (0,) has their precision."""
        cuts = zip(*(held[self.mine] for held in self.held), strict=True)
        pieces = [matrix.flatten().split(cut) for matrix, cut in zip(matrices, cuts, strict=True)]
        leaving = torch.cat([empty, *(piece for to_rank in zip(*pieces, strict=True) for piece in to_rank)])
        home = self._exchange(leaving, self.gets, self.sends).split(self.held[dist.get_rank(self.group)])
        return [shard.view(-1, shape[1]) for shard, shape in zip(home, self.shapes, strict=True)]

    def _exchange(self, leaving: Tensor, sends: list[int], gets: list[int]) -> Tensor:
        arrived = leaving.new_empty(sum(gets))
        dist.all_to_all_single(arrived, leaving, gets, sends, group=self.group)
        return arrived


def cost(shape: torch.Size) -> int:
    """Multiplications in an iteration of Newton-Schulz: the Gram matrix, its square, and their product."""
    short, long = sorted(shape)
    return short * short * (2 * long + short)


def equal_shares(costs: list[int], ranks: int) -> list[slice]:
    """Cuts a row of matrices into one piece for each rank, costs as equal as whole matrices allow."""
    total, ends = sum(costs), accumulate(costs)
    middles = [end - own / 2 for end, own in zip(ends, costs, strict=True)]
    stops = [bisect_left(middles, total * (rank + 1) / ranks) for rank in range(ranks)]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
