"""Mixes several sources by weight: `--data tinystories=0.7,openorca=0.3`."""

import math
import os
import re
from collections.abc import Iterator, Sequence

from moonwhale.data.source import Document, RowCounter, Source, digest, warn_once
from moonwhale.errors import UserError

WEIGHT = re.compile(r"=\s*[-+]?[\d.]+(e[-+]?\d+)?\s*(,|$)", re.IGNORECASE)


def parse_mixture(spec: str) -> dict[str, float]:
    """Returns the sources that `spec` names with their weights, or an empty dict if it names a single source.

    A spec with an = or a comma is a mixture, unless a file of that name exists or it is a glob without weights.

    Raises:
        UserError: a source has no weight, has one that is not a number above 0, or is named twice; or there is only
            one source with a weight.
    """
    is_name = os.path.exists(os.path.expanduser(spec)) or not re.search("[=,]", spec)
    is_glob = re.search(r"[*?\[]", spec) and not WEIGHT.search(spec)
    if is_name or is_glob:
        return {}
    weights: dict[str, float] = {}
    for part in spec.split(","):
        name, _, weight = (word.strip() for word in part.rpartition("="))
        if not name:
            raise UserError(f"`data`: {part.strip() or 'nothing'!r} in {spec} is not of the form NAME=WEIGHT")
        if name in weights:
            raise UserError(f"`data`: {name} is named twice in {spec}: add up its weights")
        weights[name] = _parse_weight(name, weight)
    if len(weights) == 1:
        raise UserError(f"`data`: {spec} mixes only one source: leave out the weight, or add another source")
    return weights


def _parse_weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"`data`: the weight of {name} is {text!r}, which is not a number above 0")
    return weight


def mix(spec: str, sources: Sequence[Source], weights: Sequence[float], limit: int | None = None) -> Source:
    """Interleaves the documents of all `sources` by weight, until the first source ends or `limit` is reached."""
    fingerprint = digest([source.fingerprint for source in sources], list(weights), limit)
    return Source(spec, fingerprint, lambda: _interleave(sources, weights, limit), limit)


def _interleave(sources: Sequence[Source], weights: Sequence[float], limit: int | None) -> Iterator[Document]:
    """Takes each document from the source that is furthest behind its weight (the Webster/Sainte-Laguë method).

    The order is deterministic, and after any number of documents each source has contributed about its share.
    """
    counters = [RowCounter(source.name, source.keeps) for source in sources]
    readers = [source.documents(counter) for source, counter in zip(sources, counters, strict=True)]
    taken = [0] * len(sources)
    while limit is None or sum(taken) < limit:
        due = [(n + 0.5) / weight for n, weight in zip(taken, weights, strict=True)]
        turn = due.index(min(due))
        document = next(readers[turn], None)
        if document is None:
            counts = ", ".join(f"{n:,} of {source.name}" for n, source in zip(taken, sources, strict=True))
            warn_once(f"`data`: the mixture ends with {sources[turn].name}, its first source to end, after {counts}")
            break
        taken[turn] += 1
        yield document
    for counter in counters:
        counter.close()
