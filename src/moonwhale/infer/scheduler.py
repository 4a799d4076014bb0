"""Continuous batching: requests come and go at any step, each in a slot of one latent cache.

A step verifies the drafts of every running sequence in one forward (without drafts: gives each its next token), reads a
piece of the oldest waiting prompt, and has the MTP modules draft for the next step. Sequences that have ended leave
their slot to the last one, so that the running ones always fill the first slots.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moonwhale.errors import UserError
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.detokenizer import TextStream
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.sampling import Noise, choose
from moonwhale.infer.sampling_options import SamplingOptions

PIECE = 256  # tokens of a prompt, or of several, that are read between two steps


@dataclass(eq=False)
class Request:
    """One prompt and what has been added to it.

    finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens or a full context), "cancelled", or None.
    forwards: how often the main model ran for it, the reading of the prompt counted as one.
    drafted, accepted: for each depth of the MTP chain, guesses that were put to the test and those that held.
    logprobs: for each token, when asked for, its log-probability and the likeliest tokens' as {id: log-probability}.
    """

    prompt: list[int]
    options: SamplingOptions
    eos: set[int]
    text: TextStream
    noise: Noise
    limit: int  # most tokens to add
    top_logprobs: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    forwards: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    drafts: list[int] = field(default_factory=list)
    cached: int = 0  # tokens of prompt and answer whose entries are in the cache
    tail: Tensor | None = None  # (Q, hidden) hidden states of the last forward, the `held` + 1 first of which count
    held: int = 0

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.token_ids

    def push(self, token: int) -> None:
        self.token_ids.append(token)
        if token in self.eos:
            self.finish_reason = "eos"
        elif self.text.push(token):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            self.text.flush()
        self.noise.forget(len(self.token_ids))
        self.seconds = time.perf_counter() - self.start

    def count(self, depth: int) -> None:
        """Adds a forward's guesses to the statistics; one behind a wrong one was never put to the test."""
        self.drafted += [0] * (depth - len(self.drafted))
        self.accepted += [0] * (depth - len(self.accepted))
        for k in range(min(self.held + 1, depth)):
            self.drafted[k] += 1
            self.accepted[k] += k < self.held


class Scheduler:
    """Runs requests on a decoder, with a cache of at most `memory` bytes and at most `sequences` at a time."""

    def __init__(self, decoder: Decoder, memory: int, sequences: int = 64, drafting: Drafting | None = None):
        self.decoder, self.memory, self.sequences = decoder, memory, sequences
        self.drafting = drafting or Drafting(len(decoder.modules))
        self.cache = decoder.cache()
        self.running: list[Request] = []  # request i sits in slot i
        self.reading: Request | None = None  # in the slot after them
        self.waiting: deque[Request] = deque()
        self._drafting_took = 0.0
        self._piece = max(PIECE // decoder.block_size, 1) * decoder.block_size

    @property
    def idle(self) -> bool:
        return not (self.running or self.reading or self.waiting)

    def submit(self, request: Request) -> None:
        """Lets a request wait for its turn; a UserError if not even an empty cache could hold it."""
        needed = self._bytes(1, self._needed(request))
        if needed > self.memory:
            raise UserError(
                f"the prompt and its answer need a cache of {needed / 1e6:.1f} MB, and there are "
                f"{self.memory / 1e6:.1f} MB: shorten the prompt, or ask for fewer tokens"
            )
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free at the next step."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> None:
        """One forward for all running sequences, and a piece of the oldest prompts."""
        self._retire()
        if self.running:
            start, sequences, depth = time.perf_counter(), len(self.running), len(self.running[0].drafts)
            held = self._verify(depth)
            self.drafting.record(sequences, depth, time.perf_counter() - start + self._drafting_took, held)
            self._retire()
        depth = self.drafting.depth(max(len(self.running), 1))
        self._read(depth)
        start = time.perf_counter()
        self._draft(depth)
        self._drafting_took = time.perf_counter() - start

    def _verify(self, depth: int) -> list[int]:
        """Runs each sequence's last token and its drafts through the main model, and adds what that says: a token, and
        one more for each draft that held. Returns how many did, a sequence each.
        """
        rows, decoder = self.running, self.decoder
        tokens = torch.tensor([[row.token_ids[-1], *row.drafts] for row in rows], device=decoder.device)
        placement = decoder.place(self.cache, 0, [row.cached for row in rows], depth + 1)
        hidden = decoder.run(tokens, self.cache, placement)
        logits = decoder.head(hidden)
        for row, states in zip(rows, hidden, strict=True):
            row.tail, row.held = states, 0
            row.forwards += 1
        going = list(range(len(rows)))
        for m in range(depth + 1):
            chosen = self._add(logits[going, m], [rows[i] for i in going])
            held = [i for i, token in zip(going, chosen, strict=True) if m < depth and token == rows[i].drafts[m]]
            going = [i for i in held if rows[i].finish_reason is None]
            for i in going:
                rows[i].held += 1
            if not going:
                break
        for row in rows:
            row.cached += row.held + 1
            row.count(depth)
        return [row.held for row in rows]

    def _add(self, logits: Tensor, rows: list[Request]) -> list[int]:
        """The next token of each row, from (N, V) logits."""
        chosen = choose(logits, rows)
        for row, token, scores in zip(rows, chosen, logits, strict=True):
            if row.top_logprobs is not None:
                logprobs = scores.float().log_softmax(-1)
                top = logprobs.topk(row.top_logprobs)
                likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                row.logprobs.append((logprobs[token].item(), likeliest))
            row.push(token)
        return chosen

    def _read(self, depth: int) -> None:
        """Reads waiting prompts, about PIECE tokens in all, the MTP modules down to `depth` with them."""
        left = self._piece
        while left > 0 and (rows := [self.reading] if self.reading else self._admit(left)):
            pieces = [row.prompt[row.cached : row.cached + self._piece] for row in rows]
            hidden = self._forward(rows, pieces, depth)
            left -= hidden.shape[0] * hidden.shape[1]
            for row, piece in zip(rows, pieces, strict=True):
                row.cached += len(piece)
            self.reading = rows[0] if rows[0].cached < len(rows[0].prompt) else None
            if self.reading is None:
                last = torch.stack([states[len(piece) - 1] for states, piece in zip(hidden, pieces, strict=True)])
                for row, states in zip(rows, last, strict=True):
                    row.tail, row.held, row.forwards = states[None], 0, 1
                self._add(self.decoder.head(last), rows)
                self.running += rows

    def _forward(self, rows: list[Request], pieces: list[list[int]], depth: int) -> Tensor:
        """Hidden states (B, Q, hidden) of prompts' pieces; what fills up the shorter ones is written over later."""
        decoder, length = self.decoder, max(map(len, pieces))

        def filled(tokens: list[list[int]]) -> Tensor:
            return torch.tensor([(some + [0] * length)[:length] for some in tokens], device=decoder.device)

        placement = decoder.place(self.cache, len(self.running), [row.cached for row in rows], length)
        hidden = states = decoder.run(filled(pieces), self.cache, placement)
        for k in range(1, depth + 1):
            ahead = filled([row.prompt[row.cached + k : row.cached + k + length] for row in rows])
            states = decoder.guess(k, states, ahead, self.cache, placement)
        return hidden

    def _draft(self, depth: int) -> None:
        """Has the first `depth` MTP modules guess the tokens after each sequence's last.

        Module k runs over all positions of the last forward, whose next tokens are known now; a position of a guess
        that did not hold is written over next time.
        """
        rows, decoder = self.running, self.decoder
        for row in rows:
            row.drafts = []
        if depth == 0 or not rows:
            return
        length = max(len(row.tail) for row in rows)
        hidden = torch.stack([torch.nn.functional.pad(row.tail, (0, 0, 0, length - len(row.tail))) for row in rows])
        placement = decoder.place(self.cache, 0, [row.cached - row.held - 1 for row in rows], length)
        newest = torch.arange(len(rows), device=decoder.device), torch.tensor([row.held for row in rows])
        for k in range(1, depth + 1):
            after = [row.token_ids[-row.held - 1 :] + row.drafts for row in rows]
            ahead = [(tokens[k - 1 :] + [0] * length)[:length] for tokens in after]
            hidden = decoder.guess(k, hidden, torch.tensor(ahead, device=decoder.device), self.cache, placement)
            guesses = choose(decoder.draft_head(hidden[newest]), rows, ahead=k - 1)
            for row, token in zip(rows, guesses, strict=True):
                row.drafts.append(token)

    def _retire(self) -> None:
        """Lets go of what has ended, the last sequences moving into the slots that become free."""
        self.waiting = deque(row for row in self.waiting if row.finish_reason is None)
        if self.reading and self.reading.finish_reason is not None:
            self.reading = None
        before = len(self.running)
        for i in reversed(range(before)):
            if self.running[i].finish_reason is not None:
                last = self.running.pop()
                if i < len(self.running):
                    self.running[i] = last
                    self.cache.move(len(self.running), i, last.cached)
        if self.reading and len(self.running) < before:
            self.cache.move(before, len(self.running), self.reading.cached)

    def _admit(self, tokens: int) -> list[Request]:
        """The oldest waiting request, if there is room for it, and those after it that are short enough to be read with
        it in one forward of so many tokens; they get the slots after the running ones.
        """
        rows: list[Request] = []
        while self.waiting:
            longest = max(len(row.prompt) for row in (*rows, self.waiting[0]))
            if (rows and (len(rows) + 1) * longest > tokens) or not self._make_room(rows):
                break
            rows.append(self.waiting.popleft())
            self.cache.clear(len(self.running) + len(rows) - 1)
        return rows

    def _make_room(self, admitted: list[Request]) -> bool:
        """Whether the cache can hold the oldest waiting request as well; grows it if need be."""
        slots = len(self.running) + len(admitted) + 1
        if slots > self.sequences:
            return False
        length = max(self._needed(row) for row in (*self.running, *admitted, self.waiting[0]))
        if self._bytes(slots, length) > self.memory:
            return False
        if slots > self.cache.slots or length > self.cache.length:
            roomy = min(1 << (slots - 1).bit_length(), self.sequences), max(length, self.cache.length)
            self.cache.resize(*(roomy if self._bytes(*roomy) <= self.memory else (slots, length)))
        return True

    def _needed(self, row: Request) -> int:
        """Cache entries a request can come to take, drafts that may not hold included."""
        longest = len(row.prompt) + row.limit + 2 * len(self.decoder.modules) + 1
        return -(-longest // self.decoder.block_size) * self.decoder.block_size

    def _bytes(self, slots: int, length: int) -> float:
        return slots * length * self.cache.bytes_per_token
