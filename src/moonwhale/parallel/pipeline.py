"""A rank's part in a pipeline's step: forward and backward of its stages, and gradients that ranks add up.

Those of micro-batches add up as they are, since each loss already is its share of the whole step's.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining.schedules import OVERLAP_F_B

from moonwhale.errors import UserError
from moonwhale.parallel.expert_parallel import Exchange, own_experts
from moonwhale.parallel.fsdp import Shards
from moonwhale.parallel.options import SCHEDULES, places
from moonwhale.parallel.overlap import Overlap
from moonwhale.parallel.schedules import EngineStage, build_engine, splits_backward
from moonwhale.parallel.stages import Stage


class Pipeline:
    """A rank's stages and the schedule that runs them, for micro-batches of `shape` (B, T); on one rank, one after
    another.

    stages: the rank's, as `own_parts` has them. `group` holds one copy of the pipeline, a rank for each place; `same`,
    if there is more than one, the ranks whose stages are the same, over which gradients are added up; those of experts
    that ranks share, by `exchange`, over the ranks that hold the same experts.

    A backward pass is split only where that is right and pays: not in the last stage, whose weights have several uses,
    nor with activation checkpointing, which would compute a stage's forward pass twice more.
    """

    def __init__(
        self,
        stages: list[Stage],
        schedule: str,
        micro_batches: int,
        shape: tuple[int, int],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        same: dist.ProcessGroup | None = None,
        exchange: Exchange | None = None,
    ):
        ranks, kind = dist.get_world_size(group), SCHEDULES[schedule]
        least = kind.micro_batches * ranks
        if micro_batches < least:
            raise UserError(f"{schedule}: {micro_batches} micro-batches are too few for {ranks} ranks: give {least}")
        self.stages, self.group, self.device, self.shape = stages, group, device, shape
        self.same, self.exchange = same, exchange
        self.micro_batches, self.mirrored = micro_batches, kind.mirrored
        self.places = places(schedule, ranks)
        self.shards: Shards | None = None
        self.wrapped = [self._wrap(stage, half) for half, stage in enumerate(stages)] if ranks > 1 else []
        self.engine = build_engine(schedule, self.wrapped, micro_batches) if ranks > 1 else None
        if exchange is not None and kind.v_shape:  # of which the zero-bubble order has no pairs
            self.engine.register_custom_function(OVERLAP_F_B, Overlap(exchange))

    def shard_(self) -> None:
        """Spreads weights, gradients and what an optimizer makes of them over the ranks whose stages are the same."""
        self.shards = Shards(self.stages, self.same, self.device)

    def _wrap(self, stage: Stage, half: int) -> EngineStage:
        part, carried = stage.part, stage.carried(*self.shape)
        second = self.mirrored and half == 1
        whole = part.is_last or stage.model.is_activation_checkpointing or not splits_backward()
        return EngineStage(
            stage,
            part,
            part.index + (part.count if second else 0),
            len(self.places),
            self.device,
            half=half if self.mirrored else None,
            whole=whole,
            input_args=() if part.is_first else carried,
            output_args=torch.empty((), device="meta") if part.is_last else carried,
            group=self.group,
        )

    def _share_embedding(self) -> None:
        """Adds up the embedding's gradient where two ranks have it: the first stage's, and the last's if an MTP module
        or a tied head needs it.
        """
        config, ends = self.stages[0].model.config, (self.places[0], self.places[-1])
        needed, here = config.num_nextn_predict_layers or config.tie_word_embeddings, dist.get_rank(self.group)
        if not needed or ends[0] == ends[1] or here not in ends:
            return
        grad, other = self.stages[0].model.model.embed_tokens.weight.grad, ends[here == ends[0]]
        theirs = torch.empty_like(grad)
        exchange = [
            dist.P2POp(dist.isend, grad, group=self.group, group_peer=other),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=other),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        grad += theirs

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward and backward of a whole step, {"input_ids", "labels", …}, (micro_batches · B, T) each, the same on
        every rank. Gradients are added to the parameters'; `outputs` of the last stage hold the parts of the loss.
        """
        for stage in self.wrapped:
            stage.events.clear()
        if self.shards is not None:
            self.shards.gather()
        if self.engine is None:
            for i in range(0, len(batch["labels"]), self.shape[0]):
                self.stages[0](**{name: value[i : i + self.shape[0]] for name, value in batch.items()}).backward()
        else:
            self.engine.step(target=batch["labels"], return_outputs=False, **batch)
            self._share_embedding()
        if self.shards is not None:
            self.shards.scatter()
        else:
            self._add_up()

    def _add_up(self) -> None:
        """Gradients over all ranks that hold the same weights."""
        model = self.stages[0].model
        experts = own_experts(model)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        _sum_over(self.same, [grad for name, grad in grads.items() if name not in experts])
        if self.exchange is not None:
            _sum_over(self.exchange.same, [grad for name, grad in grads.items() if name in experts])

    def take_outputs(self) -> list[tuple[int, object]]:
        """The parts of the loss that the last stage, if it is here, put down since the last call, each with the number
        of its micro-batch.
        """
        taken = []
        for half, stage in enumerate(self.stages):
            numbers = range(half, 2 * len(stage.outputs), 2) if self.mirrored else range(len(stage.outputs))
            taken += zip(numbers, stage.outputs, strict=True)
            stage.outputs.clear()
        return taken

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Forward of one micro-batch of any shape, stage after stage; the last one is left in its `outputs`."""
        here, carried = dist.get_rank(self.group), ()
        if self.shards is not None:
            self.shards.gather()
        path = self.places[: self.stages[0].part.count]
        for index, rank in enumerate(path):
            if rank == here:
                carried = next(stage for stage in self.stages if stage.part.index == index)(*carried, **batch)
            after = path[index + 1] if index + 1 < len(path) else rank
            if rank == here and after != here:
                for tensor in carried:
                    dist.send(tensor.contiguous(), group=self.group, group_dst=after)
            if after == here and rank != here:
                shapes = self.stages[0].carried(*batch["input_ids"].shape)
                carried = tuple(torch.empty_like(t, device=self.device, requires_grad=False) for t in shapes)
                for tensor in carried:
                    dist.recv(tensor, group=self.group, group_src=rank)
        if self.shards is not None:
            self.shards.release()


def _sum_over(group: dist.ProcessGroup | None, grads: list[Tensor]) -> None:
    """In place over a group's ranks, in one collective."""
    if group is None or dist.get_world_size(group) == 1 or not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat, group=group)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))
