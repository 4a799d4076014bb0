"""The hub's data sets that have a name here: which columns are read, what is let through, under which licence."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moonwhale.data.row_formats import BadRow, chat
from moonwhale.data.source import Document
from moonwhale.errors import UserError


@dataclass(frozen=True)
class HubSet:
    """What `--data NAME` reads, or `NAME:CHOICE`, where one can choose a configuration or (`keeps`) a language."""

    id: str  # on the hub
    columns: tuple[str, ...]
    document: Callable[..., Document | None]  # of a row; None if a filter holds it back. May raise BadRow
    licence: str
    default: str | None = None  # where no choice is named; None leaves it to the hub
    choices: str = ""  # examples, where one has to be named
    keeps: str = ""  # what the filter lets through; {} is the language, then `document`'s second argument
    gated: bool = False
    note: str = ""

    def choose(self, spec: str) -> tuple[str | None, Callable[[dict], Document | None], str]:
        """Configuration, what makes a document of a row, and what the filter keeps, for `NAME` or `NAME:CHOICE`.

        Raises UserError where a choice is missing.
        """
        name, _, choice = spec.partition(":")
        choice = choice or self.default
        if self.choices and not choice:
            raise UserError(f"`data`: {name} needs a configuration: {name}:NAME, with one such as {self.choices}")
        if self.keeps:
            return None, partial(self.document, language=choice), self.keeps.format(choice)
        return choice, self.document, ""


def _text(row: dict) -> Document:
    if not isinstance(row["text"], str):
        raise BadRow("no text", row)
    return row["text"]


def _article(row: dict) -> Document:
    text = _text(row)
    return f"{row['title']}\n\n{text}" if row["title"] and text.strip() else text


def _openorca(row: dict) -> Document:
    roles = {"system": row["system_prompt"] or "", "user": row["question"], "assistant": row["response"]}
    return chat([{"role": role, "content": content} for role, content in roles.items()])


def _infinity_instruct(row: dict) -> Document:
    return chat(row["conversations"])


def _lmsys_chat(row: dict, language: str) -> Document | None:
    """One language, nothing that the moderation flagged, nothing in which names were blotted out."""
    flags = [verdict and verdict["flagged"] for verdict in row["openai_moderation"] or []]
    if not flags or None in flags:
        raise BadRow("no moderation", row)
    if any(flags) or row["redacted"] is not False or str(row["language"]).casefold() != language.casefold():
        return None
    return chat(row["conversation"])


SETS = {
    "wikicorpus": HubSet(
        id="wikimedia/wikipedia",
        columns=("title", "text"),
        document=_article,
        licence="CC BY-SA 3.0 and GFDL",
        default="20231101.en",
        note="wikicorpus's own loading script no longer works, so this is Wikipedia as of November 2023",
    ),
    "fineweb-edu": HubSet(
        id="HuggingFaceFW/fineweb-edu",
        columns=("text",),
        document=_text,
        licence="ODC-By 1.0, and Common Crawl's terms of use",
        default="sample-10BT",
        note="a download of 28 GB, unless --data-documents says how much of it to read",
    ),
    "tinystories": HubSet(
        id="roneneldan/TinyStories",
        columns=("text",),
        document=_text,
        licence="CDLA-Sharing 1.0",
    ),
    "openorca": HubSet(
        id="Open-Orca/OpenOrca",
        columns=("system_prompt", "question", "response"),
        document=_openorca,
        licence="MIT",
        note="its answers are GPT-3.5's and GPT-4's",
    ),
    "infinity-instruct": HubSet(
        id="BAAI/Infinity-Instruct",
        columns=("conversations",),
        document=_infinity_instruct,
        licence="CC BY-SA 4.0",
        choices="3M, 7M, 0625, Gen, 7M_core",
        gated=True,
        note="English and Chinese",
    ),
    "lmsys-chat-1m": HubSet(
        id="lmsys/lmsys-chat-1m",
        columns=("conversation", "language", "openai_moderation", "redacted"),
        document=_lmsys_chat,
        licence="LMSYS-Chat-1M Dataset License Agreement",
        default="English",
        keeps="what is in {}, not flagged by the moderation, and not redacted",
        gated=True,
        note="what people wrote to chatbots in 2023: read the agreement first",
    ),
}

# What the command lines say of --data.
DATA_HELP = (
    "file, folder, glob, hub set owner/name[:configuration]; built in: chitchat, python; by name: "
    f"{', '.join(SETS)}; or several with weights, as A=0.7,B=0.3"
)
