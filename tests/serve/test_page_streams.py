"""The chat page while an answer is written: the user goes on, reloads the page, or uses another tab."""

import json

import pytest

from chat_page import STORED, conversation, events

pytestmark = pytest.mark.slow
TALK = conversation("Hello", "The whale sang.")
LONG = conversation(*[f"{i}: the whale sang. " * 9 for i in range(24)])
END = 'data: {"choices": [], "usage": {"completion_tokens": 3, "total_tokens": 9}}\n\ndata: [DONE]\n\n'


def test_a_failed_question_stays_if_the_user_has_gone_on(open_page):
    page = open_page(conversations=[TALK])
    page.take_over_answers()
    page.open(0)
    page.send("And then?")
    page.fill("#text", "The next thought")
    page.break_off()
    page.wait_until_idle()
    assert page.input_value("#text") == "The next thought" and "broke off" in page.inner_text(".error")
    assert page.texts(".user .content") == ["Hello", "And then?"]

    page.fill("#text", "")
    page.click("#new")
    page.send("A question")
    page.click("#new")
    page.break_off()
    page.wait_until_idle()
    assert page.input_value("#text") == "" and page.stored()[0]["title"] == "A question"
    page.open(0)
    assert page.texts(".user .content") == ["A question"] and "broke off" in page.inner_text(".error")
    page.click("[data-action=regenerate]")
    page.write(events("Aye.", end=END))
    page.wait_until_idle()
    assert page.texts(".assistant .content") == ["Aye."] and page.locator(".error").count() == 0


def test_an_edit_and_a_draft_leave_each_other_alone(open_page):
    page = open_page(conversations=[TALK, conversation("Hi", "Ho.", title="Other", time=0)])
    page.take_over_answers()
    page.open(0)
    page.fill("#text", "A draft")
    page.click("[data-action=edit]")
    page.fill("#edited", "Good morning")
    page.keyboard.press("Escape")
    assert page.input_value("#text") == "A draft" and page.texts(".user .content") == ["Hello"]
    page.click("[data-action=edit]")
    page.fill("#edited", "Good morning")
    page.keyboard.press("Enter")
    page.write(events("Aye.", end=END))
    page.wait_until_idle()
    assert page.input_value("#text") == "A draft" and page.texts(".user .content") == ["Good morning"]

    page.click("[data-action=edit]")
    page.fill("#edited", "Good night")
    page.keyboard.press("Enter")
    page.break_off()
    page.wait_until_idle()
    assert "broke off" in page.inner_text(".error") and page.texts(".assistant .content") == ["Aye."]
    assert (page.input_value("#edited"), page.input_value("#text")) == ("Good night", "A draft")
    assert page.evaluate("document.activeElement.id") == "edited"

    page.press("#text", "Enter")  # the draft is a new question, and the editor stays open
    page.focus("#edited")
    page.write(events("Yes.", end=END))
    page.wait_until_idle()
    assert page.texts(".user .content") == ["A draft"] and page.input_value("#text") == ""
    assert page.evaluate("[document.activeElement.id, document.activeElement.value]") == ["edited", "Good night"]
    page.click("[aria-label='Delete “Other”']")
    page.click("#yes")
    page.wait_for_selector("#conversations:not(:has([title=Other]))")
    page.click("#new")
    page.open(0)
    assert page.input_value("#edited") == "Good night"
    page.keyboard.press("Escape")
    assert page.texts(".user .content") == ["Good morning", "A draft"]


def test_a_question_without_an_answer_leaves_no_empty_turn(open_page):
    page, asked = open_page(conversations=[TALK]), []
    page.route(
        "**/xray", lambda route: (asked.append(route.request.post_data_json), route.fulfill(json={"url": "/health"}))
    )
    page.take_over_answers()
    page.open(0)
    page.send("And then?")
    page.fill("#text", "What did she sing?")
    page.break_off()
    page.wait_until_idle()
    assert page.texts(".assistant .content") == ["The whale sang.", "(an empty answer)"]
    page.press("#text", "Enter")
    page.write(events("A song.", end=END))
    page.wait_until_idle()
    both = [
        *({name: message[name] for name in ("role", "content")} for message in TALK["messages"]),
        {"role": "user", "content": "And then?\n\nWhat did she sing?"},
    ]
    assert page.evaluate("asked") == both
    page.click("[data-action=examine] >> nth=-1")
    page.wait_for_selector("#xray:visible")
    assert asked[0]["messages"] == [*both, {"role": "assistant", "content": "A song."}]
    page.click("#close-xray")

    page.evaluate("void (window.dropped = 2)")  # of the messages that were sent, not of those on the page
    page.send("And you?")
    page.write(events("I hum.", end=END))
    page.wait_until_idle()
    assert page.locator(".forgotten + article").get_attribute("data-index") == "2"
    page.evaluate("void (window.dropped = 2)")
    page.send("A song?")
    page.write(events("A hum.", end=END))
    page.wait_until_idle()
    sent = page.evaluate("asked")
    assert [message["content"] for message in sent] == [both[-1]["content"], "A song.", "And you?", "I hum.", "A song?"]
    assert page.locator(".forgotten + article").get_attribute("data-index") == "6"


def test_a_question_is_stopped_while_the_server_is_asked_for_its_model(open_page):
    page = open_page(conversations=[TALK])
    page.take_over_answers()
    page.open(0)
    page.send("And then?")
    page.break_off()
    page.wait_until_idle()
    page.route("**/v1/models", lambda route: None)  # it never answers
    page.press("#text", "Enter")
    page.click("#stop")
    page.wait_until_idle()
    assert page.input_value("#text") == "And then?" and page.texts(".assistant .content") == ["The whale sang."]


def test_a_reload_keeps_what_was_asked_and_written(open_page):
    page = open_page()
    for written in ("", "The whale"):
        page.take_over_answers()
        page.click("#new")
        page.send("Are you there?")
        if written:
            page.write(events(written, end=""))
            page.wait_for_selector(f".assistant p:has-text('{written}')")
        page.reload()
        page.open(0)
        assert page.texts(".user .content") == ["Are you there?"] and page.texts(".facts span") == ["incomplete"]
        assert page.texts(".assistant .content") == [written or "(an empty answer)"]
    page.take_over_answers()
    page.click("[data-action=regenerate]")
    page.reload()
    page.open(0)
    assert page.texts(".assistant .content") == ["The whale"], "the old answer stays until there is a new one"


def test_what_was_stored_of_a_question_that_is_taken_back_is_deleted(open_page):
    page = open_page()
    page.take_over_answers()
    page.send("Are you there?")
    page.evaluate("void dispatchEvent(new Event('visibilitychange'))")
    assert [stored["title"] for stored in page.stored()] == ["Are you there?"]
    page.break_off()
    page.wait_until_idle()
    assert page.input_value("#text") == "Are you there?" and page.stored() == []


def test_a_failed_xray_does_not_disturb_an_answer(open_page):
    page = open_page(conversations=[TALK])
    page.take_over_answers()
    page.route("**/xray", lambda route: route.abort("connectionrefused"))
    page.open(0)
    page.send("And then?")
    page.write(events("The moon", end=""))
    page.click("[data-action=examine]")
    page.wait_for_selector("#status:has-text('does not answer')")
    page.write(events(" sang.", end=END))
    page.wait_until_idle()
    assert page.texts(".assistant .content")[-1] == "The moon sang." and page.locator(".error").count() == 0
    assert "per second" in page.texts(".facts span")[-1]


def test_another_tab_disturbs_nothing(open_page):
    page = open_page(conversations=[LONG])
    other = page.context.new_page()
    other.goto(page.url)

    def store_elsewhere(title: str) -> None:
        stored = json.dumps(conversation("Hello", "Aye.", title=title))
        other.evaluate("([name, text]) => { localStorage[name] = text }", [STORED + title, stored])
        page.wait_for_selector(f"#conversations .title:has-text('{title}')")

    page.route("**/xray", lambda route: route.fulfill(json={"url": "/health"}))
    page.open(0)
    page.click("[data-action=examine] >> nth=0")
    page.wait_for_selector("#xray:visible")
    page.evaluate("document.querySelector('#messages').scrollTop = 50")
    store_elsewhere("Second")
    assert page.is_visible("#xray") and page.evaluate("document.querySelector('#messages').scrollTop") == 50
    page.take_over_answers()
    page.send("And then?")
    page.break_off()
    page.wait_for_selector(".error")
    store_elsewhere("Third")
    assert "broke off" in page.inner_text(".error")

    other.evaluate("localStorage['moonwhale.settings'] = JSON.stringify({ temperature: 0.25 })")
    store_elsewhere("Fourth")
    page.click("#open-settings")
    assert page.input_value("#settings [name=temperature]") == "0.25"


def test_a_thought_stays_as_the_user_has_left_it(open_page):
    page = open_page()
    page.take_over_answers()
    page.send("2+2?")
    page.write(events("<think>Two", end=""))
    page.click("summary:has-text('Thinking')")
    page.write(events(" and two</think>", end=""))
    page.wait_for_selector(".thought p:has-text('Two and two')")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.write(events("4", end=END))
    page.wait_until_idle()
    assert page.is_visible(".thought p") and page.texts(".content > p") == ["2+2?", "4"]

    page.send("3+3?")
    page.write(events("<think>Three", end=""))
    page.wait_for_selector("summary:has-text('Thinking')")
    stop = """async text => {
        answer.enqueue(new TextEncoder().encode(text));
        await new Promise(done => setTimeout(done)); // the text has been read, and waits for the next frame
        document.querySelector("#stop").click();
    }"""
    page.evaluate(stop, events(" and", end=""))
    page.wait_until_idle()
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.texts("summary") == ["Thoughts", "Thoughts (unfinished)"]
