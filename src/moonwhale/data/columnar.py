"""Reads the rows of Parquet and Arrow files, in parts of bounded size.

Such a file holds a value once and refers to it from many rows, compresses its parts, or only counts values that take no
bytes, such as nulls. So a kilobyte may stand for gigabytes. All that is decoded is therefore bounded: at once, in a
row, and relative to the size of the file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from moonwhale.data.opening import GROWTH, MOST_AT_ONCE, ROOM, opened, read_whole, split_suffix
from moonwhale.data.row_formats import KNOWN_COLUMNS
from moonwhale.errors import UserError

ROWS_PER_BATCH = 64  # rows that are decoded at once
BYTES_PER_BATCH = 1 << 24  # bytes that become Python's objects at once, if they are several rows
MOST_OF_BATCH = 1 << 30  # bytes that several rows of a Parquet file may take when they are decoded
MOST_OF_TABLE = 1 << 30  # bytes of a compressed Parquet or Arrow file
REFERENCE = 8  # bytes of every element, which a list of Python's refers to
OBJECT = 56  # bytes of its object too, unless it is None, True or False, which exist once


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Yields the rows of a Parquet file: `columns`, or by default those of KNOWN_COLUMNS that it has."""
    with opened(path) as file:
        yield from _to_rows(_parquet_batches(file, path, columns), path)


def _parquet_batches(file: BinaryIO, path: Path, columns: Sequence[str]) -> Iterator:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(_in_parts(file, path))
    names = _chosen(table.schema_arrow.names, columns)
    for group in range(table.num_row_groups):
        largest = _largest_column(table.metadata.row_group(group), names, path)
        # A value is at most as large as all of its column, which holds it once, however many rows refer to it.
        n_rows = max(1, min(ROWS_PER_BATCH, MOST_OF_BATCH // max(largest, 1)))
        yield from table.iter_batches(n_rows, row_groups=[group], columns=names)


def _largest_column(group, names: Sequence[str], path: Path) -> int:
    """Returns the decompressed bytes of the largest chosen column of a row group."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    chosen = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names]
    for chunk in chosen:
        if chunk.total_uncompressed_size > ROOM + GROWTH * chunk.total_compressed_size:
            raise _grows(path)
    # Values that lists hold beyond one a row: unlike rows, they are decoded all at once.
    in_lists = sum(max(0, chunk.num_values - group.num_rows) for chunk in chosen)
    if in_lists * REFERENCE > ROOM + GROWTH * sum(chunk.total_compressed_size for chunk in chosen):
        raise _grows(path)
    return max((chunk.total_uncompressed_size for chunk in chosen), default=0)


def arrow_rows(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Yields the rows of Arrow's stream format, which `datasets` writes, or of its file format."""
    with opened(path) as file:
        yield from _to_rows(_arrow_batches(file, path, columns), path)


def _arrow_batches(file: BinaryIO, path: Path, columns: Sequence[str]) -> Iterator:
    import pyarrow

    source = _in_parts(file, path)
    if bytes(source.read(6)) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        source.seek(0)
        batches = reader = pyarrow.ipc.open_stream(source)
    names = _chosen(reader.schema.names, columns)
    for batch in batches:
        chosen = batch.select(names)
        chosen.validate(full=True)  # offsets of a damaged file would point outside its memory
        yield from (chosen.slice(start, ROWS_PER_BATCH) for start in range(0, len(chosen), ROWS_PER_BATCH))


def _in_parts(file: BinaryIO, path: Path):
    """Returns an opened file as one to read in parts, at any place. A compressed file has to be read whole."""
    import pyarrow

    if split_suffix(path)[1]:
        return pyarrow.BufferReader(read_whole(file, path, MOST_OF_TABLE))
    return pyarrow.memory_map(str(path))


def _chosen(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Returns the columns to decode, or all if none is known, so that the error can list them."""
    wanted = set(columns or KNOWN_COLUMNS)
    return [name for name in names if name in wanted] if wanted & set(names) else list(names)


def _to_rows(batches: Iterator, path: Path) -> Iterator[dict]:
    """Yields the rows of batches as Python's objects, one at a time if a batch is large."""
    left = ROOM + GROWTH * path.stat().st_size
    for batch in batches:
        size = sum(map(_decoded_size, batch.columns))
        left -= size
        if left < 0:
            raise _grows(path)
        if size <= BYTES_PER_BATCH:
            yield from batch.to_pylist()
            continue
        for row in (batch.slice(i, 1) for i in range(len(batch))):
            if sum(map(_decoded_size, row.columns)) > MOST_AT_ONCE:
                raise UserError(f"`data`: cannot read {path}: a row has more than {MOST_AT_ONCE:,} bytes: split it")
            yield from row.to_pylist()


def _grows(path: Path) -> UserError:
    hint = "write it without compression and dictionaries"
    return UserError(f"`data`: {path} expands to more than {GROWTH} times its size: {hint}")


def _decoded_size(array) -> int:
    """Returns the bytes that the values of an array take as Python's objects, each by itself, or an upper bound."""
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _decoded_size(array.storage)
    if types.is_null(kind) or types.is_boolean(kind):
        return REFERENCE * len(array)
    objects = REFERENCE * len(array) + OBJECT * (len(array) - array.null_count)
    if types.is_dictionary(kind) and types.is_string(kind.value_type):
        return objects + (compute.sum(compute.binary_length(array.dictionary).take(array.indices)).as_py() or 0)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return objects + _decoded_size(array.flatten())
    if types.is_struct(kind):
        return objects + sum(map(_decoded_size, array.flatten()))
    if types.is_string(kind) or types.is_large_string(kind) or types.is_primitive(kind):
        return objects + array.nbytes
    # Elements of other kinds may share values. Each is at most as large as all of them.
    return objects + len(array) * (array.get_total_buffer_size() + sum(map(_decoded_size, _shared(array))))


def _shared(array) -> list:
    """Returns the arrays to whose values the elements of a dictionary, view, map, union or run refer."""
    if hasattr(array, "field"):
        return [array.field(i) for i in range(array.type.num_fields)]
    return [getattr(array, name) for name in ("dictionary", "values") if hasattr(array, name)]
