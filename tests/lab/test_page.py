"""The page and the table of a comparison, from results of every kind; the page in a real browser."""

import pytest

from moonwhale.lab.curves import chart, decimals, ticks
from moonwhale.lab.page import page
from moonwhale.lab.report import add_differences, summary, table


def run(name: str, seed: int, bits: float | None) -> dict:
    of_all = {"variant": name, "seed": seed, "folder": f"runs/{name}", "options": {"lr": 1e-3}}
    of_all |= {"parameters": 5_000_000, "active_parameters": 2_900_000, "cache_bytes_per_token": 640}
    if bits is None:
        return of_all | {"diverged": "step 3: the loss is nan"}
    curve = [{"seconds": k * 60.0, "tokens": k * 360_000, "bits_per_byte": bits + 1 / k} for k in range(1, 5)]
    figures = {"bits_per_byte": bits, "tokens": 1_440_000, "seconds": 240.0, "tokens_per_second": 6000.0}
    return of_all | figures | {"peak_memory_bytes": 400_000_000, "curve": curve}


def result(seeds: int, **bits: list) -> dict:
    runs = {name: [run(name, seed, value) for seed, value in enumerate(values)] for name, values in bits.items()}
    variants = [{"name": name, "changes": {"lr": [1, 2]}} | summary(own) for name, own in runs.items()]
    add_differences(variants)
    budget = {"unit": "seconds", "amount": 240.0}
    of_all = {
        "moonwhale": "0",
        "budget": budget,
        "seeds": list(range(seeds)),
        "data": "chitchat",
        "passes": 0.4,
        "tuned": None,
    }
    return of_all | {"variants": variants}


# Without the means of variant and seed, base, better and same have (0, 0, 0), (-0.01, 0.01, 0) and (0.01, -0.01, 0).
# s² = 0.0004 / 4, with 4 degrees of freedom.
THREE = {"base": [2.0, 2.1, 2.2], "better": [1.89, 2.01, 2.1], "same": [2.01, 2.09, 2.2], "nan": [2.0, None, 2.0]}


def test_the_table():
    lines = table(result(3, **THREE)).splitlines()
    assert (
        lines[0]
        == "240 s of training each; chitchat, read up to 0.4 times; 3 seeds, 95 % intervals of paired differences"
    )
    assert lines[2].split() == ["base", "2.1000", "6,000", "2.90", "M", "640", "B", "400", "MB"]
    assert lines[3].split()[:6] == ["better", "2.0000", "-0.1000", "±", "0.0227", "better"]
    assert lines[4].split()[:8] == ["same", "2.1000", "+0.0000", "±", "0.0227", "no", "difference", "seen"]
    assert lines[5].split() == ["nan", "1", "of", "3", "diverged", "2.90", "M", "640", "B"]


def test_with_one_seed_there_is_no_interval():
    text = table(result(1, base=[2.0], other=[1.5]))
    assert "1 seed: no interval" in text and "-0.5000  one seed: no interval" in text and "±" not in text


def test_a_base_alone_has_no_difference():
    variants = result(2, base=[2.0, 2.1], other=[None, 2.0])["variants"]
    assert [("difference" in variant, variant["diverged"]) for variant in variants] == [(False, 0), (False, 1)]


def test_a_base_that_diverged_leaves_no_difference():
    text = table(result(1, base=[None], other=[1.5]))
    assert "1 of 1 diverged" in text and "1.5000" in text and "no interval" in text.splitlines()[0]
    assert "<polyline" in page(result(1, base=[None], other=[1.5]))


def test_names_are_shown_as_they_are():
    text = page(result(1, **{"base": [2.0], "<b>&amp;": [1.5]}))
    assert "<b>" not in text and "&lt;b&gt;&amp;amp;" in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 240, [0, 50, 100, 150, 200]),
        (1.83, 2.02, [1.85, 1.9, 1.95, 2.0]),
        (6.0, 6.0966, [6.0, 6.02, 6.04, 6.06, 6.08]),
        (0, 1e6, [0, 2e5, 4e5, 6e5, 8e5, 1e6]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
    assert len({f"{tick:.{decimals(low, high)}f}" for tick in expected}) == len(expected)


def test_a_chart_of_nothing_and_of_a_single_point():
    assert "<svg" not in chart([])
    assert "<polyline" in chart([("base", "red", [[(1.0, 2.0)]])])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page_without_complaints(browser, scheme, tmp_path):
    (tmp_path / "page.html").write_text(page(result(3, **THREE)), encoding="utf-8")
    tab, said = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800}), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("request", lambda request: said.append(request.url) if "page.html" not in request.url else None)
    tab.goto((tmp_path / "page.html").as_uri())
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400  # wide tables scroll by themselves
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    strokes = tab.evaluate("[...document.querySelectorAll('polyline.mean')].map(l => getComputedStyle(l).stroke)")
    assert len(strokes) == 8 and len(set(strokes)) == 4
    tab.close()
