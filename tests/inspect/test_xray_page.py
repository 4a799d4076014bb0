"""Tests the X-ray's page in headless Chromium: what it draws is what the model computed, in both themes and sizes."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch

from moonwhale.inspect.xray import describe, render
from moonwhale.serve.app import create_app
from serving import HELLO, NAME, Running

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=alert(1)>\u202e\x1b"
PANELS = ["tokens", "next", "experts", "logit", "attention", "logits", "cache", "map", "settings"]
# The contrast of every text with what is painted behind it, where that is below 4.5
WEAK_TEXTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((x, i) => a * x + (1 - a) * under[i]);
  const light = (rgb) => rgb.map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const paint = (e) => numbers(getComputedStyle(e).backgroundColor);
  const ground = (e) => e ? over(paint(e), ground(e.parentElement)) : [255, 255, 255];
  const weak = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.getClientRects().length || e.matches("script, button:disabled")) continue;
    const behind = ground(e), ink = over(numbers(getComputedStyle(e).color), behind);
    const [high, low] = [light(ink), light(behind)].sort((a, b) => b - a), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) weak.push([walker.currentNode.data, ratio]);
  }
  return weak;
}"""


@pytest.fixture(scope="module")
def ids(small_tokenizer):
    return small_tokenizer("The whale sang to the moon, and the moon sang back to the whale.")["input_ids"]


@pytest.fixture(scope="module")
def file(small_model, small_tokenizer, ids, tmp_path_factory):
    described = describe(small_model, small_tokenizer, ids, 5, 30.0)
    described["tokens"][7] = HOSTILE
    path = tmp_path_factory.mktemp("xray") / "xray.html"
    path.write_text(render(described), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """`opened(width, scheme)` opens the file, and fails if a script fails or anything is loaded."""
    troubles, contexts = [], []

    def opened(width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        contexts.append(context)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else troubles.append(r.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_fits_and_can_be_read(opened, width, scheme):
    page = opened(width, scheme)
    page.click("#text button >> nth=9")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("token") == 10
    for i in range(3):
        page.click(f"#layers button >> nth={i}")
        assert page.locator(".head .strip").count() == 2
        assert page.evaluate(WEAK_TEXTS) == []
    for stop in range(6):
        page.click("#start-tour" if stop == 0 else "#tour button:has-text('Next')")
        assert page.inner_text("#tour h2").startswith(f"{stop + 1} of 6")
        assert page.locator("section.shown").count() == 1
        assert page.evaluate(WEAK_TEXTS) == []
    page.keyboard.press("Escape")
    assert page.is_hidden("#tour") and not page.locator("section.shown").count()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('button, input')].every((e) => e.textContent || e.ariaLabel || e.labels?.length)"
    )


def test_what_it_draws_is_what_the_model_computed(opened, small_model, ids):
    page, n = opened(), len(ids)
    with torch.no_grad():
        attentions = small_model(torch.tensor([ids]), output_attentions=True).attentions
    for layer, wanted in enumerate(attentions):
        page.evaluate(f"(chooseLayer({layer}), choose({n - 2}))")
        for head in range(2):
            drawn = page.evaluate(f"[...weights(S.layers[{layer}], {head}, token)]")
            assert drawn == pytest.approx(wanted[0, head, n - 2, : n - 1].tolist(), abs=2e-3)
        titles = page.evaluate("[...document.querySelector('.strip').children].map((cell) => cell.title)")
        assert (len(titles) == n - 1 and "not read" in "".join(titles)) or layer == 1
    page.evaluate(f"(chooseLayer(0), choose({n - 2}), chooseKey(3))")
    content, rotary, total = page.evaluate(
        "(({ content, rotary, sum }) => [content, rotary, sum])(logit(S.layers[0], 1, token, 3))"
    )
    assert total == pytest.approx(content + rotary)
    shown = [f"{abs(x):.2f}" for x in (content, rotary, total)]
    assert re.findall(r"[\d.]+", page.inner_text("#logit .parts:nth-child(2) .n >> nth=0")) == shown
    experts = page.inner_text("#experts .scores >> nth=0").splitlines()
    cut = next(i for i, line in enumerate(experts) if "top-2 cut" in line)
    assert len([line for line in experts[:cut] if line.startswith("E")]) == 2
    sums = [float(line.rsplit("= ", 1)[1].replace("−", "-")) for line in experts if "= " in line]
    assert len(sums) == 4 and sums == sorted(sums, reverse=True)
    read = page.evaluate("[...document.querySelectorAll('.blocks')][0].children.length")
    assert read == (n - 2) // 4 + 1
    columns = page.locator(".prediction h3").all_inner_texts()
    assert columns == [f"Main head, for token {n - 1}", f"MTP module 1, for token {n}"]


def router_rows(page):
    """The drawn score, bias and sum of each expert, and the widths of its two bars in percent."""
    rows = page.evaluate("""[...document.querySelector('#experts .scores').querySelectorAll('.expert')].map((row) => [
      row.querySelector('.n').textContent,
      ...[...row.querySelectorAll('.track i')].map((e) => parseFloat(e.style.width)),
    ])""")
    return torch.tensor([[*map(float, re.findall(r"[\d.]+", text)), *widths] for text, *widths in rows])


def test_a_drift_of_all_biases_is_not_drawn(opened):
    """Only differences matter to top-k. The smallest bias is drawn as zero, so scores keep their share of the bars."""
    page = opened()
    before, biases = router_rows(page), torch.tensor(page.evaluate("S.layers[0].bias"))
    score, bias, total, score_width, bias_width = before.T
    assert torch.allclose(bias.sort().values, (biases - biases.min()).sort().values, atol=1e-3)
    assert torch.allclose(total, score + bias, atol=2e-3)
    assert torch.allclose(score_width, 100 * score / total.max(), atol=0.2)
    assert torch.allclose(bias_width, 100 * bias / total.max(), atol=0.2)
    (cut,) = re.findall(r"top-2 cut at ([\d.]+)", page.inner_text("#experts"))
    assert float(cut) == pytest.approx(total[1].item()) and total[0] >= total[1] >= total[2:].max()
    page.evaluate("(S.layers[0].bias = S.layers[0].bias.map((x) => x + 2.2), drawExperts())")
    assert torch.allclose(router_rows(page), before, atol=2e-3)


def test_experts_of_groups_left_out_stand_below_a_line_of_their_own(browser, tiny_model, small_tokenizer, tmp_path):
    """Some have larger sums than a chosen expert, which would contradict the cut of top-k."""
    model = tiny_model(n_routed_experts=8, n_group=4, topk_group=2, vocab_size=310)
    (tmp_path / "x.html").write_text(render(describe(model, small_tokenizer, list(range(5, 25)), 1)), encoding="utf-8")
    page, seen = browser.new_page(), 0
    page.goto((tmp_path / "x.html").as_uri())
    for token in range(20):
        page.evaluate(f"choose({token})")
        drawn = page.locator("#experts .scores").nth(0).inner_text()
        chosen, others, closed = re.split(r"top-2 cut at .*|not considered: .*", drawn)
        sums = [[float(x.replace("−", "-")) for x in re.findall(r"= (\S+)", part)] for part in (chosen, others, closed)]
        assert [len(part) for part in sums] == [2, 2, 4] and all(part == sorted(part, reverse=True) for part in sums)
        assert min(sums[0]) >= max(sums[1])
        seen += max(sums[2]) > min(sums[0])
    page.close()
    assert seen, "no token shows the difference"


@pytest.mark.parametrize("width", [1280, 600, 390])
def test_numbers_keep_to_their_columns(opened, width):
    page = opened(width)
    page.evaluate("S.layers[0].step = S.layers[0].step.map((x, h) => x * [1, 9][h])")  # numbers of unequal length
    page.evaluate("chooseKey(2)")
    zeros = page.evaluate("[...document.querySelectorAll('#logit .zero')].map((e) => e.getBoundingClientRect().left)")
    assert len(zeros) == 4 and max(zeros) - min(zeros) < 0.1
    assert page.evaluate(
        "(({ scrollWidth, clientWidth }) => scrollWidth <= clientWidth)(document.querySelector('.scroll'))"
    )
    for panel in PANELS:
        wide = "(e) => e.scrollWidth > e.clientWidth + 1 ? e.textContent : []"
        assert (
            page.evaluate(f"[...document.querySelectorAll('#{panel} .n, #{panel} .blocks span')].flatMap({wide})") == []
        ), panel


def test_other_settings_are_shown(opened):
    page = opened()
    before = page.inner_text("#next")
    labels = page.locator("#settings table button").all_inner_texts()
    assert "1 expert per token" in labels and len(labels) == page.evaluate("R.recordings.length") >= 6
    page.click("#settings button:text-is('1 expert per token')")
    assert page.evaluate("S.settings.num_experts_per_tok") == 1
    assert page.locator("#experts .taken").count() == 1 and page.inner_text("#next") != before
    page.click("#settings table button >> nth=0")
    assert page.inner_text("#next") == before
    assert page.locator("#settings form").count() == 0, "a file has no server to ask"


def test_tokens_are_compared_by_id(opened):
    """In a byte-level tokenizer, each part of a character has the text "�"."""
    page = opened()
    page.evaluate("""() => {
      R.tokens.fill("�");
      for (const { predictions, guesses } of R.recordings) {
        for (const choice of predictions.flat(2)) choice[1] = "�";
        for (const guess of guesses.flat()) guess.text = "�";
      }
      drawSettings();
    }""")
    ids, predictions, guesses = page.evaluate("[R.ids, R.recordings.map((one) => one.predictions), S.guesses]")
    for token in range(len(ids)):
        page.evaluate(f"choose({token})")
        found = 0
        for k, rows in enumerate(predictions[0]):
            target = ids[token + 1 + k : token + 2 + k]  # none behind the text
            found += bool(target) and target[0] in [id for id, _, _ in rows[token]]
        assert page.locator("#next b").count() == found
        verdicts = [text.split()[-1] for text in page.locator("#next :is(.good, .bad)").all_inner_texts()]
        assert verdicts == ["accepted" if guess["held"] else "wrong" for guess in guesses[token]]
    firsts = [[row[0][0] for row in rows] for rows, *_ in predictions]
    same = [sum(a == b for a, b in zip(first, firsts[0], strict=True)) for first in firsts]
    assert page.locator("#settings td:last-child").all_inner_texts() == [f"{n} of {len(ids)}" for n in same]


def test_a_token_is_text(opened):
    page = opened()
    for token in range(page.evaluate("T")):
        page.evaluate(f"choose({token})")
    page.click("#text button >> nth=7")
    shown = page.inner_text("#text button >> nth=7")
    assert "<img src=x onerror=alert(1)>" in shown and "\u202e" not in shown and "\x1b" not in shown
    assert page.evaluate("document.images.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_panel_is_saved_as_a_picture(opened, scheme):
    assert opened().evaluate("[...document.querySelectorAll('section')].map((e) => e.id)") == PANELS
    for panel in PANELS:
        page = opened(scheme=scheme)  # Chromium asks before it saves more than ten files from one page
        page.evaluate("choose(12)")
        box = page.locator(f"#{panel}").bounding_box()
        with page.expect_download() as download:
            page.click(f"#{panel} .save:text-is('SVG')")
        assert download.value.suggested_filename == f"xray-{panel}.svg"
        text = download.value.path().read_text(encoding="utf-8")
        drawn = ET.fromstring(text)
        assert abs(float(drawn.get("width")) - box["width"]) <= 1 and "var(" not in text
        words = " ".join(e.text for e in drawn.iter("{http://www.w3.org/2000/svg}text")).split()
        missing = set(page.inner_text(f"#{panel} h2 >> nth=0").split()) - set(words)
        assert not missing and not {"SVG", "PNG"} & set(words)
        with page.expect_download() as download:
            page.click(f"#{panel} .save:text-is('PNG')")
        data = download.value.path().read_bytes()
        assert data.startswith(b"\x89PNG") and abs(int.from_bytes(data[16:20]) - 2 * box["width"]) <= 2


def test_a_served_page_computes_any_setting(browser, small_engine, small_checkpoint):
    with Running(create_app(small_engine(), NAME, small_checkpoint, api_key="sesame")) as server:
        messages = [*HELLO, {"role": "assistant", "content": "The whale sang."}]
        page, troubles = browser.new_page(), []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text))
        key = {"authorization": "Bearer sesame"}
        answer = page.request.post(f"{server.url}/xray", data={"model": NAME, "messages": messages}, headers=key)
        page.goto(server.url + answer.json()["url"])
        page.fill("#settings [name=num_experts_per_tok]", "3")
        page.click("#settings button:text-is('Compute')")
        page.wait_for_selector("#settings tr.selected:has-text('3 experts per token')")
        assert page.evaluate("document.activeElement.matches('tr.selected button')"), "the focus is not lost"
        assert page.locator("#experts .taken").count() == 3
        page.evaluate("document.querySelector('#settings form').noValidate = true")
        page.fill("#settings [name=num_experts_per_tok]", "9")
        page.click("#settings button:text-is('Compute')")
        page.wait_for_selector("#settings .bad:has-text('9 is out of bounds: give from 1 to 4')")
        assert page.input_value("#settings [name=num_experts_per_tok]") == "9"
        assert page.locator("#experts .taken").count() == 3
        with page.expect_download():
            page.click("#map .save:text-is('PNG')")
        assert [trouble for trouble in troubles if "400" not in trouble] == []
        page.close()
