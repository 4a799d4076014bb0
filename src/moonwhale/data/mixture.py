"""Several sources as one, by weight: `--data tinystories=0.7,openorca=0.3`."""

import math
import os
import re
from collections.abc import Iterator, Sequence

from moonwhale.data.source import Document, Source, Tally, digest, say_once
from moonwhale.errors import UserError

WEIGHTED = re.compile(r"=\s*[-+]?[\d.]+(e[-+]?\d+)?\s*(,|$)", re.IGNORECASE)


def parse_mixture(spec: str) -> dict[str, float]:
    """The parts that `spec` names, with their weights; empty if it names one source.

    What has an = or a comma in it is a mixture, but not if such a file exists or if it is a glob without weights.
    Raises UserError for a part without a weight, with one that is not a number above 0, named twice, or alone.
    """
    is_name = os.path.exists(os.path.expanduser(spec)) or not re.search("[=,]", spec)
    if is_name or (re.search(r"[*?\[]", spec) and not WEIGHTED.search(spec)):
        return {}
    parts: dict[str, float] = {}
    for part in spec.split(","):
        name, _, weight = (word.strip() for word in part.rpartition("="))
        if not name:
            raise UserError(f"`data`: {part.strip() or 'nothing'!r} in {spec} is no NAME=WEIGHT")
        if name in parts:
            raise UserError(f"`data`: {name} stands in {spec} twice: add up its weights")
        parts[name] = _weight(name, weight)
    if len(parts) == 1:
        raise UserError(f"`data`: {spec} is a mixture of one: leave out the weight, or add another source")
    return parts


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"`data`: the weight of {name} is {text!r}, which is not a number above 0")
    return weight


def mix(spec: str, sources: Sequence[Source], weights: Sequence[float], limit: int | None = None) -> Source:
    """Documents of all `sources`, interleaved by weight, until the first of them has none left, or `limit` of them."""
    fingerprint = digest([source.fingerprint for source in sources], list(weights), limit)
    return Source(spec, fingerprint, lambda: _interleave(sources, weights, limit), limit)


def _interleave(sources: Sequence[Source], weights: Sequence[float], limit: int | None) -> Iterator[Document]:
    """The source that is furthest behind its weight gives the next document (the method of Webster and Sainte-Laguë).

    Nothing is drawn by chance, and after any number of documents each source has given about its share of them.
    """
    tallies = [Tally(source.name, source.keeps) for source in sources]
    readers = [source.documents(tally) for source, tally in zip(sources, tallies, strict=True)]
    given = [0] * len(sources)
    while limit is None or sum(given) < limit:
        due = [(n + 0.5) / weight for n, weight in zip(given, weights, strict=True)]
        turn = due.index(min(due))
        document = next(readers[turn], None)
        if document is None:
            counts = ", ".join(f"{n:,} of {source.name}" for n, source in zip(given, sources, strict=True))
            say_once(f"`data`: the mixture ends where {sources[turn].name} does, with these documents: {counts}")
            break
        given[turn] += 1
        yield document
    for tally in tallies:
        tally.close()
