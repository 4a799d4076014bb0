"""A rank's share of a pipeline's step: forward and backward of its stages, and gradients summed over ranks.

Gradients of micro-batches and ranks are sums, not means: each micro-batch's loss is already its share of the step's.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining.schedules import OVERLAP_F_B

from moonwhale.errors import UserError
from moonwhale.parallel.expert_parallel import AllToAll, expert_slices
from moonwhale.parallel.fsdp import ShardedStages
from moonwhale.parallel.overlap import Overlap
from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.schedules import EngineStage, build_engine, splits_backward
from moonwhale.parallel.stages import Stage, last_reads_embedding


class Pipeline:
    """A rank's stages and the schedule that runs them. On a single rank, micro-batches run one after the other.

    A backward pass is split only where that is correct and pays. It is not split in the last stage, whose weights have
    several uses, nor with activation checkpointing, which would run a stage's forward pass two more times.

    Args:
        stages: this rank's, in the order of `stages_of_rank`.
        shape: (B, T) of a micro-batch.
        pp_group: the ranks of one replica of the pipeline.
        replicate_group: the ranks that hold the same stages, over which gradients are summed; None: only this rank.
        all_to_all: of the ranks that share experts. Gradients of experts are summed over its `expert_replicate_group`.
    """

    def __init__(
        self,
        stages: list[Stage],
        schedule: str,
        micro_batches: int,
        shape: tuple[int, int],
        device: torch.device,
        pp_group: dist.ProcessGroup | None = None,
        replicate_group: dist.ProcessGroup | None = None,
        all_to_all: AllToAll | None = None,
    ):
        pp, properties = dist.get_world_size(pp_group), SCHEDULES[schedule]
        least = properties.min_micro_batches_per_rank * pp
        if micro_batches < least:
            raise UserError(f"{schedule}: {micro_batches} micro-batches are too few for {pp} ranks: give {least}")
        self.stages, self.pp_group, self.device, self.shape = stages, pp_group, device, shape
        self.replicate_group, self.all_to_all = replicate_group, all_to_all
        self.micro_batches, self.bidirectional = micro_batches, properties.bidirectional
        self.stage_ranks = stage_ranks(schedule, pp)
        self.fsdp: ShardedStages | None = None
        self.engine_stages, self.engine = [], None
        if pp > 1:
            self.engine_stages = [self._engine_stage(stage, number) for number, stage in enumerate(stages)]
            self.engine = build_engine(schedule, self.engine_stages, micro_batches)
        if all_to_all is not None and properties.v_shape:  # torch's ZBV order, also in V shape, has no pairs to overlap
            self.engine.register_custom_function(OVERLAP_F_B, Overlap(all_to_all))

    def fully_shard_(self) -> None:
        """Shard weights, gradients and the optimizer's state over the ranks that hold the same stages."""
        self.fsdp = ShardedStages(self.stages, self.replicate_group, self.device)

    def _engine_stage(self, stage: Stage, number: int) -> EngineStage:
        """Wrap the rank's first (0) or second (1) stage."""
        spec, boundary = stage.spec, stage.boundary_tensors(*self.shape)
        of_second_replica = self.bidirectional and number == 1
        return EngineStage(
            stage,
            spec,
            spec.index + (spec.num_stages if of_second_replica else 0),
            len(self.stage_ranks),
            self.device,
            half=number if self.bidirectional else None,
            full_backward=spec.is_last or stage.model.is_activation_checkpointing or not splits_backward(),
            input_args=() if spec.is_first else boundary,
            output_args=torch.empty((), device="meta") if spec.is_last else boundary,
            group=self.pp_group,
        )

    def _sum_embedding_gradient(self) -> None:
        """Sum the embedding's gradient over two ranks if both hold it: the first stage's, and the last stage's if an
        MTP module or a tied head reads it.
        """
        first, last, here = self.stage_ranks[0], self.stage_ranks[-1], dist.get_rank(self.pp_group)
        if not last_reads_embedding(self.stages[0].model.config) or first == last or here not in (first, last):
            return
        other = last if here == first else first
        embedding = self.stages[0].model.model.embed_tokens.weight
        if embedding.grad is None:  # in the last stage while the MTP modules rest
            embedding.grad = torch.zeros_like(embedding)
        grad, other_grad = embedding.grad, torch.empty_like(embedding)
        messages = [
            dist.P2POp(dist.isend, grad, group=self.pp_group, group_peer=other),
            dist.P2POp(dist.irecv, other_grad, group=self.pp_group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        grad += other_grad

    def step(self, batch: dict[str, Tensor]) -> None:
        """Run forward and backward of a whole step.

        Gradients are added to the parameters' `grad`. The last stage's `outputs` then hold the losses.

        Args:
            batch: {"input_ids", "labels", …}, (micro_batches · B, T) each, the same on every rank of a replica.
        """
        for stage in self.engine_stages:
            stage.events.clear()
        if self.fsdp is not None:
            self.fsdp.unshard()
        if self.engine is None:
            for i in range(0, len(batch["labels"]), self.shape[0]):
                self.stages[0](**{name: value[i : i + self.shape[0]] for name, value in batch.items()}).backward()
        else:
            self.engine.step(target=batch["labels"], return_outputs=False, **batch)
            self._sum_embedding_gradient()
        if self.fsdp is not None:
            self.fsdp.reduce_gradients()
        else:
            self._all_reduce_gradients()

    def _all_reduce_gradients(self) -> None:
        """Sum the gradients over all ranks that hold the same weights."""
        model = self.stages[0].model
        experts = expert_slices(model)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        _all_reduce(self.replicate_group, [grad for name, grad in grads.items() if name not in experts])
        if self.all_to_all is not None:
            expert_grads = [grad for name, grad in grads.items() if name in experts]
            _all_reduce(self.all_to_all.expert_replicate_group, expert_grads)

    def take_outputs(self) -> list[tuple[int, object]]:
        """Return and clear the last stage's outputs, if it is on this rank, each with its micro-batch's number."""
        taken = []
        for half, stage in enumerate(self.stages):
            numbers = range(half, 2 * len(stage.outputs), 2) if self.bidirectional else range(len(stage.outputs))
            taken += zip(numbers, stage.outputs, strict=True)
            stage.outputs.clear()
        return taken

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Run the forward pass of one micro-batch, of any shape. Its output is then in the last stage's `outputs`."""
        here, hidden = dist.get_rank(self.pp_group), ()
        if self.fsdp is not None:
            self.fsdp.unshard()
        path = self.stage_ranks[: self.stages[0].spec.num_stages]
        for index, rank in enumerate(path):
            if rank == here:
                hidden = next(stage for stage in self.stages if stage.spec.index == index)(*hidden, **batch)
            next_rank = path[index + 1] if index + 1 < len(path) else rank
            if rank == here and next_rank != here:
                for tensor in hidden:
                    dist.send(tensor.contiguous(), group=self.pp_group, group_dst=next_rank)
            if next_rank == here and rank != here:
                shapes = self.stages[0].boundary_tensors(*batch["input_ids"].shape)
                hidden = tuple(torch.empty_like(t, device=self.device, requires_grad=False) for t in shapes)
                for tensor in hidden:
                    dist.recv(tensor, group=self.pp_group, group_src=rank)
        if self.fsdp is not None:
            self.fsdp.reshard()


def _all_reduce(group: dist.ProcessGroup | None, grads: list[Tensor]) -> None:
    """Sum gradients in place over a group's ranks, in one collective."""
    if group is None or dist.get_world_size(group) == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))
