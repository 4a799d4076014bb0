"""Every error that the server sends, in OpenAI's shape: 400, 401, 403, 404, 405, 408, 413, 429, 499, 500 and 503.

A function makes each error; the endpoints and the middleware raise it. `add_error_handlers` turns what an endpoint
raises into a response.
"""

import re

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from moonwhale.errors import UserError

CLOSE = {"connection": "close"}  # the server does not read the rest of the body


class APIError(HTTPException):
    """An error that reaches the client as OpenAI's error object.

    It is an HTTPException because FastAPI lets only those pass when `receive` raises them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


# 400: the request is wrong


def bad_request(error: UserError) -> APIError:
    """A 400 from a UserError. `param` is the field that the message names first."""
    message = str(error)
    field = re.match(r"`([\w.]+)`", message)
    return APIError(400, message.replace("`", ""), param=field and field[1])


def bad_body(error: RequestValidationError) -> APIError:
    """A 400 that describes the first invalid field of a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return APIError(400, f"the body is not JSON: {reason}")

    # Pydantic adds steps for validators and for members of a union; they are not part of the field's path.
    steps = [str(step) for step in first["loc"][1:]]
    path = ".".join(step for step in steps if not step.startswith(("function-", "list[", "str")))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "this server does not know this field: leave it out"
    return APIError(400, f"{path or 'the body'}: {message[:1].lower()}{message[1:]}", param=path or None)


# 401, 403: the client may not ask


def missing_api_key() -> APIError:
    message = "no valid API key: send it as `Authorization: Bearer KEY`"
    return APIError(401, message, "authentication_error", code="invalid_api_key")


def wrong_host() -> APIError:
    return APIError(403, "this server answers to localhost only: call it by that name, or serve it at another address")


# 404, 405: there is no such thing here


def unknown_model(asked: str, served: str) -> APIError:
    message = f"there is no model {asked!r} here: ask for {served!r}"
    return APIError(404, message, param="model", code="model_not_found")


def unknown_xray() -> APIError:
    return APIError(404, "this X-ray is gone: make it again")


def routing_error(error: StarletteHTTPException) -> APIError:
    """A 404 or 405 that FastAPI raises when no route matches."""
    known = {404: "there is nothing at this path", 405: "this path does not take this method"}
    message = known.get(error.status_code, str(error.detail))
    return APIError(error.status_code, f"{message}: see /v1/models and /health")


# 408, 413, 429, 499: too slow, too large, too many, gone


def slow_body(seconds: float) -> APIError:
    return APIError(408, f"the body did not come within {seconds:g} seconds", "timeout", headers=CLOSE)


def slow_answer(seconds: float) -> APIError:
    return APIError(408, f"the answer took more than {seconds:g} seconds", "timeout")


def large_body(limit: int) -> APIError:
    return APIError(413, f"the body is larger than {limit:,} bytes: send less at a time", headers=CLOSE)


def full_queue(limit: int) -> APIError:
    message = f"{limit} prompts wait already: try again soon"
    return APIError(429, message, "rate_limit_error", headers={"retry-after": "1"})


def client_gone() -> APIError:
    """A 499, as nginx logs it. Only the metrics see it."""
    return APIError(499, "the client went away")


# 500, 503: the server failed


def server_bug() -> APIError:
    return APIError(500, "the server made a mistake; its log says which", "server_error")


def model_stopped(reason: Exception) -> APIError:
    return APIError(503, f"the model had to stop: {reason}", "server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Sends whatever an endpoint raises as OpenAI's error object."""

    @app.exception_handler(APIError)
    async def send_api_error(_: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def send_user_error(_: Request, error: UserError) -> JSONResponse:
        return bad_request(error).response()

    @app.exception_handler(RequestValidationError)
    async def send_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return bad_body(error).response()

    @app.exception_handler(StarletteHTTPException)
    async def send_routing_error(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return routing_error(error).response()

    @app.exception_handler(Exception)
    async def send_server_bug(_: Request, error: Exception) -> JSONResponse:
        return server_bug().response()
