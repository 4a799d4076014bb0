"""The hub's data sets that have a short name here: the columns read, the filter, the licence.

To add a set, add its entry to HUB_SETS and its line to docs/data.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moonwhale.data.row_formats import BadRow, chat
from moonwhale.data.source import Document
from moonwhale.errors import UserError


@dataclass(frozen=True)
class HubSet:
    """What `--data NAME` or `--data NAME:CHOICE` reads.

    The choice is a configuration of the set or, if the set has a filter (`keeps`), a language.

    `to_document` makes a document of a row, or returns None to filter the row out. It may raise BadRow. In a set with a
    filter, it takes the language as an argument too.
    """

    id: str  # the set's name on the hub
    columns: tuple[str, ...]
    to_document: Callable[..., Document | None]
    licence: str
    default: str | None = None  # the choice if the user names none; None leaves it to the hub
    choices: str = ""  # examples, if the user has to name one
    keeps: str = ""  # what the filter lets through; {} stands for the language
    gated: bool = False
    note: str = ""

    def choose(self, spec: str) -> tuple[str | None, Callable[[dict], Document | None], str]:
        """Resolves `NAME` or `NAME:CHOICE`.

        Returns:
            the configuration, the function that makes a document of a row, and what the filter keeps.

        Raises:
            UserError: the set needs a choice and `spec` has none.
        """
        name, _, choice = spec.partition(":")
        choice = choice or self.default
        if self.choices and not choice:
            raise UserError(f"`data`: {name} needs a configuration: {name}:NAME, with one such as {self.choices}")
        if self.keeps:
            return None, partial(self.to_document, language=choice), self.keeps.format(choice)
        return choice, self.to_document, ""


def _text(row: dict) -> Document:
    if not isinstance(row["text"], str):
        raise BadRow("no text", row)
    return row["text"]


def _article(row: dict) -> Document:
    text = _text(row)
    return f"{row['title']}\n\n{text}" if row["title"] and text.strip() else text


def _openorca(row: dict) -> Document:
    contents = {"system": row["system_prompt"] or "", "user": row["question"], "assistant": row["response"]}
    return chat([{"role": role, "content": content} for role, content in contents.items()])


def _infinity_instruct(row: dict) -> Document:
    return chat(row["conversations"])


def _lmsys_chat(row: dict, language: str) -> Document | None:
    """Keeps one language. Drops what the moderation flagged, and conversations in which names were redacted."""
    flags = [verdict and verdict["flagged"] for verdict in row["openai_moderation"] or []]
    if not flags or None in flags:
        raise BadRow("no moderation", row)
    if any(flags) or row["redacted"] is not False or str(row["language"]).casefold() != language.casefold():
        return None
    return chat(row["conversation"])


HUB_SETS = {
    "wikicorpus": HubSet(
        id="wikimedia/wikipedia",
        columns=("title", "text"),
        to_document=_article,
        licence="CC BY-SA 3.0 and GFDL",
        default="20231101.en",
        note="wikicorpus's own loading script no longer works, so this is Wikipedia as of November 2023",
    ),
    "fineweb-edu": HubSet(
        id="HuggingFaceFW/fineweb-edu",
        columns=("text",),
        to_document=_text,
        licence="ODC-By 1.0, and Common Crawl's terms of use",
        default="sample-10BT",
        note="a download of 28 GB, unless `data_documents` limits it",
    ),
    "tinystories": HubSet(
        id="roneneldan/TinyStories",
        columns=("text",),
        to_document=_text,
        licence="CDLA-Sharing 1.0",
    ),
    "openorca": HubSet(
        id="Open-Orca/OpenOrca",
        columns=("system_prompt", "question", "response"),
        to_document=_openorca,
        licence="MIT",
        note="its answers were written by GPT-3.5 and GPT-4",
    ),
    "infinity-instruct": HubSet(
        id="BAAI/Infinity-Instruct",
        columns=("conversations",),
        to_document=_infinity_instruct,
        licence="CC BY-SA 4.0",
        choices="3M, 7M, 0625, Gen, 7M_core",
        gated=True,
        note="English and Chinese",
    ),
    "lmsys-chat-1m": HubSet(
        id="lmsys/lmsys-chat-1m",
        columns=("conversation", "language", "openai_moderation", "redacted"),
        to_document=_lmsys_chat,
        licence="LMSYS-Chat-1M Dataset License Agreement",
        default="English",
        keeps="what is in {}, not flagged by the moderation, and not redacted",
        gated=True,
        note="what people wrote to chatbots in 2023: read the agreement first",
    ),
}

# The help text of --data, in every verb that has it.
DATA_HELP = (
    "file, folder, glob, hub set owner/name[:configuration]; built in: chitchat, python; by name: "
    f"{', '.join(HUB_SETS)}; or several with weights, as A=0.7,B=0.3"
)
