"""A stream for requests whose text no test reads."""


class Silent:
    """A TextStream that emits no text."""

    text = ""

    def push(self, token):
        return False

    def flush(self):
        pass
