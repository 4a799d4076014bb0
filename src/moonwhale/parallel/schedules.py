"""The order in which a pipeline's ranks compute: DualPipe (V3 §3.2.1), DualPipeV, and others to compare them with.

The engine is torch.distributed.pipelining, which also moves what the stages return.
"""

import time
from types import SimpleNamespace
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

from moonwhale.parallel.options import SCHEDULES, places
from moonwhale.parallel.stages import Part


def splits_backward(version: str = torch.__version__) -> bool:
    """Whether torch splits a backward pass into input's and weights' correctly: before 2.12 a router's gradient comes
    out wrong, and nothing says so.
    """
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 12)


class Event(NamedTuple):
    """What a rank did when: F forward, B backward, or its halves I (inputs) and W (weights)."""

    kind: str
    stage: int
    micro_batch: int
    begin: float  # seconds, of time.perf_counter
    end: float


class EngineStage(PipelineStage):
    """A stage as the engine sees it.

    index: its number among all `count`, copies included; the first and last of each copy are the `part`'s.
    half: of two micro-batches that come together, the one for this stage's copy; None: it gets one, and takes it all.
    whole: the backward pass is not split. Where the schedule asks for the inputs' gradient, the weights' is computed
    with it, and where it asks for the weights', nothing is left to do.
    """

    def __init__(self, stage, part: Part, index: int, count: int, device, half=None, whole=False, **kwargs):
        self.part, self.half, self.whole = part, half, whole
        self.events: list[Event] = []
        super().__init__(stage, index, count, device, **kwargs)

    @property
    def is_first(self) -> bool:
        return self.part.is_first

    @property
    def is_last(self) -> bool:
        return self.part.is_last

    def _get_init_p2p_neighbors_ops(self):
        """Without what a rank with both stages would send itself, which torch 2.11 asks of gloo in vain."""
        here = dist.get_rank(self.group)
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != here]

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        if self.half is not None:
            kwargs = {name: value.chunk(2)[self.half] for name, value in kwargs.items()}
        return self._timed("F", fwd_chunk_id, super().forward_one_chunk, args, kwargs, save_forward_output)

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        full = full_backward or self.whole
        self._timed("B" if full else "I", bwd_chunk_id, super().backward_one_chunk, loss, full, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        if not self.whole:
            do = self._first_weights if self.is_first else super().backward_weight_one_chunk
            self._timed("W", bwd_chunk_id, do, last_backward)

    def _first_weights(self, bwd_chunk_id, last_backward):
        """A first stage has no inputs' gradient, so that all is left to do; torch does it for number 0 only."""
        inputs, _, output, grads = self.backward_state.pop(bwd_chunk_id)
        self.dw_runner.pop(bwd_chunk_id)
        self.backward_maybe_with_nosync(
            "full", {"stage_output": output, "output_grads": grads, "input_values": inputs}, last_backward
        )

    def _timed(self, kind: str, micro_batch: int, do, *args):
        begin = time.perf_counter()
        result = do(micro_batch, *args)
        self.events.append(Event(kind, self.stage_index, micro_batch, begin, time.perf_counter()))
        return result

    def _post_metadata_inference_cleanup(self):
        """Nothing was inferred, and weights that FSDP gathered for this step must not be put into parts again."""

    # The engine takes the end of one copy and the start of the next, on one rank, for neighbours.

    def set_local_fwd_input(self, prev_stage_outputs, mb_index):
        if not self.is_first:
            super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def get_local_bwd_output(self, mb_index):
        return () if self.is_first else super().get_local_bwd_output(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        if not self.is_last:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class ScheduleDualPipe(_PipelineScheduleRuntime):
    """DualPipe as the paper has it: two copies of the model run through the ranks in opposite directions.

    A V cut in half is this: ranks r and P - 1 - r do what rank r of a V over P / 2 ranks does, where the V's way down
    is one copy's first half and its way up the other copy's second. Stage s of the second copy has the number P + s.
    """

    def __init__(self, stages, n_microbatches, loss_fn, scale_grads):
        super().__init__(stages, n_microbatches, loss_fn=loss_fn, scale_grads=scale_grads)
        self.pipeline_order = dualpipe_order(self.pp_group_size, n_microbatches)
        self._prepare_schedule_with_comms(with_messages(self.pipeline_order), format="compute_comms")


def dualpipe_order(ranks: int, micro_batches: int) -> dict[int, list[_Action]]:
    """What each rank computes, with `micro_batches` for each of the two copies."""
    half = SimpleNamespace(pp_group_size=ranks // 2, _n_microbatches=micro_batches)

    def own(action: _Action, rank: int) -> _Action:
        if action.sub_actions:
            return action._replace(sub_actions=tuple(own(sub, rank) for sub in action.sub_actions))
        second = (action.stage_index < ranks // 2) == (rank >= ranks // 2)
        return action._replace(stage_index=action.stage_index + ranks * second)

    order = {}
    for rank in range(ranks):
        actions = ScheduleDualPipeV._calculate_single_rank_operations(half, min(rank, ranks - 1 - rank))
        order[rank] = [own(action, rank) for action in actions]
    return order


def with_messages(order: dict[int, list[_Action]]) -> dict[int, list[_Action]]:
    """What each rank computes, with what it sends and receives in between, for two copies that run opposite ways.

    A message is put into both ranks' lists when its sender can have computed it, so that its order among the others
    between the two is the same on both sides. (torch's own version takes the two copies for one chain.)
    """
    ranks = len(order)
    place = places("dualpipe", ranks)
    todo = {rank: list(actions) for rank, actions in order.items()}
    done, arrived = {rank: [] for rank in order}, set()

    def input_of(action: _Action) -> tuple | None:
        forward = action.computation_type == FORWARD
        if action.computation_type == BACKWARD_WEIGHT or action.stage_index % ranks == (0 if forward else ranks - 1):
            return None
        return action.stage_index, forward, action.microbatch_index

    def send(action: _Action, rank: int) -> None:
        forward, stage = action.computation_type == FORWARD, action.stage_index
        if action.computation_type == BACKWARD_WEIGHT or stage % ranks == (ranks - 1 if forward else 0):
            return
        after, number = stage + (1 if forward else -1), action.microbatch_index
        done[rank].append(_Action(stage, SEND_F if forward else SEND_B, number))
        done[place[after]].append(_Action(after, RECV_F if forward else RECV_B, number))
        arrived.add((after, forward, number))

    while any(todo.values()):
        before = sum(map(len, todo.values()))
        for rank, actions in todo.items():
            parts = (actions[0].sub_actions or (actions[0],)) if actions else ()
            if actions and all(input_of(part) in arrived or input_of(part) is None for part in parts):
                done[rank].append(actions.pop(0))
                for part in parts:
                    send(part, rank)
        assert sum(map(len, todo.values())) < before, "each rank waits for another"
    return done


ENGINES = {
    "dualpipev": ScheduleDualPipeV,
    "dualpipe": ScheduleDualPipe,
    "zerobubble": ScheduleZBVZeroBubble,
    "1f1b": Schedule1F1B,
}


def build_engine(schedule: str, stages: list[EngineStage], micro_batches: int):
    """The engine that runs a rank's stages; each micro-batch's loss is what the last stage returns."""
    kind = SCHEDULES[schedule]
    for stage in stages:
        ranks = places(schedule, stage.group_size)
        stage.stage_index_to_group_rank = dict(enumerate(ranks))
    chunks = micro_batches // 2 if kind.mirrored else micro_batches
    arguments = stages if kind.v_shape else stages[0]
    return ENGINES[schedule](arguments, chunks, loss_fn=lambda loss, _: loss, scale_grads=False)


def own_parts(parts: list[Part], schedule: str, ranks: int, rank: int) -> list[Part]:
    """The parts that `rank` holds; of a mirrored schedule, the first copy's and the second's."""
    if SCHEDULES[schedule].mirrored:
        return [parts[rank], parts[ranks - 1 - rank]]
    return [part for part, place in zip(parts, places(schedule, ranks), strict=True) if place == rank]
