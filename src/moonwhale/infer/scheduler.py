"""`Scheduler`: continuous batching. Requests join and leave at any step, each in a slot of one latent cache.

A step has three parts. Each decides what to run, runs it on the decoder, and takes the results:
1. Verify: one forward over all running sequences. It gives each its next token, and one more for each accepted draft.
2. Prefill: a forward over a piece of the oldest waiting prompts.
3. Draft: the MTP modules draft tokens for the next step.

The running sequences always fill the first slots. When one ends, the last one moves into its slot.
"""

import time
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.errors import UserError
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.request import Request
from moonwhale.infer.sampling import choose, logprobs_of

# Tokens of one or several prompts that are prefilled in a step. Prompts that share a forward have at most half as many,
# so that they are shorter than EXPAND_FROM_TOKENS in decoder.py.
PREFILL_TOKENS = 256


class Scheduler:
    """Runs requests on a decoder, at most `slots` at a time, with a cache of at most `memory` bytes."""

    def __init__(self, decoder: Decoder, memory: int, slots: int = 64, drafting: Drafting | None = None):
        self.decoder, self.memory, self.slots = decoder, memory, slots
        self.drafting = drafting or Drafting(len(decoder.modules))
        self.cache = decoder.cache(self.drafting.depths[-1])
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # request i is in slot i
        self.prefilling: Request | None = None  # a prompt of several pieces, in the slot after the running ones
        self._drafting_seconds = 0.0
        self._prefill_tokens = max(PREFILL_TOKENS // decoder.block_size, 1) * decoder.block_size  # whole blocks

    def submit(self, request: Request) -> None:
        """Queue a request. Raises UserError as `check_memory`."""
        self.check_memory(request)
        self.waiting.append(request)

    def check_memory(self, request: Request) -> None:
        """Raise UserError if even an empty cache could not hold the request."""
        needed = self._cache_bytes(1, self._entries(request))
        if needed > self.memory:
            raise UserError(
                f"the prompt and its answer need a cache of {needed / 1e6:.1f} MB, and there are "
                f"{self.memory / 1e6:.1f} MB: shorten the prompt, or ask for fewer tokens"
            )

    def cancel(self, request: Request) -> None:
        """End a request now. Its slot is free at the next step."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> None:
        """Give every running sequence at least one token, and prefill a piece of the oldest prompts."""
        self._release_slots()
        if self.running:
            self._verify()
            self._release_slots()
        depth = self.drafting.depth(max(len(self.running), 1))
        self._prefill(depth)
        self._draft(depth)

    # --- verify ------------------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        """Verify the drafts of all running sequences, and tell `drafting` how long the cycle took."""
        start = time.perf_counter()
        depth = len(self.running[0].drafts)
        hidden = self._run_drafts(depth)
        self._take_tokens(hidden, depth)
        seconds = time.perf_counter() - start + self._drafting_seconds
        self.drafting.record(depth, seconds, [row.verdicts for row in self.running])

    def _run_drafts(self, depth: int) -> Tensor:
        """Run each sequence's last token and its drafts through the main model: (B, depth + 1, hidden)."""
        tokens = [[request.token_ids[-1], *request.drafts] for request in self.running]
        placement = self.decoder.place(self.cache, 0, [request.cached for request in self.running], depth + 1)
        return self.decoder.run(torch.tensor(tokens, device=self.decoder.device), self.cache, placement)

    def _take_tokens(self, hidden: Tensor, depth: int) -> None:
        """Add a token to each sequence, and another one after each draft that it confirms."""
        rows, logits = self.running, self.decoder.head(hidden)  # (B, depth + 1, V)
        for row in rows:
            row.verdicts = []
            row.forwards += 1
        accepting = list(range(len(rows)))  # running rows whose drafts have all been accepted so far
        for k in range(depth + 1):
            chosen = self._add_tokens(logits[accepting, k], [rows[i] for i in accepting])
            if k == depth:
                break
            for i, token in zip(accepting, chosen, strict=True):
                rows[i].verdicts.append(token == rows[i].drafts[k])
            accepting = [i for i in accepting if rows[i].verdicts[k] and rows[i].finish_reason is None]
            if not accepting:
                break
        for row, states in zip(rows, hidden, strict=True):
            self._advance(row, states[: row.n_accepted + 1])
            row.count_drafts()

    def _advance(self, row: Request, states: Tensor) -> None:
        """Count the tokens of these hidden states (Q, hidden) as cached, and keep the last states for `_draft`."""
        row.cached += len(states)
        needed = self.drafting.depths[-1] + 1
        last = states[-needed:]
        if row.hidden is None or len(last) == needed:
            row.hidden = last.clone()  # the next replay of a CUDA graph overwrites `states`
        else:
            row.hidden = torch.cat([row.hidden[len(last) - needed :], last])

    def _add_tokens(self, logits: Tensor, rows: list[Request]) -> list[int]:
        """Choose the next token of each row from (N, V) logits, add it, and return all of them."""
        chosen = choose(logits, rows)
        for row, token, scores in zip(rows, chosen, logits, strict=True):
            if row.limit == 0:  # the prompt was only to be scored
                row.finish_reason = "length"
                continue
            if row.top_logprobs is not None:
                row.logprobs += logprobs_of(scores[None], [token], row.top_logprobs)
            row.push(token)
        return chosen

    # --- prefill -----------------------------------------------------------------------------------------------------

    def _prefill(self, depth: int) -> None:
        """Prefill about PREFILL_TOKENS tokens of waiting prompts, including the MTP modules down to `depth`."""
        left = self._prefill_tokens
        while left > 0 and (rows := self._next_prompts(left)):
            pieces = [row.prompt[row.cached : row.cached + self._prefill_tokens] for row in rows]
            hidden = self._run_pieces(rows, pieces, depth)
            self._take_pieces(rows, pieces, hidden)
            left -= hidden.shape[0] * hidden.shape[1]

    def _next_prompts(self, tokens: int) -> list[Request]:
        """Return the prompt that is being prefilled, or admit waiting ones.

        These are the oldest waiting request, if there is room for it, and the requests after it that fit the same
        forward of `tokens` tokens. They get the slots after the running ones.
        """
        if self.prefilling:
            return [self.prefilling]
        rows: list[Request] = []
        while self.waiting:
            longest = max(len(row.prompt) for row in (*rows, self.waiting[0]))
            shared = (len(rows) + 1) * longest
            if (rows and shared > min(tokens, PREFILL_TOKENS)) or not self._make_room(rows):
                break
            rows.append(self.waiting.popleft())
            self.cache.clear(len(self.running) + len(rows) - 1)
        return rows

    def _run_pieces(self, rows: list[Request], pieces: list[list[int]], depth: int) -> Tensor:
        """Run pieces of prompts through the main model and the first `depth` modules: hidden states (B, Q, hidden).

        Shorter pieces are padded. Later tokens overwrite the entries of the padding.
        """
        decoder, length = self.decoder, max(map(len, pieces))
        placement = decoder.place(self.cache, len(self.running), [row.cached for row in rows], length)
        hidden = states = decoder.run(self._padded(pieces, length), self.cache, placement)
        if depth:
            hidden = hidden.clone()  # on a GPU the modules' graphs may overwrite it
        for k in range(1, depth + 1):
            ahead = self._padded([row.prompt[row.cached + k : row.cached + k + length] for row in rows], length)
            states = decoder.draft(k, states, ahead, self.cache, placement)
        return hidden

    def _take_pieces(self, rows: list[Request], pieces: list[list[int]], hidden: Tensor) -> None:
        """Let requests run once their prompts are complete, and give each its first token."""
        for row, piece, states in zip(rows, pieces, hidden, strict=True):
            targets = row.prompt[row.cached + 1 : row.cached + len(piece) + 1] if row.scores_prompt else []
            if targets:  # a piece that holds only the prompt's last token has none
                logits = self.decoder.head(states[: len(targets)])  # (Q, V)
                row.prompt_logprobs += logprobs_of(logits, targets, row.top_logprobs)
            self._advance(row, states[: len(piece)])
        self.prefilling = rows[0] if rows[0].cached < len(rows[0].prompt) else None
        if self.prefilling:
            return
        for row in rows:
            row.forwards = 1
        last = torch.stack([row.hidden[-1] for row in rows])  # (B, hidden)
        self._add_tokens(self.decoder.head(last[:, None])[:, 0], rows)
        self.running += rows

    # --- draft -------------------------------------------------------------------------------------------------------

    def _draft(self, depth: int) -> None:
        """Draft `depth` tokens after each running sequence's last token.

        Module k reads the token k positions ahead. At its last k - 1 positions this is a draft, and once the main model
        has rejected it, the entry there is wrong. While the depth stays the same, all such entries are in the last
        `depth` positions, so the modules run over these again. `depth` + 1 positions also hold all that a step of this
        depth can have added.
        """
        start = time.perf_counter()
        rows, decoder = self.running, self.decoder
        for row in rows:
            row.drafts = []
        if depth > 0 and rows:
            length = max(depth, *(row.n_accepted for row in rows)) + 1
            known = [row.hidden[-length:] for row in rows]  # a short prompt has fewer states
            counts = [len(states) for states in known]
            hidden = torch.stack([F.pad(states, (0, 0, 0, length - len(states))) for states in known])
            first = [row.cached - n for row, n in zip(rows, counts, strict=True)]
            placement = decoder.place(self.cache, 0, first, length)
            newest = torch.arange(len(rows), device=decoder.device), torch.tensor([n - 1 for n in counts])
            # The token k positions ahead of each, from the end of prompt and answer
            ahead = [(row.prompt[-n:] + row.token_ids[-n:])[-n:] for row, n in zip(rows, counts, strict=True)]
            for k in range(1, depth + 1):
                hidden = decoder.draft(k, hidden, self._padded(ahead, length), self.cache, placement)
                drafts = choose(decoder.draft_head(hidden[newest][:, None])[:, 0], rows, ahead=k - 1)
                for row, token in zip(rows, drafts, strict=True):
                    row.drafts.append(token)
                ahead = [[*tokens[1:], token] for tokens, token in zip(ahead, drafts, strict=True)]
        self._drafting_seconds = time.perf_counter() - start

    def _padded(self, tokens: list[list[int]], length: int) -> Tensor:
        """Make a tensor (B, length) of rows of tokens, cut or padded with zeros."""
        return torch.tensor([(row + [0] * length)[:length] for row in tokens], device=self.decoder.device)

    # --- slots -------------------------------------------------------------------------------------------------------

    def _release_slots(self) -> None:
        """Drop requests that have ended, and move the last sequences into the slots that become free."""
        self.waiting = deque(request for request in self.waiting if request.finish_reason is None)
        if self.prefilling and self.prefilling.finish_reason is not None:
            self.prefilling = None
        before = len(self.running)
        for i in reversed(range(before)):
            if self.running[i].finish_reason is not None:
                last = self.running.pop()
                if i < len(self.running):
                    self.running[i] = last
                    self.cache.move(len(self.running), i, last.cached)
        if self.prefilling and len(self.running) < before:
            self.cache.move(before, len(self.running), self.prefilling.cached)

    def _make_room(self, admitted: list[Request]) -> bool:
        """Return whether the cache can also hold the oldest waiting request, and grow it if necessary."""
        slots = len(self.running) + len(admitted) + 1
        if slots > self.slots:
            return False
        length = max(self._entries(request) for request in (*self.running, *admitted, self.waiting[0]))
        if self._cache_bytes(slots, length) > self.memory:
            return False
        if slots > self.cache.slots or length > self.cache.length:
            roomy = min(1 << (slots - 1).bit_length(), self.slots), max(length, self.cache.length)
            self.cache.resize(*(roomy if self._cache_bytes(*roomy) <= self.memory else (slots, length)))
        return True

    def _entries(self, request: Request) -> int:
        """The most cache entries that a request can need, in whole blocks. Rejected drafts take entries too."""
        longest = len(request.prompt) + request.limit + 2 * len(self.decoder.modules) + 1
        return -(-longest // self.decoder.block_size) * self.decoder.block_size

    def _cache_bytes(self, slots: int, length: int) -> float:
        return slots * length * self.cache.bytes_per_token
