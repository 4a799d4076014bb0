"""DualPipe's overlapped pair (V3 §3.2.1): a forward and a backward pass of two micro-batches that take turns.

When one pass has sent rows to other ranks' experts, the other pass computes until it has sent rows, too. Only one pass
computes at a time, and both switch at fixed points, so all ranks that share experts exchange rows in the same order. On
a CPU, gloo's threads move the rows meanwhile. On a GPU, NCCL moves them on its own stream, and the kernels that wait
for the rows are queued behind the other pass's kernels, in one stream.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch.distributed.pipelining.schedules import _Action, _PipelineContext

from moonwhale.parallel.expert_parallel import AllToAll


class Overlap:
    """Runs an overlapped pair. Register it with torch's engine: `register_custom_function(OVERLAP_F_B, Overlap(…))`."""

    def __init__(self, all_to_all: AllToAll):
        self.all_to_all = all_to_all
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="backward")

    def __call__(self, action: _Action, context: _PipelineContext) -> None:
        """Run both passes in turns; each does what torch's engine does for it."""
        engine = context.schedule_ref
        stages = {stage.stage_index: stage for stage in engine._stages}

        def forward(stage: int, micro_batch: int) -> None:
            for work in engine.fwd_recv_ops.pop((stage, micro_batch), ()):
                work.wait()
            args, kwargs = context.arg_mbs[micro_batch], context.kwarg_mbs[micro_batch]
            output = stages[stage].forward_one_chunk(micro_batch, args, kwargs, save_forward_output=False)
            engine._maybe_compute_loss(stages[stage], output, context.target_mbs, micro_batch)
            if stage + 1 in stages:
                stages[stage + 1].set_local_fwd_input(output, micro_batch)

        def backward(stage: int, micro_batch: int) -> None:
            for work in engine.bwd_recv_ops.pop((stage, micro_batch), ()):
                work.wait()
            loss = engine._maybe_get_loss(stages[stage], micro_batch)
            stages[stage].backward_one_chunk(micro_batch, loss=loss)
            if stage - 1 in stages:
                stages[stage - 1].set_local_bwd_input(stages[stage].get_local_bwd_output(micro_batch), micro_batch)

        f, b = action.sub_actions
        self.take_turns(
            lambda: forward(f.stage_index, f.microbatch_index), lambda: backward(b.stage_index, b.microbatch_index)
        )

    def take_turns(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Run `first` here and `second` in another thread. They switch when the all-to-all waits for rows.

        Raises:
            Exception: the error of the pass that failed. The other stops where it would wait next.
        """
        # Pass 0 or 1 computes while it is its `turn`; the other waits for its semaphore.
        may_run, ended, errors = (threading.Semaphore(1), threading.Semaphore(0)), [False, False], []
        turn = 0
        # Each thread has a current stream of its own
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

        def switch() -> None:
            nonlocal turn
            me, other = turn, 1 - turn
            if not ended[other]:
                turn = other
                may_run[other].release()
                may_run[me].acquire()
            if errors:
                raise RuntimeError("the other pass of the pair failed") from errors[0]

        def run(me: int, compute: Callable[[], None]) -> None:
            nonlocal turn
            may_run[me].acquire()
            try:
                with torch.cuda.stream(stream) if stream else nullcontext():
                    compute()
            except BaseException as error:
                errors.append(error)
            finally:
                ended[me], turn = True, 1 - me
                may_run[1 - me].release()

        self.all_to_all.while_waiting = switch
        try:
            other = self.worker.submit(run, 1, second)
            run(0, first)
            other.result()
        finally:
            self.all_to_all.while_waiting = lambda: None
        if errors:
            raise errors[0]
