"""The chat page says in words what fails, keeps what was written, and goes on once the server is back."""

import json

import pytest

from chat_page import conversation, events

pytestmark = pytest.mark.slow
CHAT = "**/v1/chat/completions"
TALK = conversation("Hello", "The whale sang.")


def fail(page, **response) -> str:
    """Sends a message to a server that answers with `response`. Returns what the page says."""
    page.route(CHAT, lambda route: route.fulfill(**response))
    page.say("Are you there?")
    page.unroute(CHAT)
    return page.inner_text(".error")


def error(status: int, message: str, type="server_error") -> dict:
    return {"status": status, "json": {"error": {"message": message, "type": type, "param": None, "code": None}}}


def test_a_failure_is_said_and_the_question_stays(open_page):
    late = events(end=f"data: {json.dumps(error(408, 'the answer took 600 seconds')['json'])}\n\n")
    failures = [
        (error(503, "the model had to stop: out of memory"), "The model is not available. The model had to stop: out"),
        (error(429, "256 prompts wait already: try again soon"), "The server is busy. 256 prompts wait"),
        (error(400, "temperature: give at most 2"), "Temperature: give at most 2."),
        (error(500, "the server made a mistake; its log says which"), "The server made a mistake; its log"),
        ({"status": 502, "body": "<html>Bad gateway <script>"}, "Is this the right address? (Status 502)"),
        ({"status": 503, "body": ""}, "The server takes no more connections for now."),
        ({"status": 200, "body": ""}, "The connection broke off before the answer"),
        ({"status": 200, "body": "<html>\n\nThis hotel's network\n\n"}, "not as moonwhale does"),
        ({"status": 200, "body": late}, "The answer took 600 seconds"),
    ]
    page = open_page(conversations=[TALK])
    page.set_option("max_tokens", "5")
    page.open(0)
    for response, words in failures:
        assert words in fail(page, **response)
        assert page.input_value("#text") == "Are you there?" and page.locator("article").count() == 2
        assert page.evaluate("document.activeElement.id") == "text"
    page.press("#text", "Enter")  # the server is back
    page.wait_for_selector("article >> nth=3")
    page.wait_until_idle()
    assert page.locator(".error").count() == 0


def test_a_dead_server_is_said(open_page):
    page = open_page(conversations=[TALK])
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    page.open(0)
    page.say("Are you there?")
    assert "The server does not answer. Is “moonwhale serve” still running?" in page.inner_text(".error")
    page.click("[data-action=regenerate]")
    page.wait_until_idle()
    assert page.texts(".assistant .content") == ["The whale sang."], "the old answer stays if there is no new one"
    page.click("[data-action=edit]")
    page.fill("#edited", "Good morning")
    page.keyboard.press("Enter")
    page.wait_until_idle()
    assert (page.input_value("#edited"), page.input_value("#text")) == ("Good morning", "Are you there?")
    page.press("#edited", "Escape")
    assert page.texts("article .content") == ["Hello", "The whale sang."]
    page.click("[data-action=examine]")
    page.route("**/xray", lambda route: route.abort("connectionrefused"))
    page.wait_for_selector("#status:has-text('does not answer')")
    page.reload()
    page.wait_for_selector("#status:has-text('does not answer')")


def test_a_stream_cut_half_way_keeps_what_was_written(open_page):
    page = open_page()
    assert "The connection broke off" in fail(page, status=200, body=events("The whale ", "sa", end='data: {"cho'))
    assert page.texts(".assistant .content") == ["The whale sa"] and page.texts(".facts span") == ["incomplete"]
    assert page.input_value("#text") == ""
    page.set_option("max_tokens", "5")
    page.click("[data-action=regenerate]")
    page.wait_for_selector(".assistant .facts span:has-text('per second')")
    assert page.locator(".assistant").count() == 1 and page.locator(".error").count() == 0


def test_another_server_at_this_address_is_said(open_page):
    page = open_page()
    strangers = {"body": "<html>"}, {"json": {"detail": "Not Found"}, "status": 404}, {"json": {}}
    for answer in (*strangers, {"json": {"data": [{"id": "llama3"}]}}):
        page.route("**/v1/models", lambda route, *, answer=answer: route.fulfill(**answer))
        page.reload()
        page.wait_for_selector("#status:has-text('not as moonwhale does')")
        page.unroute("**/v1/models")
    page.reload()
    page.set_option("max_tokens", "5")
    page.say("Hello")
    assert page.locator(".assistant").count() == 1
