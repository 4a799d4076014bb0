"""Tests which host names and origins can be allowed, and the errors for the others."""

import pytest

from moonwhale.errors import UserError
from moonwhale.serve import commands
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
