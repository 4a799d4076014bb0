"""The order in which a pipeline's ranks compute: DualPipeV (V3 §3.2.1, cut in half), and others to compare it with.

The engine is torch.distributed.pipelining, which also moves what the stages return. Gradients of micro-batches add up
as they are, since each loss already is its share of the whole step's.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from moonwhale.errors import UserError
from moonwhale.pipeline.kinds import SCHEDULES, places
from moonwhale.pipeline.stages import Part, Stage


def splits_backward(version: str = torch.__version__) -> bool:
    """Whether torch splits a backward pass into input's and weights' correctly: before 2.12 a router's gradient comes
    out wrong, and nothing says so.
    """
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 12)


class WholeBackward(PipelineStage):
    """A stage whose backward pass is not split: where the schedule asks for the inputs' gradient, the weights' is
    computed with it, and where it asks for the weights', nothing is left to do.
    """

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward=True, last_backward=last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        pass


class Pipeline:
    """A rank's stages and the schedule that runs them, for micro-batches of `shape` (B, T).

    stages: the rank's, in the order of the model. `group` holds one copy of the model, a rank for each place.

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
    ):
        ranks = dist.get_world_size(group)
        least = SCHEDULES[schedule].micro_batches * ranks
        if micro_batches < least:
            raise UserError(f"{schedule}: {micro_batches} micro-batches are too few for {ranks} ranks: give {least}")
        self.stages, self.group, self.device, self.places = stages, group, device, places(schedule, ranks)
        self.micro_batches, self.shape = micro_batches, shape
        wrapped = [self._wrap(stage) for stage in stages]
        engine = getattr(pipelining, SCHEDULES[schedule].engine)
        several = SCHEDULES[schedule].stages > 1
        self.engine = engine(
            wrapped if several else wrapped[0], micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False
        )
        self._ends = self._share_embedding()

    def _share_embedding(self) -> dist.ProcessGroup | None:
        """The two ranks that have the embedding, if there are two: the first stage's, and the last's where an MTP
        module or a tied head needs it.
        """
        config, ends = self.stages[0].model.config, (self.places[0], self.places[-1])
        needed = config.num_nextn_predict_layers or config.tie_word_embeddings
        if not needed or ends[0] == ends[1] or dist.get_rank(self.group) not in ends:
            return None
        group = self.group or dist.group.WORLD
        return dist.new_group([dist.get_global_rank(group, rank) for rank in ends], use_local_synchronization=True)

    def _wrap(self, stage: Stage) -> PipelineStage:
        part, carried = stage.part, stage.carried(*self.shape)
        checkpointing = stage.model.is_activation_checkpointing
        whole = part.is_last or checkpointing or not splits_backward()
        return (WholeBackward if whole else PipelineStage)(
            stage,
            part.index,
            part.count,
            self.device,
            input_args=() if part.is_first else carried,
            output_args=torch.empty((), device="meta") if part.is_last else carried,
            group=self.group,
        )

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward and backward of a whole step, {"input_ids", "labels", …}, (micro_batches · B, T) each, the same on
        every rank. Gradients are added to the parameters'; the last stage's `outputs` hold the parts of the loss.
        """
        self.engine.step(target=batch["labels"], return_outputs=False, **batch)
        if self._ends is not None:
            dist.all_reduce(self.stages[0].model.model.embed_tokens.weight.grad, group=self._ends)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Forward of one micro-batch of any shape, stage after stage."""
        here = dist.get_rank(self.group)
        carried = ()
        for index, rank in enumerate(self.places):
            if rank == here:
                stage = next(stage for stage in self.stages if stage.part.index == index)
                carried = stage(*carried, **batch)
            if index + 1 == len(self.places):
                break
            after = self.places[index + 1]
            if rank == here and after != here:
                for tensor in carried:
                    dist.send(tensor.contiguous(), group=self.group, group_dst=after)
            if after == here and rank != here:
                empty = self.stages[0].carried(*batch["input_ids"].shape)
                carried = tuple(torch.empty_like(tensor, device=self.device, requires_grad=False) for tensor in empty)
                for tensor in carried:
                    dist.recv(tensor, group=self.group, group_src=rank)


def own_parts(parts: list[Part], schedule: str, ranks: int, rank: int) -> list[Part]:
    """The parts that `rank` holds."""
    return [part for part, place in zip(parts, places(schedule, ranks), strict=True) if place == rank]
