"""Drives a server with litellm, and prints what came back as one line of JSON: `litellm_client.py URL MODEL`."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would download a list of prices

import litellm

url, model = sys.argv[1:]
litellm.suppress_debug_info = True
SERVER = {"api_base": url + "/v1", "api_key": "none", "max_retries": 0}
CHAT = {"model": f"openai/{model}", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0} | SERVER
TEXT = {"model": f"text-completion-openai/{model}", "prompt": "The whale", "temperature": 0, "max_tokens": 6} | SERVER
TOOL = {"type": "function", "function": {"name": "sing", "parameters": {}}}


def error(**options) -> list | None:
    try:
        litellm.completion(**CHAT | options)
    except Exception as error:
        return [type(error).__name__, getattr(error, "status_code", None), str(error)]


whole = litellm.completion(**CHAT, max_tokens=12)
own = whole.choices[0].message
follow_up = {"role": "user", "content": [{"type": "text", "text": "And?"}]}
again = [
    litellm.completion(**CHAT | {"messages": [*CHAT["messages"], message, follow_up]}, max_tokens=2).usage.prompt_tokens
    for message in (own, own.model_dump(), own.model_dump(exclude_none=True))
]
chunks = list(litellm.completion(**CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}))
built = litellm.stream_chunk_builder(chunks)
scored = litellm.text_completion(**TEXT, echo=True, logprobs=1)
pieces = list(litellm.text_completion(**TEXT, stream=True))
found = {
    "whole": own.content,
    "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
    "again": again,
    "built": built.choices[0].message.content,
    "built_usage": [built.usage.prompt_tokens, built.usage.completion_tokens],
    "reason": [whole.choices[0].finish_reason, built.choices[0].finish_reason],
    "text": litellm.text_completion(**TEXT).choices[0].text,
    "scored": [scored.choices[0].text, scored.choices[0].logprobs.tokens],
    "pieces": "".join(piece.choices[0].text or "" for piece in pieces),
    "vllm": litellm.completion(**CHAT | {"model": f"hosted_vllm/{model}"}, max_tokens=12).choices[0].message.content,
    "top_k": litellm.completion(**CHAT, max_tokens=12, extra_body={"top_k": 1}).choices[0].message.content,
    "errors": {
        "model": error(model="openai/gpt-4"),
        "temperature": error(temperature=3),
        "tools": error(tools=[TOOL]),
        "format": error(response_format={"type": "json_object"}),
        "length": error(messages=[{"role": "user", "content": "word " * 3000}]),
    },
}
print(json.dumps(found))
