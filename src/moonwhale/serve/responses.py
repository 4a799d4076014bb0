"""OpenAI's response shapes: whole responses, the chunks of a stream, log-probabilities and usage."""

import codecs
import json
import time
import uuid

from moonwhale import __version__
from moonwhale.infer.engine import Engine
from moonwhale.infer.request import Request
from moonwhale.serve.requests import CompletionRequest, GenerationRequest
from moonwhale.serve.worker import TokenChunk

FINISH_REASON = {None: None, "eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


class ResponseFormat:
    """Formats the answer to one HTTP request. A subclass for each endpoint says what a choice holds.

    Its `message` returns the text of a finished choice, its `delta` the text that a chunk adds, and its `logprobs` the
    log-probabilities of a chunk's tokens.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, engine: Engine, model_name: str, body: GenerationRequest):
        self.engine, self.body = engine, body
        self._header = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": f"moonwhale-{__version__}",
        }

    def whole(self, requests: list[Request]) -> dict:
        """Returns the response, once all requests have ended."""
        choices = []
        for i, request in enumerate(requests):
            answer = TokenChunk(request, i, request.text.text, slice(0, None), request.finish_reason)
            choices.append(self._choice(answer, self.message(answer)))
        return self._header | {"object": self.whole_object, "choices": choices, "usage": self._usage(requests)}

    def chunks(self, chunk: TokenChunk) -> list[dict]:
        """Returns the chunks of a stream that send what one step has added to a choice."""
        return [self._chunk(self._choice(chunk, self.delta(chunk)))]

    def _chunk(self, choice: dict) -> dict:
        options = self.body.stream_options
        usage = {"usage": None} if options and options.include_usage else {}  # the last chunk has it
        return self._header | {"object": self.chunk_object, "choices": [choice]} | usage

    def usage_chunk(self, requests: list[Request]) -> dict:
        """Returns the last chunk of a stream with `include_usage`."""
        return self._header | {"object": self.chunk_object, "choices": [], "usage": self._usage(requests)}

    def _choice(self, chunk: TokenChunk, text: dict) -> dict:
        logprobs = None if chunk.request.top_logprobs is None else self.logprobs(chunk)
        reason = FINISH_REASON[chunk.finish_reason]
        return {"index": chunk.index, **text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, requests: list[Request]) -> dict:
        """Counts the tokens read and written. The choices of one prompt count its tokens once."""
        prompt = sum(len(request.prompt) for request in requests[:: self.body.num_choices])
        written = sum(len(request.token_ids) for request in requests)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class ChatFormat(ResponseFormat):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def message(self, answer: TokenChunk) -> dict:
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def chunks(self, chunk: TokenChunk) -> list[dict]:
        """As OpenAI does, opens a choice with a chunk of its role alone: the npm client counts its tokens twice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        opening = {"index": chunk.index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk(opening)] * (chunk.span.start == 0) + super().chunks(chunk)

    def delta(self, chunk: TokenChunk) -> dict:
        return {"delta": {"content": chunk.text}}

    def logprobs(self, chunk: TokenChunk) -> dict:
        content = []
        request, span = chunk.request, chunk.span
        for token, (logprob, top) in zip(request.token_ids[span], request.logprobs[span], strict=True):
            likeliest = [self._entry(other, value) for other, value in top.items()]
            content.append(self._entry(token, logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict:
        spelling = self.engine.token_bytes[token]
        return {"token": spelling.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelling)}


class CompletionFormat(ResponseFormat):
    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    body: CompletionRequest

    def __init__(self, engine: Engine, model_name: str, body: CompletionRequest):
        super().__init__(engine, model_name, body)
        self._read: dict[int, tuple[codecs.IncrementalDecoder, int]] = {}  # characters of each choice so far

    def delta(self, chunk: TokenChunk) -> dict:
        text = chunk.text
        if self.body.echo and chunk.span.start == 0:
            text = self.engine.tokenizer.decode(self._echoed(chunk.request), skip_special_tokens=True) + text
        return {"text": text}

    message = delta

    def logprobs(self, chunk: TokenChunk) -> dict:
        """Returns the log-probabilities of a chunk's tokens, and before the first ones those of an echoed prompt."""
        request, span = chunk.request, chunk.span
        tokens, scored = request.token_ids[span], request.logprobs[span]
        if self.body.echo and span.start == 0:
            echoed = self._echoed(request)
            # No token comes before a prompt's first one, so it has no probability.
            scored = [(None, {}), *request.prompt_logprobs][len(request.prompt) - len(echoed) :] + scored
            tokens = echoed + tokens
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [logprob for logprob, _ in scored],
            "top_logprobs": [
                None if logprob is None else self._named(top | {token: logprob})
                for token, (logprob, top) in zip(tokens, scored, strict=True)
            ],
            "text_offset": self._offsets(chunk.index, tokens),
        }

    def _echoed(self, request: Request) -> list[int]:
        """Returns the prompt as the client sent it: without bos, which the server puts before a text."""
        return request.prompt[1:] if self.body.has_text_prompts else request.prompt

    def _named(self, logprobs: dict[int, float]) -> dict[str, float]:
        """Keys log-probabilities by the tokens' texts, as OpenAI does. Of two equal texts the second one is an id."""
        named: dict[str, float] = {}
        for token, logprob in logprobs.items():
            name = self._name(token)
            named[f"token_id:{token}" if name in named else name] = logprob
        return named

    def _name(self, token: int) -> str:
        """Returns a token's text, in OpenAI's form "bytes:\\xe2" for a part of a character."""
        spelling = self.engine.token_bytes[token]
        if not spelling:
            return self.engine.tokenizer.convert_ids_to_tokens(token) or f"token_id:{token}"
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)

    def _offsets(self, index: int, tokens: list[int]) -> list[int]:
        """Returns the number of characters before each token of a choice. The calls give it all its tokens in order."""
        decoder, length = self._read.setdefault(index, (codecs.getincrementaldecoder("utf-8")("replace"), 0))
        offsets = []
        for token in tokens:
            offsets.append(length)
            length += len(decoder.decode(self.engine.token_bytes[token]))
        self._read[index] = decoder, length
        return offsets


def event(body: dict) -> str:
    """Encodes a body as a server-sent event.

    sse-starlette runs several tasks per stream, which takes a fifth more CPU time per token with 64 streams, and it
    replaces uvicorn's signal handler. FastAPI's EventSourceResponse is only for endpoints that always stream. All but
    ASCII is escaped, because some clients also end a line at U+0085, U+2028 or U+2029.
    """
    return f"data: {json.dumps(body)}\n\n"
