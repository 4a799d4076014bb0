"""Reads the JSON bodies of requests, and runs all work whose time grows with a request's size in one thread."""

import asyncio
import json
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from moonwhale.errors import UserError
from moonwhale.serve.errors import CLIENT_GONE, APIError, api_error
from moonwhale.serve.fields import StrictModel, shown

Body = TypeVar("Body", bound=StrictModel)
Result = TypeVar("Result")
SCHEMAS = "#/components/schemas/{model}"


class Preparation:
    """The one thread that reads, checks and encodes requests, so that the event loop goes on with others' streams.

    A tokenizer's settings change from call to call, so only this thread may use the engine's.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "moonwhale-requests")

    async def run(self, function: Callable[..., Result], *args) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    async def read(self, http: Request, kind: type[Body]) -> Body:
        """Returns the body of a request. Raises an APIError if it is not what `kind` describes."""
        try:
            data = await http.body()
        except ClientDisconnect:
            raise APIError(*CLIENT_GONE) from None
        return await self.run(parse, data, http.headers, kind)


def parse(data: bytes, headers: Headers, kind: type[Body]) -> Body:
    """Returns the body that some bytes spell. Raises an APIError 400 that describes the first mistake."""
    _check_headers(headers)
    try:
        return kind.model_validate(json.loads(data))
    except ValidationError as error:
        raise _bad_field(error) from None
    except json.JSONDecodeError as error:
        raise APIError(400, f"the body is not JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # bytes that are no text, a number of thousands of digits, lists in lists
        raise APIError(400, "the body cannot be read: send JSON in UTF-8") from None


def _check_headers(headers: Headers) -> None:
    """Raises a 400 if the headers say that the body is not plain JSON."""
    encoding, kind = headers.get("content-encoding", "identity"), headers.get("content-type", "")
    if encoding != "identity":
        raise APIError(400, f"the body has the content-encoding {shown(encoding)}: send it uncompressed")
    if not re.fullmatch(r"application/(.+\+)?json", kind.partition(";")[0].strip().lower()):
        given = f"the content-type is {shown(kind)}" if kind else "there is no content-type"
        raise APIError(400, f"{given}: send the header `content-type: application/json`")


def _bad_field(error: ValidationError) -> APIError:
    """A 400 that describes the first invalid field of a body."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # about fields that do not fit each other
        return api_error(cause)
    path = shown_path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know this field: leave it out"
    elif first["type"] not in ("value_error", "missing"):
        message += f", not {shown(first['input'])}"
    return APIError(400, f"{path or 'the body'}: {message[:1].lower()}{message[1:]}", param=path or None)


def shown_path(steps: tuple) -> str:
    """Returns where a field is. A client chooses the names of unknown fields, hence also their length."""
    path = ".".join(str(step) for step in steps)
    return path if len(path) <= 200 else f"{path[:200]}…"


def body_of(kind: type[StrictModel]) -> dict:
    """Returns what the OpenAPI description says about a route that reads a body itself."""
    schema = {"$ref": SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI, *kinds: type[StrictModel]) -> None:
    """Adds the schemas of bodies to the app's OpenAPI description."""
    describe_routes = app.openapi

    def describe() -> dict:
        _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=SCHEMAS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a route that answers HEAD as well as GET has one id for both
            description = describe_routes()
        description.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return description

    app.openapi = describe
