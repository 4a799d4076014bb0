"""Tests the chat page and the X-ray in headless Chromium, at desktop and phone sizes, by mouse and keyboard."""

import shutil

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from moonwhale.inspect.xray import record, render
from moonwhale.serve.app import create_app
from serving import NAME, Running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(small_engine, small_checkpoint):
    with Running(create_app(small_engine(), NAME, small_checkpoint)) as running:
        yield running


@pytest.fixture(params=[(1280, 800), (360, 640)], ids=["desktop", "phone"])
def page(request, browser, server):
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    page, troubles = context.new_page(), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
    page.on(
        "request", lambda r: None if r.url.startswith(server.url) else troubles.append(f"left the machine: {r.url}")
    )
    page.goto(server.url)
    page.wait_for_selector("#model:has-text('tiny')")
    yield page
    context.close()
    refused = (
        "Failed to load resource: the server responded with a status of 400"  # the page shows it as an error message
    )
    assert not [trouble for trouble in troubles if refused not in trouble]


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:visible")
    page.wait_for_selector(".assistant .facts span")


def set_option(page, name, value):
    page.click("#open-settings")
    page.fill(f"[name={name}]", value)
    page.click("button[value=save]")


def test_a_conversation(page):
    set_option(page, "seed", "3")
    set_option(page, "max_tokens", "12")
    say(page, "Hello whale")
    assert page.inner_text(".user p") == "Hello whale"
    first = page.inner_text(".assistant p")
    assert first
    say(page, "And again")
    assert page.locator(".message").count() == 4

    page.reload()  # the browser keeps conversations
    if page.is_visible("#menu"):
        page.click("#menu")
    page.click("#conversations .title")
    assert page.locator(".message").count() == 4
    assert page.inner_text(".assistant p >> nth=0") == first

    if page.is_visible("#menu"):
        page.click("#menu")
    page.click("#new")
    say(page, "Another one")
    assert page.evaluate("JSON.parse(localStorage.getItem('moonwhale.conversations')).length") == 2
    if page.is_visible("#menu"):
        page.click("#menu")
    page.click("#conversations [aria-label='Delete “Another one”']")
    assert page.evaluate("JSON.parse(localStorage.getItem('moonwhale.conversations')).length") == 1


def test_the_stop_button(page, small_engine, server, monkeypatch):
    scheduler = server.app.state.worker.scheduler
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (__import__("time").sleep(0.2), step()))
    page.fill("#text", "Tell me everything")
    page.press("#text", "Enter")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector(".assistant p:not(:empty)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible")
    assert page.inner_text(".assistant .facts span") == "stopped"
    assert server.comes_to_rest()


def test_an_error_is_shown_and_the_message_stays(page):
    set_option(page, "max_tokens", "5")
    page.fill("#text", "word " * 400)
    page.press("#text", "Enter")
    page.wait_for_selector(".error")
    assert "shorten it" in page.inner_text(".error")
    assert page.input_value("#text").startswith("word word")
    assert page.evaluate("document.querySelectorAll('#conversations li').length") == 0


def test_every_control_has_a_label_and_fits(page):
    set_option(page, "max_tokens", "5")
    say(page, "Wide-as-a-whale" * 3)
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, textarea, iframe')].filter((e) => !(
            e.textContent.trim() || e.ariaLabel || e.title || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")


def test_the_xray_panel(page):
    set_option(page, "max_tokens", "8")
    say(page, "Hello whale")
    page.click("text=X-ray >> nth=0")
    frame = page.frame_locator("#xray-frame")
    frame.locator("#text button").first.wait_for()
    assert frame.locator("#layers button").all_inner_texts() == ["block 0", "block 1", "MTP 1"]
    frame.locator("#text button").nth(4).click()
    assert frame.locator("#experts .taken").count() == 2
    page.click("#close-xray")
    assert page.is_hidden("#xray")


def test_the_page_asks_for_the_key(browser, small_engine, small_checkpoint):
    with Running(create_app(small_engine(), NAME, small_checkpoint, api_key="sesame")) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#key-dialog:visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-note:has-text('refused')")
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        page.wait_for_selector("#model:has-text('tiny')")
        set_option(page, "max_tokens", "8")
        say(page, "Hello whale")
        page.click("text=X-ray >> nth=0")
        page.frame_locator("#xray-frame").locator("#text button").first.wait_for()

        page.reload()  # the tab keeps the key, and nothing else does
        page.wait_for_selector("#model:has-text('tiny')")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        page.close()


def test_no_other_page_can_frame_the_page(browser, server):
    with Running(create_app_of_a_frame(server.url)) as other:
        page = browser.new_page()
        refused = []
        page.on("console", lambda said: refused.append(said.text))
        page.goto(other.url)
        page.wait_for_timeout(300)
        assert any("frame-ancestors" in text for text in refused)
        page.close()


def create_app_of_a_frame(url):
    app = FastAPI()
    app.get("/")(lambda: HTMLResponse(f'<iframe src="{url}"></iframe>'))
    return app


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_xray_page(browser, small_model, small_tokenizer, tmp_path, width, scheme):
    ids = small_tokenizer("The whale sang to the moon, and the moon sang back to the whale.")["input_ids"]
    file = tmp_path / "xray.html"
    file.write_text(render(record(small_model, small_tokenizer, ids, 5)), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, troubles = context.new_page(), []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
    page.goto(file.as_uri())
    page.click("#text button >> nth=9")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("token") == 10
    for i in range(3):
        page.click(f"#layers button >> nth={i}")
        assert page.locator(".head .strip").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The shares drawn for a head sum to one.
    total = page.evaluate(
        "R.layers[0].attention.slice(token * T, token * T + T).reduce((a, x) => a + (x / 255) ** 2, 0)"
    )
    assert total == pytest.approx(1, abs=0.05)
    assert not troubles
    context.close()
