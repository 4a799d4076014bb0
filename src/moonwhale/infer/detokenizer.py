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


class TextStream:
    """Turns ids into text. `text` is final; what could be the beginning of a stop string is held back from it."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()):
        self.text = ""
        self._bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._taken = 0

    def push(self, id: int) -> bool:
        """Add a token. Return True if it completes a stop string; `text` then ends before that string."""
        self._held += self._decoder.decode(self._bytes[id])
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._release(min(found))
            return True
        begun = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        self._release(len(self._held) - max(begun, default=0))
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
