"""Tests which host names and origins can be allowed, and the errors for the others."""

import re
import shutil

import pytest
from fastapi.testclient import TestClient

from moonwhale.errors import UserError
from moonwhale.serve import commands
from moonwhale.serve.app import create_app
from moonwhale.serve.names import host_name, origin


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("ai.example", "ai.example"),
        ("AI.Example", "ai.example"),
        ("my_box", "my_box"),
        ("192.168.1.5", "192.168.1.5"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("[0:0:0:0:0:0:0:1]", "[::1]"),
        ("[FE80::1]", "[fe80::1]"),
    ],
)
def test_a_host_name(given, name):
    assert host_name(given) == name


NO_HOSTS = [
    "",
    " ",
    "*",
    "*.example",
    "https://ai.example",
    "ai.example:443",
    "ai.example/v1",
    "ai.example.",
    ".example",
]
NO_HOSTS += [
    "a..b",
    "a-.example",
    "bücher.example",
    "::1",
    "[::1",
    "[::1]:80",
    "[::g]",
    "[::1%é]",
    "a b",
    "me@ai",
    "a,b",
]


@pytest.mark.parametrize("given", NO_HOSTS)
def test_no_host_name(given, small_checkpoint):
    with pytest.raises(UserError, match=r"`allowed_host`: .* is no host name: give one like") as caught:
        commands.main([str(small_checkpoint), "--allowed-host", "ai.example", f"--allowed-host={given}"])
    assert repr(given) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("*", "*"),
        ("https://App.example", "https://app.example"),
        ("HTTPS://app.example:443", "https://app.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://localhost:80", "http://localhost"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_an_origin(given, expected):
    assert origin(given) == expected


NO_ORIGINS = [
    "",
    "null",
    "app.example",
    "https://",
    "https://app.example/",
    "https://app.example/x",
    "https://*.example",
]
NO_ORIGINS += ["https://*", "**", "ftp://app.example", "file://", "https://app.example:", "https://app.example:0"]
NO_ORIGINS += [
    "https://app.example:99999",
    "https://app.example:http",
    "https://me@app.example",
    "https://bücher.example",
]
NO_ORIGINS += [
    "https://a.example,https://b.example",
    "https://a.example https://b.example",
    "https://app.example?x",
    "//x",
]


@pytest.mark.parametrize("given", NO_ORIGINS)
def test_no_origin(given, small_checkpoint):
    with pytest.raises(UserError, match=r"`cors_origin`: .* is no origin: give https://NAME") as caught:
        commands.main([str(small_checkpoint), "--cors-origin", given])
    assert repr(given) in str(caught.value) and "\n" not in str(caught.value)


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


@pytest.fixture(scope="module")
def ask(small_engine, small_checkpoint):
    """`ask(origins, method, from_, **headers)` asks a server with an API key, as a page of that origin would."""
    engine = small_engine()

    def ask(origins, method, from_, **headers):
        app = create_app(engine, "tiny", small_checkpoint, api_key="key", hosts={"localhost"}, origins=origins)
        with TestClient(app, base_url="http://localhost") as client:
            return client.request(method, "/v1/models", headers={"origin": from_} | headers)

    return ask


def allowed(answer):
    return answer.headers.get("access-control-allow-origin")


@pytest.mark.parametrize("origins", [["https://app.example"], ["https://app.example", "http://localhost:3000"], ["*"]])
def test_a_page_of_an_allowed_origin_may_call(ask, origins):
    page = "https://app.example"
    asked = ask(origins, "OPTIONS", page, **PREFLIGHT)  # the browser asks without the key
    assert asked.status_code == 200 and allowed(asked) in (page, "*")
    assert {"authorization", "content-type"} <= set(
        re.findall(r"[\w-]+", asked.headers["access-control-allow-headers"])
    )
    answer = ask(origins, "GET", page, authorization="Bearer key")
    assert answer.status_code == 200 and allowed(answer) in (page, "*")
    readable = re.findall(r"[\w-]+", answer.headers["access-control-expose-headers"])
    assert {"moonwhale-dropped-messages", "retry-after"} <= set(readable)
    assert "access-control-allow-credentials" not in answer.headers, "cookies mean nothing here"
    refused = ask(origins, "GET", page)
    assert refused.status_code == 401 and allowed(refused), "the page can read why"


@pytest.mark.parametrize("origins", [[], ["https://app.example"], ["http://evil.example:8000"]])
@pytest.mark.parametrize("page", ["http://evil.example", "https://app.example.evil", "http://app.example", "null"])
def test_a_page_of_another_origin_may_not(ask, origins, page):
    asked = ask(origins, "OPTIONS", page, **PREFLIGHT)
    assert asked.status_code >= 400 and allowed(asked) is None
    assert allowed(ask(origins, "GET", page, authorization="Bearer key")) is None  # the browser keeps it from the page


@pytest.mark.parametrize("name", ["m\udcff", "a\nb", "\x1b[2J", " ", "a\0"])
def test_a_name_that_no_answer_could_hold(name, small_checkpoint):
    with pytest.raises(UserError, match=r"^`name`: .* cannot be sent to clients: give one of printable") as caught:
        commands.main([str(small_checkpoint), "--name", name])
    assert str(caught.value).isprintable()


def test_a_folders_name_that_no_answer_could_hold(small_checkpoint, tmp_path):
    folder = shutil.copytree(small_checkpoint, tmp_path / "m\udcff")
    with pytest.raises(UserError, match=r"^`name`: 'm.udcff' cannot be sent"):
        commands.main([str(folder)])


@pytest.mark.parametrize("host", ["m\udcff", "m\udcff.example", "a\0b"])
def test_a_host_that_no_system_takes(host, small_checkpoint):
    with pytest.raises(UserError, match=r"^`host`: .* is no address"):
        commands.main([str(small_checkpoint), "--host", host])
