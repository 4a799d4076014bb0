"""DualPipe's overlapped pair (V3 §3.2.1): a forward and a backward pass of two micro-batches that take turns.

Whenever one of them has sent rows to other ranks' experts, the other computes until it has sent rows, too. One computes
at a time, and both let go at fixed places, so that the ranks which share experts exchange rows in the same order. On a
CPU, gloo's threads move the rows meanwhile. On a GPU, NCCL does on a stream of its own: what waits for rows is queued
behind the other pass's kernels, in one stream.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch.distributed.pipelining.schedules import _Action, _PipelineContext

from moonwhale.parallel.expert_parallel import Exchange


class Overlap:
    """Called as torch's schedules call it for a pair of passes: `register_custom_function(OVERLAP_F_B, Overlap(…))`."""

    def __init__(self, exchange: Exchange):
        self.exchange = exchange
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="backward")

    def __call__(self, action: _Action, context: _PipelineContext) -> None:
        """What the engine does for one pass and then for the other, in turns."""
        engine = context.schedule_ref
        stages = {stage.stage_index: stage for stage in engine._stages}

        def forward(index: int, number: int) -> None:
            for work in engine.fwd_recv_ops.pop((index, number), ()):
                work.wait()
            given = context.arg_mbs[number], context.kwarg_mbs[number]
            output = stages[index].forward_one_chunk(number, *given, save_forward_output=False)
            engine._maybe_compute_loss(stages[index], output, context.target_mbs, number)
            if index + 1 in stages:
                stages[index + 1].set_local_fwd_input(output, number)

        def backward(index: int, number: int) -> None:
            for work in engine.bwd_recv_ops.pop((index, number), ()):
                work.wait()
            stages[index].backward_one_chunk(number, loss=engine._maybe_get_loss(stages[index], number))
            if index - 1 in stages:
                stages[index - 1].set_local_bwd_input(stages[index].get_local_bwd_output(number), number)

        f, b = action.sub_actions
        self.take_turns(
            lambda: forward(f.stage_index, f.microbatch_index), lambda: backward(b.stage_index, b.microbatch_index)
        )

    def take_turns(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Does both, `first` here and `second` in another thread; each goes on where the exchange waits for rows.

        Raises:
            the error of the one that failed; the other is stopped where it next waits.
        """
        may_go, ended, failed = (threading.Semaphore(1), threading.Semaphore(0)), [False, False], []
        turn = 0
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None  # a thread has its own

        def hand_over() -> None:
            nonlocal turn
            me, other = turn, 1 - turn
            if not ended[other]:
                turn = other
                may_go[other].release()
                may_go[me].acquire()
            if failed:
                raise RuntimeError("the other pass of the pair failed") from failed[0]

        def play(me: int, do: Callable[[], None]) -> None:
            nonlocal turn
            may_go[me].acquire()
            try:
                with torch.cuda.stream(stream) if stream else nullcontext():
                    do()
            except BaseException as error:
                failed.append(error)
            finally:
                ended[me], turn = True, 1 - me
                may_go[1 - me].release()

        self.exchange.hand_over = hand_over
        try:
            other = self.worker.submit(play, 1, second)
            play(0, first)
            other.result()
        finally:
            self.exchange.hand_over = lambda: None
        if failed:
            raise failed[0]
