"""Expert parallelism: each layer's routed experts are spread over ranks, and all-to-alls dispatch tokens to them.

N ranks, each with its own micro-batches, hold E / N experts of every layer each. A (token, expert) pair is a row. One
all-to-all dispatches the rows to the ranks of their experts, another combines the results at home. Each sends as many
rows as there are; no row is dropped. The rest of the model sees what `Experts` computes in one process. DeepSeek-V3
(§3.2 and §3.4) spreads its experts like this.
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


class AllToAll:
    """The all-to-all of the ranks that share a model's experts.

    Args:
        ep_group: these ranks, in the order of their experts.
        expert_replicate_group: the ranks that hold the same experts as this one.

    `while_waiting` is called while rows travel. An overlapped pair of passes (overlap.py) lets the other pass compute.
    """

    def __init__(self, ep_group: dist.ProcessGroup, expert_replicate_group: dist.ProcessGroup | None = None):
        self.ep_group, self.expert_replicate_group = ep_group, expert_replicate_group
        self.while_waiting: Callable[[], None] = lambda: None

    def __call__(
        self, tensors: Sequence[Tensor], send_counts: list[int] | None, recv_counts: list[int] | None
    ) -> list[Tensor]:
        """Send rows of each tensor: `send_counts` to each rank, `recv_counts` from each; None: the same number each."""
        received, works = [], []
        for tensor in tensors:
            num_rows = len(tensor) if recv_counts is None else sum(recv_counts)
            received.append(tensor.new_empty(num_rows, *tensor.shape[1:]))
            works.append(
                dist.all_to_all_single(
                    received[-1], tensor.contiguous(), recv_counts, send_counts, group=self.ep_group, async_op=True
                )
            )
        self.while_waiting()
        for work in works:
            work.wait()
        return received


class DispatchPlan(NamedTuple):
    """Where the R rows of a rank's N tokens go, sorted by expert, and the R' rows that the rank receives."""

    token_of_row: Tensor  # (R,)
    row_of_pair: Tensor  # (N, K)
    local_expert: Tensor  # (R', 1) of each received row, counted from this rank's first expert
    send_counts: list[int]  # rows to each rank
    recv_counts: list[int]  # rows from each rank

    @classmethod
    def from_choices(cls, index: Tensor, num_experts: int, all_to_all: AllToAll) -> "DispatchPlan":
        """Plan the dispatch of choices (N, K) among all `num_experts`. The ranks exchange their numbers of rows."""
        ranks = dist.get_world_size(all_to_all.ep_group)
        expert, order = index.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=num_experts)
        # counts_here: rows from each rank for each of this rank's experts (ranks * E / ranks,)
        (counts_here,) = all_to_all([counts], None, None)
        send_counts, recv_counts = torch.stack([counts, counts_here]).view(2, ranks, -1).sum(-1).tolist()
        local_experts = torch.arange(num_experts // ranks, device=index.device).repeat(ranks)
        row = torch.arange(len(order), device=index.device)
        return cls(
            token_of_row=order // index.shape[1],
            row_of_pair=torch.empty_like(order).scatter_(0, order, row).view(index.shape),
            local_expert=local_experts.repeat_interleave(counts_here).unsqueeze(1),
            send_counts=send_counts,
            recv_counts=recv_counts,
        )


class _Dispatch(torch.autograd.Function):
    """Sends tokens (N, hidden) and gates (N, K) to the experts, as rows (R', hidden) and (R', 1)."""

    @staticmethod
    def forward(ctx, x, gates, plan, all_to_all):
        ctx.plan, ctx.all_to_all = plan, all_to_all
        row_gates = torch.empty_like(gates).flatten().scatter_(0, plan.row_of_pair.flatten(), gates.flatten())
        rows = [x.index_select(0, plan.token_of_row), row_gates.unsqueeze(1)]
        return tuple(all_to_all(rows, plan.send_counts, plan.recv_counts))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_row_gates):
        plan = ctx.plan
        d_rows, d_row_gates = ctx.all_to_all([d_rows, d_row_gates], plan.recv_counts, plan.send_counts)
        d_x = F.embedding_bag(plan.row_of_pair, d_rows, mode="sum")  # (N, hidden)
        return d_x, d_row_gates[plan.row_of_pair].squeeze(-1), None, None


class _Combine(torch.autograd.Function):
    """Brings rows (R', hidden) back to their tokens (N, hidden) and sums the K rows of each."""

    @staticmethod
    def forward(ctx, rows, plan, all_to_all):
        ctx.plan, ctx.all_to_all = plan, all_to_all
        (rows,) = all_to_all([rows], plan.recv_counts, plan.send_counts)
        return F.embedding_bag(plan.row_of_pair, rows, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        plan = ctx.plan
        (d_rows,) = ctx.all_to_all([d_out.index_select(0, plan.token_of_row)], plan.send_counts, plan.recv_counts)
        return d_rows, None, None


class ParallelExperts(Experts):
    """The rows `local` of another module's `num_experts` experts. All ranks that share them call it together, each with
    its own tokens. It loads a whole state dict, or its own, which has this rank's experts only.
    """

    def __init__(self, experts: Experts, all_to_all: AllToAll):
        nn.Module.__init__(self)
        self.product, self.row_multiple = experts.product, experts.row_multiple
        ranks, rank = dist.get_world_size(all_to_all.ep_group), dist.get_rank(all_to_all.ep_group)
        self.all_to_all, self.num_experts = all_to_all, len(experts.down_proj)
        self.local = slice(rank * self.num_experts // ranks, (rank + 1) * self.num_experts // ranks)
        for name, stack in experts.named_parameters(recurse=False):
            shard = stack.detach()[self.local].clone()  # so that the memory of the whole stack is freed
            self.register_parameter(name, nn.Parameter(shard, stack.requires_grad))

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        plan = DispatchPlan.from_choices(index, self.num_experts, self.all_to_all)
        rows, row_gates = _Dispatch.apply(x, gates, plan, self.all_to_all)
        expert, is_empty = plan.local_expert, not len(rows)
        if is_empty:  # one row of zeros, because not every kernel takes an empty tensor
            rows, row_gates, expert = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (rows, row_gates, expert))
        out = super().forward(rows, expert, row_gates)
        return _Combine.apply(out[:0] if is_empty else out, plan, self.all_to_all)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name, own in self.named_parameters(recurse=False):
            value = state_dict.get(prefix + name)
            if value is not None and len(value) == self.num_experts != len(own):
                state_dict[prefix + name] = value[self.local]
        super()._load_from_state_dict(state_dict, prefix, *args)


def shard_experts_(model: nn.Module, all_to_all: AllToAll) -> None:
    """Replace each `Experts` module of a model by this rank's shard of it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            model.set_submodule(name, ParallelExperts(module, all_to_all))


def expert_slices(model: nn.Module) -> dict[str, slice]:
    """Return the names of the parameters that are shards of experts, and which of all experts each holds."""
    return {
        f"{name}.{parameter}": module.local
        for name, module in model.named_modules()
        if isinstance(module, ParallelExperts)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def expert_shards(model: nn.Module, tensors: dict[str, Tensor], ep_group: dist.ProcessGroup) -> dict[str, DTensor]:
    """Wrap a rank's stacks of experts, or their optimizer state, as DTensors over the ranks that share the experts.

    Args:
        tensors: by parameter NAME, or NAME.KEY. Those of other parameters are left out.
    """
    names = expert_slices(model)
    stacks = {n: t for n, t in tensors.items() if t.ndim == 3 and (n in names or n.rpartition(".")[0] in names)}
    if not stacks:
        return {}
    mesh = DeviceMesh.from_group(ep_group, next(iter(stacks.values())).device.type)
    return {n: DTensor.from_local(stack.detach(), mesh, [Shard(0)], run_check=False) for n, stack in stacks.items()}
