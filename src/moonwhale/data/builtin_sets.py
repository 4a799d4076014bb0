"""The two sources that need no download: chitchat's conversations, and Python's standard library."""

import importlib.util
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moonwhale.data.source import Document
from moonwhale.errors import UserError

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def chitchat_file() -> Path:
    """Returns the file of conversations in the package chitchat-dataset. Raises UserError if it is not installed."""
    package = importlib.util.find_spec("chitchat_dataset")
    if package is None:
        raise UserError("`data` chitchat needs a package: pip install chitchat-dataset==0.9.0")
    return Path(package.submodule_search_locations[0]) / "dataset.json"


def read_chitchat(path: Path) -> Iterator[Document]:
    """Yields the conversations of at least four turns between exactly two people. The first to speak is the user."""
    for conversation in json.loads(path.read_bytes()).values():
        turns = conversation["messages"]
        senders = list(dict.fromkeys(utterance["sender"] for turn in turns for utterance in turn))
        if len(senders) == 2 and len(turns) >= 4:
            yield _messages(turns, user=senders[0])


def _messages(turns: list[list[dict]], user: str) -> list[dict]:
    """Merges consecutive turns of one person into one message, and drops blank turns."""
    messages: list[dict] = []
    for turn in turns:
        role = "user" if turn[0]["sender"] == user else "assistant"
        text = "\n".join(utterance["text"].strip() for utterance in turn if utterance["text"].strip())
        if not text:
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def standard_library_files() -> list[Path]:
    """Returns the Python files of the standard library, without its tests and the installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
