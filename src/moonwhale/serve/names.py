"""Host names and origins that a user allows, in the form in which browsers send them."""

import ipaddress
import re

from moonwhale.errors import UserError

LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
DEFAULT_PORTS = {"http": 80, "https": 443}  # browsers leave these out


def host_name(given: str) -> str:
    """Returns a host name in lower case, or an IPv6 address in brackets and in its shortest form.

    Raises:
        UserError: it is neither, so that no request could ever match it.
    """
    if (name := _host(given)) is None:
        raise UserError(
            f"`allowed_host`: {given!r} is no host name: give one like ai.example or [::1], in ASCII (xn--…), without "
            "https://, port, path and wildcard"
        )
    return name


def origin(given: str) -> str:
    """Returns the origin of web pages in lower case and without a default port, or "*".

    Raises:
        UserError: it is no origin, so that no page could ever match it.
    """
    match = re.fullmatch(r"(https?)://(.+?)(?::([0-9]{1,5}))?", given.lower())
    host = match and _host(match[2])
    port = int(match[3] or DEFAULT_PORTS[match[1]]) if match else 0
    if given == "*":
        return given
    if not host or not 0 < port < 65536:
        raise UserError(
            f"`cors_origin`: {given!r} is no origin: give https://NAME or https://NAME:PORT, in ASCII (xn--…), without "
            "a path, or * for all"
        )
    return f"{match[1]}://{host}" + (f":{port}" if port != DEFAULT_PORTS[match[1]] else "")


def _host(given: str) -> str | None:
    name = given.lower()
    if name.startswith("[") and name.endswith("]") and name.isascii():
        try:
            return f"[{ipaddress.IPv6Address(name[1:-1])}]"
        except ValueError:
            return None
    return name if re.fullmatch(rf"{LABEL}(?:\.{LABEL})*", name) else None
