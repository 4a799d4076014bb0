"""MuonClip over several ranks: each rank orthogonalises a share of the matrices, and all make the step of one process.

Newton-Schulz is what Muon costs. Momenta and AdamW are cheap and stay with the ranks that hold the weights.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonwhale.optim.muonclip import MuonClip


class DistributedMuonClip(MuonClip):
    """MuonClip for weights that several ranks hold, as replicas or in shards.

    Replicas: all ranks of `group` hold the same weights and gradients (None: this process is alone). The ranks of
    `experts` hold the same stacks of experts; these may be fewer ranks (None: those of `group`).

    Shards, cut along dimension 0 by FSDP2: the ranks that hold a weight's shards share the work. Momenta are sharded
    too.

    Weights and momenta equal those of one process. They are equal bit for bit if the bits of a product do not depend on
    how many matrices are multiplied at once; on CPUs they don't.
    """

    def __init__(
        self, params, *, group: dist.ProcessGroup | None = None, experts: dist.ProcessGroup | None = None, **settings
    ):
        super().__init__(params, **settings)
        self.group, self.experts = group, experts or group

    def _parts(self, *tensors: list[Tensor]) -> Iterable[Iterable[list[Tensor]]]:
        """Return one part if several ranks share the matrices, so that they share all of them at once."""
        groups = (group for group in (self.group, self.experts) if group is not None)
        shared = isinstance(tensors[0][0], DTensor) or any(dist.get_world_size(group) > 1 for group in groups)
        return [tensors] if shared else super()._parts(*tensors)

    def _orthogonalise(self, updates: list[Tensor], split: int, dtype: torch.dtype) -> list[Tensor]:
        if isinstance(updates[0], DTensor):
            return self._orthogonalise_shards(updates, split, dtype)
        directions: dict[int, Tensor] = {}
        for is_stack, group in ((False, self.group), (True, self.experts)):
            held = [i for i, update in enumerate(updates) if (update.ndim == 3) == is_stack]
            found = self._orthogonalise_replicas([updates[i] for i in held], split, dtype, group)
            directions |= zip(held, found, strict=True)
        return [directions[i] for i in range(len(updates))]

    def _orthogonalise_replicas(
        self, updates: list[Tensor], split: int, dtype: torch.dtype, group: dist.ProcessGroup | None
    ) -> list[Tensor]:
        """Orthogonalise this rank's share of the matrices, and exchange the directions with the other ranks."""
        if not updates or group is None or dist.get_world_size(group) == 1:
            return super()._orthogonalise(updates, split, dtype)
        matrices = [m for update in updates for m in update.reshape(-1, update.size(-2) // split, update.size(-1))]
        shares = equal_shares([newton_schulz_cost(m.shape) for m in matrices], dist.get_world_size(group))
        flat = torch.empty(sum(m.numel() for m in matrices), dtype=dtype, device=matrices[0].device)
        parts = flat.split([sum(m.numel() for m in matrices[share]) for share in shares])
        rank = dist.get_rank(group)
        if mine := matrices[shares[rank]]:
            torch.cat([m.flatten() for m in super()._orthogonalise(mine, 1, dtype)], out=parts[rank])
        broadcasts = [
            dist.broadcast(part, group=group, group_src=source, async_op=True)
            for source, part in enumerate(parts)
            if len(part)
        ]
        for work in broadcasts:
            work.wait()
        directions = flat.split([update.numel() for update in updates])
        return [direction.view(update.shape) for direction, update in zip(directions, updates, strict=True)]

    def _orthogonalise_shards(self, updates: list[DTensor], split: int, dtype: torch.dtype) -> list[DTensor]:
        """Send each 2-D matrix to one rank, and its direction back. A shard of a stack holds whole matrices already."""
        local = [update.to_local() for update in updates]
        directions = [shard.to(dtype) for shard in local]  # an empty shard stays as it is
        stacks = [i for i, shard in enumerate(local) if shard.ndim == 3 and len(shard)]
        for i, direction in zip(stacks, super()._orthogonalise([local[i] for i in stacks], split, dtype), strict=True):
            directions[i] = direction
        if matrices := [i for i, shard in enumerate(local) if shard.ndim == 2]:
            exchange = ShardExchange([updates[i].shape for i in matrices], updates[0].device_mesh.get_group())
            mine = super()._orthogonalise(exchange.gather([local[i] for i in matrices]), split, dtype)
            for i, direction in zip(matrices, exchange.scatter(mine, local[0].new_empty(0, dtype=dtype)), strict=True):
                directions[i] = direction
        return [
            DTensor.from_local(direction, u.device_mesh, u.placements, shape=u.shape, stride=u.stride())
            for direction, u in zip(directions, updates, strict=True)
        ]


class ShardExchange:
    """Gathers each of several matrices on one rank of `group`, and scatters them back.

    The matrices have the given `shapes`. Their rows are sharded over the ranks as by `torch.chunk`.
    """

    def __init__(self, shapes: list[torch.Size], group: dist.ProcessGroup):
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        shares = equal_shares([newton_schulz_cost(shape) for shape in shapes], world_size)
        self.shapes, self.group, self.mine = shapes, group, shares[rank]
        # shard_sizes[r][i]: elements of matrix i that rank r holds
        self.shard_sizes = [
            [_rows_of(r, rows, world_size) * width for rows, width in shapes] for r in range(world_size)
        ]
        self.sends = [sum(self.shard_sizes[rank][share]) for share in shares]  # elements to each rank
        self.receives = [sum(sizes[self.mine]) for sizes in self.shard_sizes]  # elements from each rank

    def gather(self, shards: list[Tensor]) -> list[Tensor]:
        """Return this rank's share of the whole matrices. `shards` are its shards of all matrices."""
        received = self._exchange(torch.cat([shard.flatten() for shard in shards]), self.sends, self.receives)
        from_ranks = zip(received.split(self.receives), self.shard_sizes, strict=True)
        pieces = [part.split(sizes[self.mine]) for part, sizes in from_ranks]
        return [torch.cat(p).view(shape) for *p, shape in zip(*pieces, self.shapes[self.mine], strict=True)]

    def scatter(self, matrices: list[Tensor], empty: Tensor) -> list[Tensor]:
        """Return this rank's shards of all matrices. `matrices` is its share; `empty` (0,) gives dtype and device."""
        sizes = zip(*(of_rank[self.mine] for of_rank in self.shard_sizes), strict=True)
        pieces = [matrix.flatten().split(cut) for matrix, cut in zip(matrices, sizes, strict=True)]
        sent = torch.cat([empty, *(piece for to_rank in zip(*pieces, strict=True) for piece in to_rank)])
        shards = self._exchange(sent, self.receives, self.sends).split(self.shard_sizes[dist.get_rank(self.group)])
        return [shard.view(-1, shape[1]) for shard, shape in zip(shards, self.shapes, strict=True)]

    def _exchange(self, sent: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        received = sent.new_empty(sum(receives))
        dist.all_to_all_single(received, sent, receives, sends, group=self.group)
        return received


def _rows_of(rank: int, rows: int, world_size: int) -> int:
    """Return the rows of a matrix that `torch.chunk` gives to a rank."""
    per_rank = -(-rows // world_size)
    return max(0, min(per_rank, rows - rank * per_rank))


def newton_schulz_cost(shape: torch.Size) -> int:
    """Return the multiplications in one iteration: the Gram matrix, its square, and their product with x."""
    short, long = sorted(shape)
    return short * short * (2 * long + short)


def equal_shares(costs: list[int], world_size: int) -> list[slice]:
    """Cut a list of matrices into one slice for each rank, with costs as equal as whole matrices allow."""
    total, ends = sum(costs), accumulate(costs)
    middles = [end - own / 2 for end, own in zip(ends, costs, strict=True)]
    stops = [bisect_left(middles, total * (rank + 1) / world_size) for rank in range(world_size)]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
