"""The order in which a pipeline's ranks compute: DualPipe (V3 §3.2.1), DualPipeV, ZBV zero bubble and 1F1B.

The engine is torch.distributed.pipelining. It also sends what the stages return.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    BACKWARD_WEIGHT,
    FORWARD,
    RECV_B,
    RECV_F,
    SEND_B,
    SEND_F,
    _Action,
    _PipelineScheduleRuntime,
)

from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.stages import StageSpec


def splits_backward(version: str = torch.__version__) -> bool:
    """Whether torch splits a backward pass correctly into the inputs' and the weights' half.

    Before 2.12 a router's gradient comes out wrong, without an error.
    """
    return tuple(int(number) for number in version.split(".")[:2]) >= (2, 12)


class Event(NamedTuple):
    """One action of a rank in a recorded step.

    `kind` is F (forward), B (full backward), I (input gradients) or W (weight gradients).
    """

    kind: str
    stage: int
    micro_batch: int
    begin: float  # seconds, of time.perf_counter
    end: float


class EngineStage(PipelineStage):
    """A stage as torch's engine sees it.

    Args:
        index: its number among all `num_stages` that the engine runs, a second replica's included. Whether it is the
            first or last stage of its replica is in `spec`.
        half: which half of each micro-batch belongs to this stage's replica (0 or 1); None: the whole micro-batch.
        full_backward: do not split the backward pass. Where the schedule asks for the input gradients, the weight
            gradients are computed with them, and where it asks for the weight gradients, nothing is left to do.
    """

    def __init__(
        self,
        stage,
        spec: StageSpec,
        index: int,
        num_stages: int,
        device: torch.device,
        half: int | None = None,
        full_backward: bool = False,
        **kwargs,
    ):
        self.spec, self.half, self.full_backward = spec, half, full_backward
        self.events: list[Event] = []
        super().__init__(stage, index, num_stages, device, **kwargs)

    @property
    def is_first(self) -> bool:
        return self.spec.is_first

    @property
    def is_last(self) -> bool:
        return self.spec.is_last

    def _get_init_p2p_neighbors_ops(self):
        """Leave out messages of a rank to itself, if it holds both neighbours: with gloo, torch 2.11 fails on them."""
        here = dist.get_rank(self.group)
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != here]

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        if self.half is not None:
            kwargs = {name: value.chunk(2)[self.half] for name, value in kwargs.items()}
        return self._timed("F", fwd_chunk_id, super().forward_one_chunk, args, kwargs, save_forward_output)

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        full = full_backward or self.full_backward
        self._timed("B" if full else "I", bwd_chunk_id, super().backward_one_chunk, loss, full, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        if not self.full_backward:
            compute = self._first_stage_weights if self.is_first else super().backward_weight_one_chunk
            self._timed("W", bwd_chunk_id, compute, last_backward)

    def _first_stage_weights(self, bwd_chunk_id, last_backward):
        """Run the whole backward pass: a first stage has no input gradients. torch does this for stage 0 only, and the
        second replica's first stage has another number.
        """
        inputs, _, output, grads = self.backward_state.pop(bwd_chunk_id)
        self.dw_runner.pop(bwd_chunk_id)
        self.backward_maybe_with_nosync(
            "full", {"stage_output": output, "output_grads": grads, "input_values": inputs}, last_backward
        )

    def _timed(self, kind: str, micro_batch: int, compute, *args):
        begin = time.perf_counter()
        result = compute(micro_batch, *args)
        self.events.append(Event(kind, self.stage_index, micro_batch, begin, time.perf_counter()))
        return result

    def _post_metadata_inference_cleanup(self):
        """Do nothing: no metadata was inferred, and the weights that FSDP gathered for this step must stay gathered."""

    # On the middle ranks, the engine takes the end of one replica and the start of the other for neighbours.

    def set_local_fwd_input(self, prev_stage_outputs, mb_index):
        if not self.is_first:
            super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def get_local_bwd_output(self, mb_index):
        return () if self.is_first else super().get_local_bwd_output(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        if not self.is_last:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class ScheduleDualPipe(_PipelineScheduleRuntime):
    """DualPipe as in the paper: two replicas of the model run through the ranks in opposite directions.

    DualPipeV is one half of it: ranks r and P - 1 - r do what rank r of DualPipeV on P / 2 ranks does. The V's way down
    is the first half of one replica, and its way up is the second half of the other. Stage s of the second replica has
    the number P + s.
    """

    def __init__(self, stages, n_microbatches, loss_fn, scale_grads):
        super().__init__(stages, n_microbatches, loss_fn=loss_fn, scale_grads=scale_grads)
        self.pipeline_order = dualpipe_order(self.pp_group_size, n_microbatches)
        self._prepare_schedule_with_comms(with_messages(self.pipeline_order), format="compute_comms")


class DualPipeVOrder(ScheduleDualPipeV):
    """DualPipeV without stages or processes, for the order of each rank's actions."""

    def __init__(self, pp_group_size: int, num_micro_batches: int):
        self.pp_group_size, self._n_microbatches = pp_group_size, num_micro_batches

    def actions(self, rank: int) -> list[_Action | None]:
        return self._calculate_single_rank_operations(rank)


def dualpipe_order(pp: int, micro_batches: int) -> dict[int, list[_Action]]:
    """Return what each rank computes, with `micro_batches` for each of the two replicas."""
    half_as_many_ranks = DualPipeVOrder(pp // 2, micro_batches)

    def renumber(action: _Action, rank: int) -> _Action:
        if action.sub_actions:
            return action._replace(sub_actions=tuple(renumber(sub, rank) for sub in action.sub_actions))
        of_second_replica = (action.stage_index < pp // 2) == (rank >= pp // 2)
        return action._replace(stage_index=action.stage_index + pp * of_second_replica)

    order = {}
    for rank in range(pp):
        actions = half_as_many_ranks.actions(min(rank, pp - 1 - rank))
        order[rank] = [renumber(action, rank) for action in actions]
    return order


def with_messages(order: dict[int, list[_Action]]) -> dict[int, list[_Action]]:
    """Add the sends and receives to what the ranks of DualPipe compute.

    A message enters both ranks' lists when its sender has computed it. So all messages between two ranks are in the
    same order on both sides. (torch's own function would take the two replicas for one chain of stages.)
    """
    pp = len(order)
    rank_of = stage_ranks("dualpipe", pp)
    todo = {rank: list(actions) for rank, actions in order.items()}
    done, arrived = {rank: [] for rank in order}, set()

    def needed_message(action: _Action) -> tuple | None:
        is_forward = action.computation_type == FORWARD
        first = 0 if is_forward else pp - 1
        if action.computation_type == BACKWARD_WEIGHT or action.stage_index % pp == first:
            return None
        return action.stage_index, is_forward, action.microbatch_index

    def send_result(action: _Action, rank: int) -> None:
        is_forward, stage = action.computation_type == FORWARD, action.stage_index
        last = pp - 1 if is_forward else 0
        if action.computation_type == BACKWARD_WEIGHT or stage % pp == last:
            return
        receiver, micro_batch = stage + (1 if is_forward else -1), action.microbatch_index
        done[rank].append(_Action(stage, SEND_F if is_forward else SEND_B, micro_batch))
        done[rank_of[receiver]].append(_Action(receiver, RECV_F if is_forward else RECV_B, micro_batch))
        arrived.add((receiver, is_forward, micro_batch))

    def is_ready(action: _Action) -> bool:
        return (message := needed_message(action)) is None or message in arrived

    while any(todo.values()):
        remaining = sum(map(len, todo.values()))
        for rank, actions in todo.items():
            passes = (actions[0].sub_actions or (actions[0],)) if actions else ()
            if actions and all(map(is_ready, passes)):
                done[rank].append(actions.pop(0))
                for action in passes:
                    send_result(action, rank)
        assert sum(map(len, todo.values())) < remaining, "each rank waits for another"
    return done


ENGINES = {
    "dualpipev": ScheduleDualPipeV,
    "dualpipe": ScheduleDualPipe,
    "zerobubble": ScheduleZBVZeroBubble,
    "1f1b": Schedule1F1B,
}


def build_engine(schedule: str, stages: list[EngineStage], micro_batches: int):
    """Build the engine that runs a rank's stages. The loss of a micro-batch is what the last stage returns."""
    properties = SCHEDULES[schedule]
    for stage in stages:
        stage.stage_index_to_group_rank = dict(enumerate(stage_ranks(schedule, stage.group_size)))
    chunks = micro_batches // 2 if properties.bidirectional else micro_batches
    arguments = stages if properties.v_shape else stages[0]
    return ENGINES[schedule](arguments, chunks, loss_fn=lambda loss, _: loss, scale_grads=False)


def stages_of_rank(specs: list[StageSpec], schedule: str, pp: int, rank: int) -> list[StageSpec]:
    """Return the stages that a rank holds; in a bidirectional schedule the first replica's, then the second's."""
    if SCHEDULES[schedule].bidirectional:
        return [specs[rank], specs[pp - 1 - rank]]
    return [spec for spec, holder in zip(specs, stage_ranks(schedule, pp), strict=True) if holder == rank]
