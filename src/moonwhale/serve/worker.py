"""The thread that runs the model. The event loop submits requests to it, and receives the tokens that it generates."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from moonwhale.errors import UserError, one_line
from moonwhale.infer.request import Request
from moonwhale.infer.scheduler import Scheduler

MAX_FAILURES = 5  # steps that fail in a row before the model counts as broken
JOBS_PER_STEP = 8  # for every 8 jobs, chunks collect the tokens of one more step,
LONGEST_CHUNK = 0.2  # but not for longer than this, in seconds


class TokenChunk(NamedTuple):
    """What one or more steps added to one request of a job."""

    request: Request
    index: int  # of the request in its job
    text: str  # the new text
    span: slice  # the new tokens among all tokens of the request
    finish_reason: str | None


class WorkerError(Exception):
    """The model could not continue, through no fault of the request."""


class GenerationJob:
    """Requests that one HTTP request has submitted. `chunks` yields what they generate, in one asyncio task."""

    def __init__(self, requests: list[Request]):
        self.requests = requests
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[TokenChunk | Exception] = asyncio.Queue()
        self._num_sent = [0] * len(requests)  # tokens of each request that are in a chunk
        self._ended = [False] * len(requests)

    @property
    def ended(self) -> bool:
        return all(self._ended)

    async def chunks(self, timeout: float) -> AsyncIterator[TokenChunk]:
        """Yields chunks until every request has a finish_reason.

        Raises:
            UserError: the scheduler refused a request.
            WorkerError: the model failed, or the server shuts down.
            TimeoutError: the requests took longer than `timeout` seconds in all.
        """
        num_running, deadline = len(self.requests), self.loop.time() + timeout
        while num_running:
            async with asyncio.timeout_at(deadline):
                item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            num_running -= item.finish_reason is not None
            yield item

    def collect(self, ends_only: bool) -> list[TokenChunk]:
        """Returns what the requests have generated since the last call. The worker's thread calls it between steps.

        With `ends_only`, a request gives a chunk only for its first token and for its end.
        """
        chunks = []
        for i, request in enumerate(self.requests):
            num_tokens, num_sent, reason = len(request.token_ids), self._num_sent[i], request.finish_reason
            has_news = num_tokens > num_sent and not (ends_only and num_sent)
            if not self._ended[i] and (reason or has_news):
                self._num_sent[i], self._ended[i] = num_tokens, reason is not None
                chunks.append(TokenChunk(request, i, request.text.take(), slice(num_sent, num_tokens), reason))
        return chunks


class Worker:
    """Steps a scheduler in its own thread for as long as there are jobs."""

    def __init__(self, scheduler: Scheduler, restarts: bool = False, on_end: Callable[[], None] = lambda: None):
        """`restarts`: go on after a failure that would end the thread. Else `on_end` is called when it has ended."""
        self.scheduler = scheduler
        self.failure: str | None = None  # why the thread has ended
        self._restarts, self._on_end = restarts, on_end
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the thread
        self._jobs: list[GenerationJob] = []
        self._num_submitted, self._num_scheduled = 0, 0  # requests so far; each number is one thread's to change
        self._num_steps, self._delivered = 0, 0.0  # steps so far, and the time of the last full delivery
        self._thread = threading.Thread(target=self._run, name="moonwhale-model", daemon=True)

    @property
    def num_running(self) -> int:
        prefilling = self.scheduler.prefilling  # read once: the model's thread may end it meanwhile
        return _num_open([*self.scheduler.running, *([prefilling] if prefilling else [])])

    @property
    def num_waiting(self) -> int:
        return _num_open(list(self.scheduler.waiting)) + self._num_submitted - self._num_scheduled

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the running jobs and the thread."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, requests: list[Request]) -> GenerationJob:
        job = GenerationJob(requests)
        self._num_submitted += len(requests)
        self._inbox.put(lambda: self._schedule(job))
        if self.failure:  # the thread may have emptied its inbox before
            job.queue.put_nowait(WorkerError(self.failure))
        return job

    def cancel(self, job: GenerationJob) -> None:
        """Frees the slots of a job whose client has gone or has its answer."""
        if not job.ended:
            self._inbox.put(lambda: self._cancel_requests(job))

    def _run(self) -> None:
        while True:
            try:
                self._work()
                reason = "the server is shutting down"
            except BaseException as error:  # whatever ends this thread must be seen by the clients
                reason = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
                if self._restarts:
                    self._fail_all(WorkerError(reason))
                    continue
                self.failure = reason
            break
        while not self._inbox.empty():  # jobs that nobody would answer
            if (action := self._inbox.get()) is not None:
                action()
        self._fail_all(WorkerError(reason))
        if self.failure:
            self._on_end()

    def _work(self) -> None:
        """Steps until the inbox holds None.

        One failed step fails the running jobs, and the next ones are tried. A model that cannot do a step at all ends
        the loop: raises the error of the last of MAX_FAILURES failures in a row.
        """
        failures = 0
        while True:
            while not self._jobs or not self._inbox.empty():
                action = self._inbox.get()
                if action is None:
                    return
                action()
            try:
                self.scheduler.step()
                self._deliver()
                failures = 0
            except Exception as error:
                failures += 1
                if failures == MAX_FAILURES:
                    raise
                self._fail_all(WorkerError(one_line(error)))

    def _schedule(self, job: GenerationJob) -> None:
        self._num_scheduled += len(job.requests)
        try:
            for request in job.requests:
                self.scheduler.submit(request)
            self._jobs.append(job)
        except UserError as error:
            self._fail(job, error)

    def _cancel_requests(self, job: GenerationJob) -> None:
        for request in job.requests:
            self.scheduler.cancel(request)

    def _deliver(self) -> None:
        """Hands every job its new chunks, in one call into the event loop.

        An event costs the event loop as much time as a token costs the model. With many jobs, a chunk therefore
        collects the tokens of several steps.
        """
        self._num_steps += 1
        is_late = time.monotonic() > self._delivered + LONGEST_CHUNK
        ends_only = self._num_steps % (1 + len(self._jobs) // JOBS_PER_STEP) > 0 and not is_late
        if not ends_only:
            self._delivered = time.monotonic()
        deliveries = [(job, chunk) for job in self._jobs for chunk in job.collect(ends_only)]
        self._jobs = [job for job in self._jobs if not job.ended]

        def put_all() -> None:
            for job, chunk in deliveries:
                job.queue.put_nowait(chunk)

        if deliveries:
            deliveries[0][0].loop.call_soon_threadsafe(put_all)

    def _fail_all(self, error: WorkerError) -> None:
        for job in self._jobs:
            self._fail(job, error)
        self._jobs = []

    def _fail(self, job: GenerationJob, error: Exception) -> None:
        self._cancel_requests(job)
        job.loop.call_soon_threadsafe(job.queue.put_nowait, error)


def _num_open(requests: list[Request]) -> int:
    """Counts the requests that have not ended. The scheduler drops the others only at its next step."""
    return sum(request.finish_reason is None for request in requests)
