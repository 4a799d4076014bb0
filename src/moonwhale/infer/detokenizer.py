"""Text out of token ids that come one at a time, never cut inside a character or a stop string."""

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenBytes:
    """The bytes each id of a byte-level tokenizer stands for; none for control tokens and for ids it does not know."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._token_of = tokenizer.backend_tokenizer.id_to_token
        self._silent = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def __getitem__(self, id: int) -> bytes:
        token = self._token_of(id)
        if token is None or id in self._silent:
            return b""
        try:
            return bytes(BYTE_OF[character] for character in token)
        except KeyError:  # an added token, spelt as it is
            return token.encode()


class TextStream:
    """Collects ids. `text` is what can no longer change; a possible beginning of a stop string is held back from it."""

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = ()):
        self.text = ""
        self._bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._taken = 0

    def push(self, id: int) -> bool:
        """Adds a token. True when that completes a stop string: then `text` ends just before it."""
        self._held += self._decoder.decode(self._bytes[id])
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._settle(min(found))
            return True
        begun = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        self._settle(len(self._held) - max(begun, default=0))
        return False

    def flush(self) -> None:
        """No more tokens come: what was held back is text after all, and an unfinished character becomes U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        self._settle(len(self._held))

    def take(self) -> str:
        """What `text` has gained since the last call."""
        start, self._taken = self._taken, len(self.text)
        return self.text[start:]

    def _settle(self, n: int) -> None:
        self.text, self._held = self.text + self._held[:n], self._held[n:]
