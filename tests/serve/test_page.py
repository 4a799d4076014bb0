"""The chat page and the X-ray in headless Chromium, at desktop and phone sizes, by mouse and keyboard."""

import json
import time

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from chat_page import conversation
from moonwhale.infer.chat_session import ChatSession
from moonwhale.serve.app import create_app
from serving import NAME, Running

pytestmark = pytest.mark.slow
TALK = conversation("Hello", "The whale sang.", "And then?", "The moon sang back.")
SEEN = {"from": 2, "system": "Sing."}
LONG = conversation(
    *[text for i in range(12) for text in (f"Question {i}", f"Answer {i}: the whale sang. " * 8)], **SEEN
)
ANSWER = LONG["messages"][11]["content"]


def test_a_conversation(page):
    page.set_option("seed", "3")
    page.set_option("max_tokens", "12")
    page.say("Hello whale")
    assert page.texts(".user .content") == ["Hello whale"]
    first = page.texts(".assistant .content")
    assert len(first) == 1 and first[0]
    page.say("And again")
    assert page.locator(".message").count() == 4

    page.reload()  # the browser keeps conversations
    page.open(0)
    assert page.locator(".message").count() == 4 and page.texts(".assistant .content")[:1] == first

    page.open_menu()
    page.click("#new")
    page.say("Another one")
    assert [stored["title"] for stored in page.stored()] == ["Another one", "Hello whale"]


def test_enter_in_the_settings_keeps_them(page):
    page.click("#open-settings")
    page.fill("#settings [name=system]", "Sing.")
    page.fill("#settings [name=temperature]", "0.3")
    page.press("#settings [name=temperature]", "Enter")

    def stored() -> dict:
        page.wait_for_selector("#settings", state="hidden")
        page.wait_for_timeout(100)  # its event comes after it has closed
        return page.evaluate("JSON.parse(localStorage['moonwhale.settings'])")

    assert (stored()["system"], stored()["temperature"]) == ("Sing.", 0.3)
    page.click("#open-settings")
    page.click("#defaults")
    assert stored()["system"] == ""


def test_it_forgets_old_turns_as_the_terminal_does(open_page, small_engine):
    page, session = open_page(), ChatSession(small_engine(), seed=3, temperature=0.8, min_p=0.05, max_new_tokens=8)
    page.set_option("seed", "3")
    page.set_option("max_tokens", "8")
    for i in range(8):
        page.say(f"The whale sang {i}")
        "".join(session.ask(f"The whale sang {i}"))
    messages = page.stored()[0]["messages"]
    assert len(messages) == 16 and session.forgetful and messages[-1]["from"] == 16 - len(session.messages)
    assert [message["content"] for message in messages[messages[-1]["from"] :]] == [
        message["content"] for message in session.messages
    ]
    assert page.locator(".forgotten + article").get_attribute("data-index") == str(messages[-1]["from"])
    page.click("[data-action=examine] >> nth=-1")  # it sees what the model saw
    page.frame_locator("#xray-frame").locator("#text button").first.wait_for()


def test_the_stop_button(page, server, monkeypatch):
    scheduler = server.app.state.worker.scheduler
    step = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(0.2), step()))
    page.fill("#text", "Tell me everything")
    page.press("#text", "Enter")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector(".assistant p:not(:empty)")
    page.keyboard.press("Escape")
    page.wait_until_idle()
    assert page.texts(".assistant .facts span") == ["stopped"]
    assert server.comes_to_rest()

    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(1), step()))
    page.fill("#text", "And more")
    page.press("#text", "Enter")
    page.click("#stop")  # before the first word: the question goes back to where it was typed
    page.wait_until_idle()
    assert page.input_value("#text") == "And more" and page.locator(".message").count() == 2
    assert server.comes_to_rest()


def test_a_message_that_is_too_long_stays_in_its_box(open_page):
    page = open_page()
    page.fill("#text", "word " * 400)
    page.press("#text", "Enter")
    page.wait_for_selector(".error")
    assert "shorten it" in page.inner_text(".error")
    assert page.input_value("#text").startswith("word word")
    assert page.locator("#conversations li").count() == 0


def test_an_answer_is_tried_again(open_page):
    page = open_page(conversations=[TALK])
    page.set_option("seed", "5")
    page.set_option("max_tokens", "8")
    page.open(0)
    assert page.locator("[data-action=regenerate]").count() == 1, "only the last answer has nothing after it"
    answers = []
    for _ in range(2):
        page.click("[data-action=regenerate]")
        page.wait_until_idle()
        answers.append(page.texts(".assistant .content")[-1])
        assert page.texts(".user .content") == ["Hello", "And then?"] and page.locator(".assistant").count() == 2
    assert answers[0] != answers[1], "a fixed seed still draws anew"


def test_a_message_is_edited(open_page):
    page = open_page(conversations=[TALK])
    page.set_option("max_tokens", "8")
    page.open(0)
    page.click("[data-action=edit] >> nth=0")
    assert page.evaluate("document.activeElement.value") == "Hello"
    page.fill("#edited", "something else")
    page.keyboard.press("Escape")
    assert page.texts(".user .content") == ["Hello", "And then?"], "Escape changes nothing"
    page.click("[data-action=edit] >> nth=0")
    page.fill("#edited", "Good morning")
    page.keyboard.press("Enter")
    page.wait_until_idle()
    assert page.texts(".user .content") == ["Good morning"] and page.locator(".assistant").count() == 1
    assert page.stored()[0]["messages"][0]["content"] == "Good morning"


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_messages_and_code_are_copied(open_page, has_clipboard):
    page = open_page(conversations=[conversation("Code?", "See **this**:\n```py\nwhale()\n```")])
    page.open(0)
    if not has_clipboard:  # as over plain http from another machine
        page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    copied = []
    for button in (".assistant [data-action=copy]", "[data-action=copyCode]", ".user [data-action=copy]"):
        page.click(button)
        page.wait_for_selector(f"{button}:has-text('Copied')")
        page.fill("#text", "")
        page.focus("#text")
        page.keyboard.press("Control+V")
        copied.append(page.input_value("#text"))
    assert copied == ["See **this**:\n```py\nwhale()\n```", "whale()", "Code?"]


def test_thoughts_are_folded(open_page):
    plain = conversation("2+2?", "<think>Two *and* two.</think>\n<answer>4</answer>", title="done")
    unfinished = conversation("2+2?", "<think>Two and", title="unfinished", time=0)
    literal = conversation("tags?", "The tag `<think>` opens, </think> closes.", title="literal", time=-1)
    page = open_page(conversations=[plain, unfinished, literal])
    page.open(0)
    assert page.texts(".assistant .content") == ["Thoughts\n\n4"]
    page.click("summary")
    assert page.texts(".thought p") == ["Two and two."] and page.locator(".thought em").count() == 1
    page.open(1)
    assert page.texts(".assistant .content") == ["Thoughts (unfinished)"]
    page.open(2)
    assert page.texts(".assistant .content") == ["The tag <think> opens, </think> closes."]


def test_deleting_asks_first(page):
    page.set_option("max_tokens", "5")
    page.say("Keep me")
    for cancel in (lambda: page.keyboard.press("Escape"), lambda: page.click("#confirm [value=no]")):
        page.open_menu()
        page.click("[aria-label='Delete “Keep me”']")
        assert "Keep me" in page.inner_text("#question") and "Delete" not in page.evaluate(
            "document.activeElement.textContent"
        )
        cancel()
        assert page.locator("#conversations li").count() == 1
    page.open_menu()
    page.click("[aria-label='Delete “Keep me”']")
    page.click("#yes")
    page.wait_for_selector("#conversations:not(:has(li))", state="attached")
    assert page.stored() == [] and page.locator(".message").count() == 0


def test_the_xray_panel(page):
    page.set_option("max_tokens", "8")
    page.say("Hello whale")
    page.click("[data-action=examine]")
    frame = page.frame_locator("#xray-frame")
    frame.locator("#text button").first.wait_for()
    assert frame.locator("#layers button").all_inner_texts() == ["block 0", "block 1", "MTP 1"]
    frame.locator("#text button").nth(4).click()
    assert frame.locator("#experts .taken").count() == 2
    page.click("#close-xray")
    assert page.is_hidden("#xray")
    assert page.evaluate("document.activeElement.textContent") == "X-ray", "the focus goes back to where it was"


def test_the_examined_answer_stays_in_view(page):
    asked = []
    page.route(
        "**/xray", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json={"url": "/health"}))
    )
    page.evaluate("text => { localStorage['moonwhale.conversation.long'] = text }", json.dumps(LONG))
    page.reload()
    page.open(0)
    page.click("[data-action=examine] >> nth=5")
    page.wait_for_selector("#xray:visible")
    system, first, *_, last = asked[0]["messages"]  # what the model saw, and its answer
    assert (system["content"], first["content"], last) == (
        "Sing.",
        "Question 1",
        {"role": "assistant", "content": ANSWER},
    )
    view = page.locator("#messages").bounding_box()
    for top in (0, 10**6):
        page.evaluate(f"document.querySelector('#messages').scrollTop = {top}")
        answer = page.locator(".examined").bounding_box()
        assert answer["y"] >= view["y"] - 1 and answer["y"] + answer["height"] <= view["y"] + view["height"] + 1
        assert answer["height"] > 60 and page.texts(".examined .content")[0].startswith("Answer 5")
    panel = page.locator("#xray").bounding_box()
    assert panel["x"] >= view["x"] + view["width"] or panel["y"] >= view["y"] + view["height"], "side by side"
    page.open_menu()
    page.click("#new")
    assert page.is_hidden("#xray"), "its answer is gone"


def test_the_menu_covers_nothing(open_page):
    page = open_page("phone", conversations=[TALK])
    page.open(0)
    page.click("#menu")
    assert page.is_hidden("main") and page.is_visible("#sidebar")
    header, menu = (page.locator(name).bounding_box() for name in ("header", "#sidebar"))
    assert menu["y"] >= header["y"] + header["height"] and menu["width"] == 360
    page.keyboard.press("Escape")
    assert page.is_visible("main") and page.evaluate("document.activeElement.id") == "menu"


def test_two_tabs_share_their_conversations(open_page):
    page = open_page(conversations=[TALK])
    page.set_option("max_tokens", "5")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#model:has-text('tiny')")
    held = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    page.fill("#text", "From the first")
    page.press("#text", "Enter")
    page.wait_for_selector("#stop:visible")
    other.fill("#text", "From the second")  # while the first tab waits for its answer
    other.press("#text", "Enter")
    page.wait_for_selector("#conversations .title:has-text('From the second')")
    held[0].continue_()
    page.wait_until_idle()
    other.wait_for_selector("#conversations .title:has-text('From the first')")
    titles = ["From the first", "From the second", "Whales"]
    assert [stored["title"] for stored in page.stored()] == titles
    assert page.texts("#conversations .title") == other.locator("#conversations .title").all_inner_texts() == titles


@pytest.mark.parametrize(
    "stored",
    ["{", "null", "7", '{"id": "x", "title": 5, "messages": []}', json.dumps(TALK | {"messages": [{}]}), "[]"],
)
def test_damaged_storage_does_no_harm(open_page, stored):
    page = open_page()
    page.evaluate(
        "text => { for (const n of ['conversation.x', 'settings']) localStorage[`moonwhale.${n}`] = text }", stored
    )
    page.reload()
    page.wait_for_selector("#model:has-text('tiny')")
    page.set_option("max_tokens", "5")
    page.say("Hello")
    assert page.texts("#conversations .title") == ["Hello"]


def test_full_storage_is_said(open_page):
    page = open_page()
    page.set_option("max_tokens", "5")
    page.evaluate("void (Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') })")
    page.say("Hello")
    assert "full" in page.inner_text("#status") and page.locator(".assistant").count() == 1


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
        page.fill("#text", "Hello whale")
        page.press("#text", "Enter")
        page.wait_for_selector("[data-action=examine]")
        page.click("[data-action=examine]")
        page.frame_locator("#xray-frame").locator("#text button").first.wait_for()

        page.reload()  # the tab keeps the key, and nothing else does
        page.wait_for_selector("#model:has-text('tiny')")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")

        page.evaluate("sessionStorage['moonwhale.key'] = 'expired'")
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": NAME, "context": 96}]}))
        page.reload()
        page.wait_for_selector("#model:has-text('tiny')")
        page.fill("#text", "A question")  # is kept while the dialog asks
        page.press("#text", "Enter")
        page.wait_for_selector("#key-note:has-text('refused')")
        assert page.input_value("#text") == "A question"
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
