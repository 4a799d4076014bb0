"""The thread that runs the model for a server: requests come in from the event loop, what they gain goes back to it."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from typing import NamedTuple

from moonwhale.errors import UserError, one_line
from moonwhale.infer.scheduler import Request, Scheduler

CROWD = 8  # so many jobs more, and the tokens of one step more go together


class Gain(NamedTuple):
    """What a step added to one request of a job."""

    index: int  # which request
    text: str
    tokens: int  # how many it has by now
    finish_reason: str | None


class Failed(Exception):
    """The model could not go on, for no fault of the request's."""


class Job:
    """Requests on their way for one asyncio task, which iterates over what they gain."""

    def __init__(self, worker: "Worker", requests: list[Request]):
        self.requests, self._worker, self._loop = requests, worker, asyncio.get_running_loop()
        self._gains: asyncio.Queue[Gain | Exception] = asyncio.Queue()
        self._told = [0] * len(requests)
        self._ended = [False] * len(requests)

    async def gains(self, seconds: float) -> AsyncIterator[Gain]:
        """Ends with the last request's finish_reason. Raises UserError, Failed, and TimeoutError after so long."""
        going, deadline = len(self.requests), self._loop.time() + seconds
        while going:
            async with asyncio.timeout_at(deadline):
                gain = await self._gains.get()
            if isinstance(gain, Exception):
                raise gain
            going -= gain.finish_reason is not None
            yield gain

    @property
    def ended(self) -> bool:
        return all(self._ended)

    def _news(self, can_wait: bool) -> list[Gain]:
        """What the requests have gained since the last call, called in the worker's thread between steps. Nothing but
        first tokens and ends if the rest `can_wait`.
        """
        news = []
        for i, request in enumerate(self.requests):
            tokens, told, reason = len(request.token_ids), self._told[i], request.finish_reason
            if not self._ended[i] and (reason or (tokens > told and not (can_wait and told))):
                self._told[i], self._ended[i] = tokens, reason is not None
                news.append(Gain(i, request.text.take(), tokens, reason))
        return news

    def _tell(self, gains: list) -> None:
        for gain in gains:
            self._gains.put_nowait(gain)


class Worker:
    """Steps a scheduler in a thread of its own for as long as there are jobs."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self._inbox = scheduler, queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._steps = 0
        self._thread = threading.Thread(target=self._run, name="moonwhale-model", daemon=True)

    @property
    def running(self) -> int:
        return len(self.scheduler.running) + (self.scheduler.reading is not None)

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + self._inbox.qsize()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends what runs, and the thread."""
        self._inbox.put(("stop", None))
        self._thread.join()

    def submit(self, requests: list[Request]) -> Job:
        job = Job(self, requests)
        self._inbox.put(("submit", job))
        return job

    def cancel(self, job: Job) -> None:
        """Frees the slots of a job nobody waits for any more."""
        if not job.ended:
            self._inbox.put(("cancel", job))

    def _run(self) -> None:
        while True:
            while not self._jobs or not self._inbox.empty():
                what, job = self._inbox.get()
                if what == "stop":
                    self._give_up(Failed("the server is shutting down"))
                    return
                self._take(what, job)
            try:
                self.scheduler.step()
                self._deliver()
            except Exception as error:  # whatever it is, the server goes on with the next request
                self._give_up(Failed(one_line(error)))

    def _take(self, what: str, job: Job) -> None:
        if what == "cancel":
            for request in job.requests:
                self.scheduler.cancel(request)
            return
        try:
            for request in job.requests:
                self.scheduler.submit(request)
            self._jobs.append(job)
        except UserError as error:
            for request in job.requests:
                self.scheduler.cancel(request)
            job._loop.call_soon_threadsafe(job._tell, [error])

    def _deliver(self) -> None:
        """Hands every job what it has gained, in one call into the event loop. With many jobs the tokens of a few
        steps go together: an event costs the loop as much time as a token does the model.
        """
        self._steps += 1
        can_wait = self._steps % (1 + len(self._jobs) // CROWD) > 0
        news = [(job, gains) for job in self._jobs if (gains := job._news(can_wait))]
        self._jobs = [job for job in self._jobs if not job.ended]
        if news:
            news[0][0]._loop.call_soon_threadsafe(lambda: [job._tell(gains) for job, gains in news])

    def _give_up(self, error: Exception) -> None:
        for job in self._jobs:
            for request in job.requests:
                self.scheduler.cancel(request)
            job._loop.call_soon_threadsafe(job._tell, [error])
        self._jobs = []
