"""Data sets on the Hugging Face hub: kept whole in the cache, or streamed; and what to do if that fails."""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence

from moonwhale.data.hub_sets import SETS, HubSet
from moonwhale.data.row_formats import read_rows
from moonwhale.data.source import Source, digest, say_once
from moonwhale.errors import UserError, did_you_mean, one_line


def load_hub(spec: str, split: str = "train", columns: Sequence[str] = (), limit: int | None = None) -> Source:
    """The set that `spec` names: one of SETS, which have their own columns, or any as `owner/name`, both perhaps with
    `:configuration` after it. With a `limit` of documents it is streamed, else downloaded whole.

    Raises UserError when it cannot be loaded, and on iteration when reading breaks off.
    """
    import datasets

    if limit and "[" in split:
        raise UserError(f"`data_split` {split}: a slice is cut from the whole set; give it or `data_documents`")
    id, _, configuration = spec.partition(":")
    known, document, keeps = SETS.get(id), None, ""
    if known:
        id, columns = known.id, known.columns
        configuration, document, keeps = known.choose(spec)
        name = f"{id} {configuration}" if configuration else id
        say_once(f"`data` {spec}: {name}, licence {known.licence}" + (f" ({known.note})" if known.note else ""))
    try:
        builder = datasets.load_dataset_builder(id, configuration or None)
        if limit:
            rows = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split)
    except Exception as error:  # not there, gated, offline, no such split or configuration: each is another class
        raise UserError(why_not(spec, id, known, error)) from error
    if columns and rows.column_names and set(columns) <= set(rows.column_names):
        rows = rows.select_columns(list(columns))  # the others need not be decoded
    return Source(
        spec,
        digest(spec, builder.hash, split, columns, limit),
        lambda: read_rows(_reading(rows, spec), spec, columns, document),
        limit or rows.num_rows,
        limit,
        keeps,
    )


def _reading(rows: Iterable[dict], spec: str) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:  # a connection that broke, a damaged file: each is another class
        raise UserError(f"`data`: reading {spec} broke off, try again: {one_line(error)}") from error


def why_not(spec: str, id: str, known: HubSet | None, error: Exception, field: str = "data") -> str:
    """What to tell a user of a set that could not be loaded, and was asked for by the option `field`."""
    # Of a failing preparation, the library's own error says only that it failed.
    message = one_line(error.__cause__ if "error occurred while generating" in str(error) else error)
    if "scripts are no longer supported" in message:
        instead = "wikicorpus" if "wikicorpus" in id else "a copy of it in Parquet"
        return f"`{field}`: {spec} is a loading script, which the datasets library no longer runs (use {instead})"
    missing = "doesn't exist on the Hub" in message
    if "gated" in message or (missing and known and known.gated):
        return (
            f"`{field}`: {spec} is gated: ask for access at https://huggingface.co/datasets/{id}, "
            "then run `hf auth login` or set HF_TOKEN"
        )
    if missing:
        return f"`{field}`: no such file, folder or hub data set: {spec} (a private one needs `hf auth login`)"
    if "Couldn't reach" in message:
        return (
            f"`{field}`: {spec} is not in the cache, and the hub ({id}) cannot be reached or HF_HUB_OFFLINE is set: "
            "connect once, or copy the set's files here and name their folder"
        )
    if re.search("(Unknown|Bad) split", message):
        return f"`{field}_split`: {spec}: {message}"
    if names := re.search(r"[Aa]vailable(?: configs.*?)?: (\[.*?\])", str(error), re.DOTALL):
        cached = " (in the cache: the hub cannot be reached)" if "in the cache" in message else ""
        return f"`{field}`: {spec}: {_configurations(spec, ast.literal_eval(names[1]))}{cached}"
    return f"`{field}`: {spec} is no file or folder here, and cannot be loaded from the hub: {message}"


def _configurations(spec: str, names: list[str]) -> str:
    name, _, wrong = spec.partition(":")
    there = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    what = f"there is no configuration {wrong}{did_you_mean(wrong, names)}" if wrong else "a configuration is missing"
    return f"{what}; give {name}:NAME with one of {there}"
