"""Finds out in seconds whether the Hugging Face hub can be reached: its libraries try again for a minute."""

import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock
from urllib.parse import urlsplit

from huggingface_hub import constants

SECONDS = 5


@contextmanager
def hub_access() -> Iterator[bool]:
    """Context in which the hub's libraries read only their caches if the hub cannot be reached.

    Yields whether it can. Import `datasets` before, if it is used.
    """
    if _is_reachable():
        yield not constants.is_offline_mode()
        return
    modules = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    patches = [mock.patch.object(module, "HF_HUB_OFFLINE", True) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield False
    finally:
        for patch in patches:
            patch.stop()


def _is_reachable() -> bool:
    """Whether the hub answers, as far as this can be tried: a proxy would have to be asked by its own rules."""
    if constants.is_offline_mode() or urllib.request.getproxies():
        return True
    address, tried, answered = urlsplit(constants.ENDPOINT), threading.Event(), threading.Event()

    def connect() -> None:
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname, port), SECONDS).close()
            answered.set()
        except OSError:
            pass
        finally:
            tried.set()

    threading.Thread(target=connect, daemon=True).start()  # looking up a name has no time limit of its own
    tried.wait(SECONDS)
    return answered.is_set()
