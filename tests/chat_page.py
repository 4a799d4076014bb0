"""The chat page as a user sees it, for its tests."""

import json

STORED = "moonwhale.conversation."
SIZES = {"desktop": (1280, 800), "phone": (360, 640)}

# A test writes the answers in place of the server: `answer` is the stream of the one that the page waits for, `asked`
# are the messages that were sent, and `dropped` is how many of them the server says that it has dropped.
TAKE_OVER = """() => {
    const own = fetch;
    window.fetch = (url, options) => {
        if (!url.includes("chat/completions")) return own(url, options);
        window.asked = JSON.parse(options.body).messages;
        const body = new ReadableStream({ start: stream => {
            window.answer = stream;
            options.signal.onabort = () => stream.error(options.signal.reason);
        } });
        return Promise.resolve(new Response(body, { headers: { "moonwhale-dropped-messages": window.dropped ?? 0 } }));
    };
}"""
ASKED = "while (!window.answer) await new Promise(done => setTimeout(done))"  # wait_for_function needs eval


class ChatPage:
    """The chat page in a tab of its own. It notes scripts' errors, and requests that leave the server."""

    def __init__(self, browser, url: str, size: str = "desktop", scheme: str = "light", conversations=()):
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        for stored in conversations:
            name, value = json.dumps(f"{STORED}{stored['id']}"), json.dumps(json.dumps(stored))
            self.context.add_init_script(f"localStorage[{name}] ??= {value}")
        self.tab, self.troubles = self.context.new_page(), []
        self.tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.tab.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.tab.on("dialog", lambda dialog: (self.troubles.append(f"alert: {dialog.message}"), dialog.dismiss()))
        self.tab.on("request", lambda r: None if r.url.startswith(url) else self.troubles.append(f"left: {r.url}"))
        self.tab.goto(url)
        self.tab.wait_for_selector("#model:has-text('tiny')")

    def __getattr__(self, name):
        return getattr(self.tab, name)

    def close(self) -> None:
        """Closes the tab, and fails if something went wrong that the page does not say in words."""
        self.context.close()
        in_words = ("Failed to load resource", "net::ERR")  # the console repeats what the page says
        assert not [trouble for trouble in self.troubles if not any(text in trouble for text in in_words)]

    def send(self, text: str) -> None:
        self.fill("#text", text)
        self.press("#text", "Enter")

    def say(self, text: str) -> None:
        """Sends a message, and waits until its answer is complete."""
        self.send(text)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        self.wait_for_selector("#send:visible")

    def take_over_answers(self) -> None:
        """From now on, `write` writes the answers, and `break_off` ends one too early."""
        self.evaluate(TAKE_OVER)

    def write(self, text: str) -> None:
        self.evaluate(f"async text => {{ {ASKED}; answer.enqueue(new TextEncoder().encode(text)); }}", text)

    def break_off(self) -> None:
        self.evaluate(f"async () => {{ {ASKED}; answer.error(new Error()); window.answer = null; }}")

    def set_option(self, name: str, value: str) -> None:
        self.click("#open-settings")
        self.fill(f"#settings [name={name}]", value)
        self.click("#settings button[value=save]")

    def open(self, number: int) -> None:
        """Opens a stored conversation, counted from 0."""
        self.open_menu()
        self.click(f"#conversations .title >> nth={number}")

    def open_menu(self) -> None:
        if self.is_visible("#menu") and not self.is_visible("#sidebar"):
            self.click("#menu")

    def stored(self) -> list:
        """Returns the stored conversations, newest first."""
        names = f"Object.keys(localStorage).filter(name => name.startsWith('{STORED}'))"
        found = self.evaluate(f"{names}.map(name => JSON.parse(localStorage[name]))")
        return sorted(found, key=lambda one: -one["time"])

    def texts(self, selector: str) -> list[str]:
        return self.locator(selector).all_inner_texts()


def conversation(*texts: str, title: str = "Whales", time: int = 1, **answer) -> dict:
    """A stored conversation of questions and answers in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    for message in messages[1::2]:
        message |= {"facts": "12 tokens, 300 per second", "from": 0} | answer
    return {"id": title, "title": title, "messages": messages, "draws": 1, "time": time}


def events(*deltas: str, end: str = "data: [DONE]\n\n") -> str:
    """The server-sent events of a streamed answer."""
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}], "usage": None} for text in deltas]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
