"""OpenAI's response shapes: whole responses, the chunks of a stream, log-probabilities and usage."""

import json
import time
import uuid

from moonwhale.infer.detokenizer import TokenBytes
from moonwhale.infer.engine import Engine
from moonwhale.infer.request import Request
from moonwhale.serve.worker import TokenChunk

FINISH_REASON = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "stop"}


class ResponseFormat:
    """Formats the answer to one HTTP request. The subclasses say what a choice holds."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, engine: Engine, model_name: str):
        self.engine = engine
        self.logprobs = LogprobsFormat(engine.token_bytes)
        self._header = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    def message(self, request: Request) -> dict:
        """Returns the fields of a finished choice."""
        raise NotImplementedError

    def delta(self, request: Request, text: str, start: int, end: int) -> dict:
        """Returns the fields of a choice in a chunk, with the new text and the tokens from `start` to `end`."""
        raise NotImplementedError

    def whole(self, requests: list[Request], num_choices: int) -> dict:
        """Returns the response, once all requests have ended."""
        choices = [
            {"index": i, **self.message(request), "finish_reason": FINISH_REASON[request.finish_reason]}
            for i, request in enumerate(requests)
        ]
        body = {"object": self.whole_object, "choices": choices, "usage": usage(requests, num_choices)}
        return self._header | body

    def chunk(self, request: Request, chunk: TokenChunk, num_sent: int) -> dict:
        """Returns a chunk of a stream. The client already has the first `num_sent` tokens of the request."""
        delta = self.delta(request, chunk.text, num_sent, chunk.num_tokens)
        choice = {"index": chunk.index, **delta, "finish_reason": FINISH_REASON.get(chunk.finish_reason)}
        return self._header | {"object": self.chunk_object, "choices": [choice]}

    def usage_chunk(self, requests: list[Request], num_choices: int) -> dict:
        """Returns the last chunk of a stream with `include_usage`."""
        return self._header | {"object": self.chunk_object, "choices": [], "usage": usage(requests, num_choices)}


class ChatFormat(ResponseFormat):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def message(self, request: Request) -> dict:
        message = {"role": "assistant", "content": request.text.text, "refusal": None}
        return {"message": message, "logprobs": self.logprobs.for_chat(request, 0, len(request.token_ids))}

    def delta(self, request: Request, text: str, start: int, end: int) -> dict:
        role = {"role": "assistant"} if start == 0 else {}
        return {"delta": role | {"content": text}, "logprobs": self.logprobs.for_chat(request, start, end)}


class CompletionFormat(ResponseFormat):
    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, engine: Engine, model_name: str, echo: bool):
        super().__init__(engine, model_name)
        self.echo = echo

    def message(self, request: Request) -> dict:
        return self.delta(request, request.text.text, 0, len(request.token_ids))

    def delta(self, request: Request, text: str, start: int, end: int) -> dict:
        if self.echo and start == 0:
            text = self.engine.tokenizer.decode(request.prompt, skip_special_tokens=True) + text
        return {"text": text, "logprobs": self.logprobs.for_completion(request, start, end)}


class LogprobsFormat:
    """Formats the log-probabilities of a request's tokens from `start` to `end`, or None if it did not ask for them."""

    def __init__(self, token_bytes: TokenBytes):
        self._bytes = token_bytes

    def for_chat(self, request: Request, start: int, end: int) -> dict | None:
        if request.top_logprobs is None:
            return None
        content = []
        for token, (logprob, top) in zip(request.token_ids[start:end], request.logprobs[start:end], strict=True):
            likeliest = [self._entry(other, value) for other, value in top.items()]
            content.append(self._entry(token, logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def for_completion(self, request: Request, start: int, end: int) -> dict | None:
        if request.top_logprobs is None:
            return None
        ids, logprobs = request.token_ids[start:end], request.logprobs[start:end]
        offset = sum(len(self._text(token)) for token in request.token_ids[:start])
        offsets = []
        for token in ids:
            offsets.append(offset)
            offset += len(self._text(token))
        return {
            "tokens": [self._text(token) for token in ids],
            "token_logprobs": [logprob for logprob, _ in logprobs],
            "top_logprobs": [{self._text(other): value for other, value in top.items()} for _, top in logprobs],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self._bytes[token])}

    def _text(self, token: int) -> str:
        return self._bytes[token].decode("utf-8", "replace")


def usage(requests: list[Request], num_choices: int) -> dict:
    """Counts the tokens read and written. The `num_choices` requests of one prompt count its tokens once."""
    prompt = sum(len(request.prompt) for request in requests[::num_choices])
    written = sum(len(request.token_ids) for request in requests)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def event(body: dict) -> str:
    """Encodes a body as a server-sent event.

    sse-starlette runs several tasks per stream, which takes a fifth more CPU time per token with 64 streams, and it
    replaces uvicorn's signal handler. FastAPI's EventSourceResponse is only for endpoints that always stream.
    """
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
