"""The chat page can be read and used by everybody: contrast, names, focus, and width, in each state and both themes."""

import re

import pytest

from chat_page import SIZES, conversation
from moonwhale.serve import page as page_module

COLOURS = (page_module.WEB / "colours.css").read_text(encoding="utf-8")
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme)) for theme in COLOURS.split("@media"))
TEXT_ON = {
    "back": ("text", "soft", "accent", "bad"),
    "panel": ("text", "soft", "accent"),
    "mine": ("text", "soft"),
    "accent": ("accent-text",),
}
LEAST = 4.5  # WCAG 2.2, level AA, 1.4.3; 3 for the edges of controls, 1.4.11

# Texts on the page, with their own and the background's colour: what is behind the last opaque background counts.
PAIRS = """() => {
    const opaque = colour => !/^rgba\\(.*, 0\\)$/.test(colour) && colour !== "transparent";
    const behind = node => { while (node && !opaque(getComputedStyle(node).backgroundColor)) node = node.parentElement;
        return getComputedStyle(node ?? document.documentElement).backgroundColor };
    const texts = [...document.querySelectorAll("body *")].filter(node => node.checkVisibility() && (node.placeholder
        || node.value || [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())));
    return texts.map(node => [node.outerHTML.slice(0, 80), behind(node),
        getComputedStyle(node, node.placeholder && !node.value ? "::placeholder" : null).color,
        getComputedStyle(node).opacity]);
}"""
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, iframe, dialog, summary, a')].filter(
    node => !(node.textContent.trim() || node.ariaLabel || node.title || node.labels?.length
    || document.getElementById(node.getAttribute('aria-labelledby'))?.textContent)).map(node => node.outerHTML)"""
MARKDOWN = (
    "# Whales\n\n> sing [on](https://x.org) `code`\n\n```py\nx = 1\n```\n\n|a|\n|-|\n|b|\n\n![a](https://x.org/a)"
)


def luminance(colour: str) -> float:
    """The relative luminance of `#rrggbb` or `rgb(r, g, b)` (WCAG 2.2)."""
    parts = (
        [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        if colour[0] == "#"
        else map(int, re.findall(r"\d+", colour)[:3])
    )
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_colours_have_contrast(theme):
    assert LIGHT.keys() == DARK.keys() and len(LIGHT) == 10
    assert contrast("#000000", "#ffffff") == 21 and contrast("rgb(119, 119, 119)", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )
    ratios = {(a, b): round(contrast(theme[a], theme[b]), 2) for b, texts in TEXT_ON.items() for a in texts}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < LEAST} == {}
    edges = {back: round(contrast(theme["edge"], theme[back]), 2) for back in ("back", "panel", "mine")}
    assert {back: ratio for back, ratio in edges.items() if ratio < 3} == {}


def test_no_other_file_names_a_colour():
    for path in page_module.WEB.iterdir():
        if path.name != "colours.css":
            assert not re.findall(r"(?<!&)#(?:[0-9a-f]{6}|[0-9a-f]{3})\b(?!\w)", path.read_text(encoding="utf-8")), (
                path.name
            )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_each_state_can_be_read_and_used(open_page, size, scheme):
    talk = conversation(
        "Hello", MARKDOWN, "2+2?", "<think>Two</think>4", "Wide-as-a-whale" * 9, "Whale" * 60, **{"from": 2}
    )
    page, seen = open_page(size, scheme, conversations=[talk]), 0
    page.route("**/xray", lambda route: route.fulfill(json={"url": "/health"}))

    def check(state: str) -> None:
        nonlocal seen
        for html, back, text, opacity in page.evaluate(PAIRS):
            seen += 1
            assert contrast(back, text) >= LEAST and opacity == "1", f"{state}: {html} has {text} on {back}"
        assert page.evaluate(NAMELESS) == [], state
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state

    check("empty")
    page.open_menu()
    check("menu")
    page.open(0)
    page.click("summary")
    check("conversation")
    page.click("[data-action=edit] >> nth=-1")
    check("edit")
    page.keyboard.press("Escape")
    page.click("#open-settings")
    check("settings")
    page.keyboard.press("Escape")
    page.open_menu()
    page.click("[data-action=delete]")
    check("delete")
    page.keyboard.press("Escape")
    if page.is_visible("#menu"):
        page.click("#menu")
    page.click("[data-action=examine] >> nth=0")
    page.wait_for_selector("#xray:visible")
    check("X-ray")
    page.click("#close-xray")
    page.route("**/v1/chat/completions", lambda route: None)  # it never answers
    page.fill("#text", "Hello?")
    page.press("#text", "Enter")
    page.wait_for_selector("#stop:visible")
    check("writing")
    page.click("#stop")
    page.wait_until_idle()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.press("#text", "Enter")
    page.wait_for_selector(".error")
    check("error")
    assert seen > 150


@pytest.mark.slow
def test_the_page_is_used_by_keyboard_and_by_ear(open_page):
    page = open_page(conversations=[conversation("Hello", "The *whale* sang.")])
    assert page.evaluate("document.activeElement.id") == "text"
    page.click("h1")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('data-action')"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or page.evaluate("document.activeElement === document.body")
    assert reached[:7] == ["open-settings", "new", "open", "delete", "messages", "text", "send"]

    page.focus("[data-action=open]")
    page.keyboard.press("Enter")
    page.fill("#text", "line one")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#text") == "line one\n" and page.locator("article").count() == 2
    page.set_option("max_tokens", "5")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body='data: {"choices": [{"delta": {"content": "<think>Hm</think>Aye"}}], '
            '"usage": {"completion_tokens": 3, "total_tokens": 9}}\n\ndata: [DONE]\n\n'
        ),
    )
    page.say("And then?")
    assert page.locator("#spoken[role=status]").inner_text() == "Moonwhale: Aye", "once, and as a whole"
    assert page.get_attribute("#messages", "aria-live") == "off"
    page.focus("[data-action=edit] >> nth=0")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.locator("#edited").count() == 0
