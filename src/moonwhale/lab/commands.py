"""The verb `moonwhale compare`."""

from moonwhale.lab.config import parse
from moonwhale.reports import reporting


def main(argv: list[str]) -> None:
    """Compares variants of a model, as the arguments ask."""
    asked = parse(argv)

    from moonwhale.lab.compare import compare

    with reporting(asked.json) as show:
        show(compare(asked))
