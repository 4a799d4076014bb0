"""Loads data sets from the Hugging Face hub, downloaded or streamed, and explains why one cannot be loaded."""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence

from moonwhale.data.file_formats import READER
from moonwhale.data.hub_access import hub_access
from moonwhale.data.hub_sets import HUB_SETS, HubSet
from moonwhale.data.row_formats import columns_of, read_rows
from moonwhale.data.source import Source, digest, warn_once
from moonwhale.errors import UserError, did_you_mean, one_line


def load_hub_set(spec: str, split: str = "train", columns: Sequence[str] = (), limit: int | None = None) -> Source:
    """Returns the hub set that `spec` names: one of HUB_SETS, which has columns of its own, or any as `owner/name`.

    Both may be followed by `:configuration`. With a `limit` of documents the set is streamed, otherwise it is
    downloaded whole.

    Raises:
        UserError: the set cannot be loaded; on iteration, reading was interrupted.
    """
    import datasets

    if limit and "[" in split:
        raise UserError(f"`data_split` {split}: a slice needs the whole set: leave out either it or `data_documents`")
    id, _, configuration = spec.partition(":")
    known, to_document, keeps = HUB_SETS.get(id), None, ""
    if known:
        id, columns = known.id, known.columns
        configuration, to_document, keeps = known.choose(spec)
        name = f"{id} {configuration}" if configuration else id
        warn_once(f"`data` {spec}: {name}, licence {known.licence}" + (f" ({known.note})" if known.note else ""))
    try:
        with hub_access():
            builder = datasets.load_dataset_builder(id, configuration or None)
            if limit:
                rows = builder.as_streaming_dataset(split)
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split)
    except Exception as error:  # missing, gated, offline, no such split or configuration: each has its own class
        raise UserError(explain_load_failure(spec, id, known, error)) from error
    if columns and rows.column_names and set(columns) <= set(rows.column_names):
        rows = rows.select_columns(list(columns))  # saves decoding the others
    # Single columns of text are read as ever, so that tokens made before READER was raised stay valid.
    is_text = columns or columns_of(rows.column_names or ["text"]) in (("text",), ("content",))
    return Source(
        spec,
        digest(spec, builder.hash, split, columns, limit, *([] if is_text else [READER])),
        lambda: read_rows(_explain_interruption(rows, spec), spec, columns, to_document),
        limit or rows.num_rows,
        limit,
        keeps,
    )


def _explain_interruption(rows: Iterable[dict], spec: str) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:  # a lost connection, a damaged file: each has its own class
        raise UserError(f"`data`: reading {spec} was interrupted, try again: {one_line(error)}") from error


def explain_load_failure(spec: str, id: str, known: HubSet | None, error: Exception, field: str = "data") -> str:
    """Returns the error message for a hub set that could not be loaded.

    Args:
        spec: what the user asked for.
        id: the set's name on the hub.
        known: the set's entry in HUB_SETS, if it has one.
        error: what `datasets` raised.
        field: the option by which the user asked for the set.
    """
    # If preparing the set fails, the library's own message says only that it failed; the cause says why.
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
            "connect once, or copy the set's files here and give their folder"
        )
    if re.search("(Unknown|Bad) split", message):
        return f"`{field}_split`: {spec}: {message}"
    if names := re.search(r"[Aa]vailable(?: configs.*?)?: (\[.*?\])", str(error), re.DOTALL):
        cached = " (in the cache: the hub cannot be reached)" if "in the cache" in message else ""
        return f"`{field}`: {spec}: {_list_configurations(spec, ast.literal_eval(names[1]))}{cached}"
    return f"`{field}`: {spec} is no file or folder here, and cannot be loaded from the hub: {message}"


def _list_configurations(spec: str, names: list[str]) -> str:
    name, _, wrong = spec.partition(":")
    listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    what = f"there is no configuration {wrong}{did_you_mean(wrong, names)}" if wrong else "a configuration is missing"
    return f"{what}; give {name}:NAME with one of {listed}"
