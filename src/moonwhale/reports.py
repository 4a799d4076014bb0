"""`--json`: a verb's result as one JSON object on standard output, and everything else on standard error."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

from moonwhale.processes import is_main_process


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json` to the parser of a verb that reports something."""
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to standard error")


@contextmanager
def reporting(as_json: bool) -> Iterator[Callable[..., None]]:
    """Context that yields `show(result, text="")`, which prints the text, or with `as_json` the result.

    With `as_json`, whatever is printed otherwise goes to standard error. The main process alone prints.
    """
    out = sys.stdout

    def show(result: dict, text: str = "") -> None:
        if is_main_process() and as_json:
            print(json.dumps(finite(result), indent=2), file=out)
        elif is_main_process() and text:
            print(text)

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield show


def finite(value: object) -> object:
    """Replace NaN and infinities, which JSON lacks, by None, at any depth."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
