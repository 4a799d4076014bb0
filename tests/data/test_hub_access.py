"""Without a network, a name of the hub is refused in seconds, or read from the cache."""

import socket
import time

import pytest
from huggingface_hub import constants

from moonwhale.data import hub_access
from moonwhale.data.loading import load_source
from moonwhale.data.tokenizer import load_tokenizer
from moonwhale.errors import UserError


@pytest.fixture(params=["no network", "no answer", "HF_HUB_OFFLINE"])
def offline(request, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "HF_HUB_OFFLINE")
    monkeypatch.setattr(hub_access, "SECONDS", 0.2)

    def connect(*_, **__):
        if request.param == "no answer":
            time.sleep(60)  # of a thread that nobody waits for
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", connect)


def test_a_tokenizer_of_the_hub(offline):
    start, before = time.monotonic(), constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"^`tokenizer`: no/such is no folder here .* the hub cannot be reached or"):
        load_tokenizer("no/such")
    assert time.monotonic() - start < 5 and constants.HF_HUB_OFFLINE is before


def test_a_data_set_of_the_hub(offline, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^`data`: no/such .*cannot be reached or HF_HUB_OFFLINE is set"):
        load_source("no/such")
    assert time.monotonic() - start < 5


def test_a_proxy_is_asked_by_the_libraries_alone(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://localhost:9")
    monkeypatch.setattr(socket, "create_connection", None)
    with hub_access.hub_access() as reachable:
        assert reachable and not constants.is_offline_mode()
