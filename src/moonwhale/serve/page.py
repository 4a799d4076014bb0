"""The chat page: its files in web/, and the headers that keep pages from loading anything else."""

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest

WEB = Path(__file__).parent / "web"
MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
FILES = {"/": WEB / "index.html"} | {f"/{path.name}": path for path in WEB.iterdir() if path.suffix in (".js", ".css")}
LOAD_NOTHING = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
SOURCES = "script-src 'self'; style-src 'self'; connect-src 'self'; frame-src 'self'"
# Another page's frame could steal clicks. Trusted types: the browser refuses to make HTML or scripts of any text.
PAGE_POLICY = (
    f"{LOAD_NOTHING}{SOURCES}; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


def add_page_routes(app: FastAPI) -> None:
    # StaticFiles mounted at / would match every other path too, and answer 404 where the API answers 405.
    for path in FILES:
        app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)(send_file)


async def send_file(http: HTTPRequest) -> Response:
    """Answers with a whole small file: FileResponse takes seconds for a header with thousands of ranges."""
    path = FILES[http.url.path]
    # The browser asks each time, so that it never mixes files of two versions.
    headers = security_headers(PAGE_POLICY) | {"cache-control": "no-cache"}
    return Response(path.read_bytes(), media_type=MEDIA_TYPES[path.suffix], headers=headers)


def security_headers(content_policy: str) -> dict[str, str]:
    """Headers of a page that may load only what its content security policy allows."""
    return {
        "content-security-policy": content_policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
