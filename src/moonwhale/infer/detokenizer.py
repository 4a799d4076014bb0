"""From token ids to text, one token at a time. A piece of text never ends inside a character or a stop string."""

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenBytes:
    """The bytes of each id of a byte-level tokenizer. Control tokens and unknown ids have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._token_of = tokenizer.backend_tokenizer.id_to_token
        self._control_ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __getitem__(self, id: int) -> bytes:
        token = self._token_of(id)
        if token is None or id in self._control_ids:
            return b""
        try:
            return bytes(BYTE_OF[character] for character in token)
        except KeyError:  # an added token is spelt in plain text
            return token.encode()


class StopString:
    """Finds a string in a text that comes in pieces (Knuth, Morris and Pratt), in time linear in the text."""

    def __init__(self, stop: str):
        self.stop = stop
        self.begun = 0  # characters of `stop` that the text ends with, the largest number less than all of them
        self._shorter = [0] * len(stop)  # for `stop[: i + 1]`, its longest proper prefix that is also its suffix
        length = 0
        for i in range(1, len(stop)):
            length = self._shorter[i] = self._extended(length, stop[i])

    def _extended(self, length: int, character: str) -> int:
        """Return how much of `stop` a text ends with after a character, if it ended with `length` of it before."""
        while length and self.stop[length] != character:
            length = self._shorter[length - 1]
        return length + (self.stop[length] == character)

    def find(self, piece: str) -> int | None:
        """Add a piece. Return where the first occurrence ends in it, or None."""
        for i, character in enumerate(piece, start=1):
            self.begun = self._extended(self.begun, character)
            if self.begun == len(self.stop):
                return i
        return None


class TextStream:
    """Turns ids into text. `text` is final; what could be the beginning of a stop string is held back from it."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()):
        self.text = ""
        self._bytes, self._stops = token_bytes, [StopString(text) for text in stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._taken = 0

    def push(self, id: int) -> bool:
        """Add a token. Return True if it completes a stop string; `text` then ends before that string."""
        piece, before = self._decoder.decode(self._bytes[id]), len(self._held)
        self._held += piece
        ends = [(end, stop) for stop in self._stops if (end := stop.find(piece)) is not None]
        if ends:
            self._release(min(before + end - len(stop.stop) for end, stop in ends))
            return True
        self._release(len(self._held) - max((stop.begun for stop in self._stops), default=0))
        return False

    def flush(self) -> None:
        """End the text: release what was held back. An unfinished character becomes U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        self._release(len(self._held))

    def take(self) -> str:
        """Return what has been added to `text` since the last call."""
        start, self._taken = self._taken, len(self.text)
        return self.text[start:]

    def _release(self, n: int) -> None:
        """Move the first n characters that are held back to `text`."""
        self.text, self._held = self.text + self._held[:n], self._held[n:]
