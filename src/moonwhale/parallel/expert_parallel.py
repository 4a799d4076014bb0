"""Expert parallelism: the routed experts of each layer spread over ranks, and tokens that travel to them and back.

N ranks, each with micro-batches of its own, hold E / N experts of every layer each. A (token, expert) pair is a row:
rows go to the rank of their expert and come home by two all-to-alls, whatever their number; none is dropped. What the
rest of the model sees is what `Experts` computes in one process (V3 §3.2 and §3.4 spread experts like this).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moonwhale.model.moe import Experts


class Exchange:
    """The all-to-all of the ranks that share a model's experts.

    sharing: those ranks, in the order of their experts. same: the ranks that hold the same experts as this one.
    hand_over: called while rows travel; an overlapped pair of passes (overlap.py) lets the other one compute then.
    """

    def __init__(self, sharing: dist.ProcessGroup, same: dist.ProcessGroup | None = None):
        self.sharing, self.same = sharing, same
        self.hand_over: Callable[[], None] = lambda: None

    def __call__(self, tensors: Sequence[Tensor], sent: list[int] | None, received: list[int] | None) -> list[Tensor]:
        """The rows of `tensors` to where they belong: `sent` rows to each rank, `received` from each; None: as many to
        each as from it.
        """
        arrived, works = [], []
        for tensor in tensors:
            arrived.append(tensor.new_empty(len(tensor) if received is None else sum(received), *tensor.shape[1:]))
            works.append(
                dist.all_to_all_single(
                    arrived[-1], tensor.contiguous(), received, sent, group=self.sharing, async_op=True
                )
            )
        self.hand_over()
        for work in works:
            work.wait()
        return arrived


class Trip(NamedTuple):
    """Where the R rows of a rank's N tokens go, those of each expert together, and the R' rows it gets for them."""

    token: Tensor  # (R,) of each row
    home: Tensor  # (N, K) row of each pair
    expert: Tensor  # (R', 1) of each row that arrives, counted from this rank's first
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank

    @classmethod
    def of(cls, index: Tensor, n_experts: int, exchange: Exchange) -> "Trip":
        """For choices (N, K) among all `n_experts`."""
        ranks = dist.get_world_size(exchange.sharing)
        expert, order = index.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=n_experts)
        (theirs,) = exchange([counts], None, None)  # from each rank, for each of this one's experts
        sent, received = torch.stack([counts, theirs]).view(2, ranks, -1).sum(-1).tolist()
        own = torch.arange(n_experts // ranks, device=index.device).repeat(ranks).repeat_interleave(theirs)
        row = torch.arange(len(order), device=index.device)
        home = torch.empty_like(order).scatter_(0, order, row).view(index.shape)
        return cls(order // index.shape[1], home, own.unsqueeze(1), sent, received)


class _Away(torch.autograd.Function):
    """Tokens (N, hidden) and their gates (N, K) to the experts, as rows (R', hidden) and (R', 1)."""

    @staticmethod
    def forward(ctx, x, gates, trip, exchange):
        ctx.trip, ctx.exchange = trip, exchange
        weights = torch.empty_like(gates).flatten().scatter_(0, trip.home.flatten(), gates.flatten()).unsqueeze(1)
        return tuple(exchange([x.index_select(0, trip.token), weights], trip.sent, trip.received))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_weights):
        trip = ctx.trip
        d_rows, d_weights = ctx.exchange([d_rows, d_weights], trip.received, trip.sent)
        return F.embedding_bag(trip.home, d_rows, mode="sum"), d_weights[trip.home].squeeze(-1), None, None


class _Home(torch.autograd.Function):
    """Rows (R', hidden) back to their tokens (N, hidden), each of which is the sum of its K; the reverse of _Away."""

    @staticmethod
    def forward(ctx, rows, trip, exchange):
        ctx.trip, ctx.exchange = trip, exchange
        (rows,) = exchange([rows], trip.received, trip.sent)
        return F.embedding_bag(trip.home, rows, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (d_rows,) = ctx.exchange([d_out.index_select(0, ctx.trip.token)], ctx.trip.sent, ctx.trip.received)
        return d_rows, None, None


class ParallelExperts(Experts):
    """`Experts` of which this rank holds `mine` of all `total`; `share_` makes them. All ranks that share them call it
    together, each with its own tokens. A whole state dict can be loaded; its own has this rank's experts.
    """

    exchange: Exchange
    total: int
    mine: slice

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        trip = Trip.of(index, self.total, self.exchange)
        rows, weights = _Away.apply(x, gates, trip, self.exchange)
        expert, empty = trip.expert, not len(rows)
        if empty:  # a row of nothing: not every kernel takes none
            rows, weights, expert = F.pad(rows, (0, 0, 0, 1)), F.pad(weights, (0, 0, 0, 1)), F.pad(expert, (0, 0, 0, 1))
        out = super().forward(rows, expert, weights)
        return _Home.apply(out[:0] if empty else out, trip, self.exchange)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, own in self.named_parameters(recurse=False):
            value = state_dict.get(prefix + name)
            if value is not None and len(value) == self.total != len(own):
                state_dict[prefix + name] = value[self.mine]
        super()._load_from_state_dict(state_dict, prefix, *args)


def share_(model: nn.Module, exchange: Exchange) -> None:
    """Leaves a model, in place, only this rank's share of its routed experts."""
    ranks, rank = dist.get_world_size(exchange.sharing), dist.get_rank(exchange.sharing)
    for module in [module for module in model.modules() if isinstance(module, Experts)]:
        total = len(module.down_proj)
        module.__class__, module.exchange, module.total = ParallelExperts, exchange, total
        module.mine = slice(rank * total // ranks, (rank + 1) * total // ranks)
        for name, whole in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(whole.detach()[module.mine].clone(), whole.requires_grad))


def own_experts(model: nn.Module) -> dict[str, slice]:
    """The parameters of a model that are this rank's share of experts, by name, and which of all it has."""
    return {
        f"{name}.{parameter}": module.mine
        for name, module in model.named_modules()
        if isinstance(module, ParallelExperts)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def expert_shards(model: nn.Module, tensors: dict[str, Tensor], exchange: Exchange) -> dict[str, DTensor]:
    """Wraps a rank's stacks of experts, or the optimizer's state of these, as DTensors over the ranks that share them.

    tensors: by parameter NAME, or NAME.KEY; all others are left out.
    """
    experts = own_experts(model)
    own = {e: t for e, t in tensors.items() if t.ndim == 3 and (e in experts or e.rpartition(".")[0] in experts)}
    if not own:
        return {}
    mesh = DeviceMesh.from_group(exchange.sharing, next(iter(own.values())).device.type)
    return {e: DTensor.from_local(tensor.detach(), mesh, [Shard(0)], run_check=False) for e, tensor in own.items()}
