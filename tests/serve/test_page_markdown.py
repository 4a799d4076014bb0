"""The chat page's Markdown: what is shown, that a model's text never becomes a script or a request, and linear time."""

import pytest

from chat_page import ChatPage, conversation

pytestmark = pytest.mark.slow
RENDER = """async text => {
    const { renderMarkdown } = await import("/markdown.js"), box = document.createElement("div");
    box.append(renderMarkdown(text));
    return box.innerHTML;
}"""
LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'


@pytest.fixture(scope="module")
def render(browser, server):
    page = ChatPage(browser, server.url)
    yield lambda text: page.evaluate(RENDER, text)
    page.close()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("*a* **b** ***c***", "<p><em>a</em> <strong>b</strong> <strong><em>c</em></strong></p>"),
        ("_d_ __e__ ~~f~~", "<p><em>d</em> <strong>e</strong> <del>f</del></p>"),
        ("2 * 3 * 4, snake_case_name, * a", "<p>2 * 3 * 4, snake_case_name, * a</p>"),
        ("**open *and never closed", "<p>**open *and never closed</p>"),
        ("**a *b** c*", "<p><strong>a *b</strong> c*</p>"),
        ("`a*b*` ``c`d`` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"),
        (r"\*a\* \<b>", "<p>*a* &lt;b&gt;</p>"),
        ("# One\n### Three ##\n####### no", "<h4>One</h4><h6>Three</h6><p>####### no</p>"),
        ("---\n* * *", "<hr><hr>"),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        (
            "- a\n- b\n  1. c\n\n- d",
            "<ul><li><p>a</p></li><li><p>b</p><ol><li><p>c</p></li></ol></li><li><p>d</p></li></ul>",
        ),
        ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("[a](https://x.org/b_(c))", f"<p>{LINK.format('https://x.org/b_(c)', 'a')}</p>"),
        ("see https://x.org/a.", f"<p>see {LINK.format('https://x.org/a', 'https://x.org/a')}.</p>"),
        ("[a](", "<p>[a](</p>"),
        (
            "![cat](https://x.org/c.png)",
            f'<p><span class="image">image: {LINK.format("https://x.org/c.png", "cat")}</span></p>',
        ),
    ],
)
def test_markdown(render, text, html):
    assert render(text) == html


def test_code_and_tables(render):
    fenced = render("```py\nif a < b:\n\n    *c*\n```\nafter")
    assert "<code>if a &lt; b:\n\n    *c*</code>" in fenced and "<span>py</span>" in fenced
    assert fenced.endswith("<p>after</p>")
    assert "<code>never *closed*\n# it</code>" in render("~~~\nnever *closed*\n# it")
    table = render("| a | *b* |\n|---|:-:|\n| 1 | 2 | 3 |\n| x")
    assert "<th>a</th><th><em>b</em></th>" in table and "<td>1</td><td>2</td></tr>" in table and ">3<" not in table


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><iframe src=javascript:alert(1)></iframe>",
    "<a href='javascript:alert(1)'>x</a><form action=https://evil.example><input name=q>",
    "<style>*{background:url(https://evil.example)}</style><link rel=stylesheet href=https://evil.example>",
    "[x](javascript:alert(1)) [x](JaVaScRiPt:alert(1)) [x](java\tscript:alert(1)) [x](&#106;avascript:alert(1))",
    "[x](\x01javascript:alert(1)) [x]( javascript:alert(1)) [x](<javascript:alert(1)>) <javascript:alert(1)>",
    "[x](data:text/html,<script>alert(1)</script>) [x](vbscript:a) [x](file:///etc/passwd) [x](blob:x)",
    "[x](//evil.example) [x](/xray/1) [x](#settings)",
    '[x](https://evil.example/" onmouseover="alert(1)) [x](https://a "onclick=alert(1)")',
    "![x](https://evil.example/secret.png) ![](javascript:alert(1)) ![x](data:image/svg+xml,<svg/onload=alert(1)>)",
    "[![x](https://evil.example/a.png)](javascript:alert(1))",
    "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>",
    "``` \n<script>alert(1)</script>\n~~~\n",
    "`<script>alert(1)</script>` **<b onclick=alert(1)>**",
    "| <script>alert(1)</script> | [x](javascript:alert(1)) |\n|-|-|\n| <img src=x onerror=alert(1)> |",
    "- <script>alert(1)</script>\n> <script>alert(1)</script>\n# <script>alert(1)</script>",
    "<think><script>alert(1)</script></think><answer><img src=x onerror=alert(1)></answer>",
    "<!-- <script>alert(1)</script> --> <![CDATA[<script>]]> &lt;script&gt; <ScRiPt >alert`1`</sCrIpT>",
    "\u202e<script>\u2028alert(1)\u0000</script>\ufeff \ud83d",
    "constructor __proto__ [__proto__](https://a.b) `constructor` ```__proto__",
]  # fmt: skip


def test_hostile_texts_stay_texts(open_page):
    """As answers, titles, questions and thoughts. The fixture fails if a script runs or a request leaves the server."""
    texts = [text for hostile in HOSTILE for text in (hostile, hostile)]
    page = open_page(
        conversations=[conversation(*texts, title=HOSTILE[1]), conversation("x", "<think>" + HOSTILE[0], time=0)]
    )
    page.open(1)
    page.open(0)
    assert page.texts("#conversations .title >> nth=0") == [HOSTILE[1]]
    assert page.locator("article").count() == 2 * len(HOSTILE)
    for found in page.evaluate("""[...document.querySelectorAll('#messages *, #conversations *')].map(
            node => [node.localName, node.href ?? '', [...node.attributes].map(({ name }) => name)])"""):
        tag, address, attributes = found
        assert tag not in ("script", "img", "svg", "iframe", "form", "input", "style", "link", "object", "b"), found
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcdoc")], found
        assert tag != "a" or address.startswith("https://"), found
    assert page.texts(".assistant .content >> nth=0") == [HOSTILE[0]]
    for link in page.locator("#messages a").all():
        assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"


def test_the_browser_itself_refuses_html_and_scripts_from_text(open_page):
    page = open_page()
    for code in ("document.body.innerHTML = '<b>x</b>'", "document.body.insertAdjacentHTML('beforeend', 'x')"):
        assert (
            page.evaluate(f"(() => {{ try {{ {code}; return 'done' }} catch (e) {{ return e.name }} }})()")
            == "TypeError"
        )
    page.troubles.clear()


PIECES = [
    *("*", "_", "**a ", "*a_b", "**", "a*b", "~", "~~a ", "`", "``a`", "\\", "<div>", "<think>", "h ", "http://", ")"),
    *("[", "[](", "](", "![a](", "[a](https://x.org ", "> ", "> a\n", "- ", " -\n", "  - a\n", "1. ", "```\n", "~~~ "),
    *("~~~ a", "# ", "#", "-", "- - ", "|", "|-", "a|b\n-|-\n", "\n", " "),
]


def test_huge_texts_take_linear_time(browser, server):
    page = ChatPage(browser, server.url)
    slow = page.evaluate(
        """async pieces => {
            const { renderMarkdown } = await import("/markdown.js"), slow = [];
            for (const piece of pieces) for (const text of [
                piece.repeat(40_000 / piece.length),
                `${piece.repeat(40_000 / piece.length)}x\`\n`,
            ]) {
                const start = performance.now();
                renderMarkdown(text);
                if (performance.now() - start > 2000) slow.push([piece, performance.now() - start]);
            }
            return slow;
        }""",
        PIECES,
    )
    assert slow == []  # each takes milliseconds; what is quadratic in 60,000 characters takes seconds
    assert page.evaluate(RENDER, "*" + "a" * 300_000).startswith("<p>*aaa")  # too long: shown as it is
    page.close()
