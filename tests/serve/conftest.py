"""A server with the toy model, and its chat page at desktop and phone sizes."""

import pytest

from chat_page import SIZES, ChatPage
from moonwhale.serve.app import create_app
from serving import NAME, Running


@pytest.fixture(scope="module")
def server(small_engine, small_checkpoint):
    with Running(create_app(small_engine(), NAME, small_checkpoint)) as running:
        yield running


@pytest.fixture
def open_page(browser, server):
    """`open_page(size, scheme, conversations=[...])` opens the chat page."""
    pages = []

    def open_page(size="desktop", scheme="light", url=server.url, conversations=()) -> ChatPage:
        pages.append(ChatPage(browser, url, size, scheme, conversations))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture(params=SIZES)
def page(request, open_page):
    return open_page(request.param)
