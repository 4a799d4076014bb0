"""Blocks of a page that a script writes: what lies between `<!-- begin:NAME -->` and `<!-- end:NAME -->`."""

import re
import sys
from pathlib import Path


def replaced(text: str, blocks: dict[str, str], page: str) -> str:
    """Returns the text of a page with its blocks replaced, by name."""
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- begin:{name} -->\n).*?(<!-- end:{name} -->)", re.DOTALL)
        text, n = pattern.subn(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
        assert n == 1, f"{page} has {n} blocks named {name}, not one"
    return text


def write_or_check(page: Path, after: str, script: str) -> None:
    """Writes the page. With `--check` on the command line, ends the script instead: its status says if they differ."""
    if "--check" in sys.argv:
        is_current = page.read_text(encoding="utf-8") == after
        sys.exit(0 if is_current else f"{page.name} is not up to date: run python docs/{script}")
    page.write_text(after, encoding="utf-8")
