"""Parquet and Arrow → records, a batch at a time; a column that is null is kept as one, as in JSON."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from kochat_trl.data.formats.beginning import Located
from kochat_trl.errors import UserError

_ROWS_AT_ONCE = 1024
_BUFFER = 2**18  # bytes of a column that are read together
_INDEX = re.compile(r"__index_level_\d+__")  # pandas'


def read_parquet(file: str, stream: BinaryIO) -> Iterator[Located]:
    """The rows of a Parquet file. Raises `UserError`, with the file's name, if it is broken."""
    import pyarrow.parquet as pq

    with _told(file, "Parquet"):
        parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER)
        yield from _located(file, parquet.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False))


def read_arrow(file: str, stream: BinaryIO) -> Iterator[Located]:
    """The rows of an Arrow file, or of a stream, as `datasets` saves it. Raises as `read_parquet` does."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        if stream.peek(6)[:6] == b"ARROW1":  # type: ignore[attr-defined]
            reader = pa.ipc.open_file(stream)
            whole = map(reader.get_batch, range(reader.num_record_batches))
        else:
            whole = iter(pa.ipc.open_stream(stream))
        for batch in whole:
            batch.validate(full=True)  # what reads it believes what it says
            yield from (batch.slice(start, _ROWS_AT_ONCE) for start in range(0, batch.num_rows, _ROWS_AT_ONCE))

    with _told(file, "Arrow"):
        yield from _located(file, batches())


@contextmanager
def _told(file: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
        shown = "".join(c if c.isprintable() else "\ufffd" for c in reason)
        raise UserError(f"{file}: is no whole {kind} file, or a broken one: {shown}") from None


def _located(file: str, batches: Iterator[Any]) -> Iterator[Located]:
    for batch in batches:
        for fields in rows(file, batch):
            yield None, fields


def rows(file: str, batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch or a table. Raises `UserError` if two columns have the same name."""
    names = [name for name in batch.schema.names if not _INDEX.fullmatch(name)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: two columns have the name {twice!r}")
    columns = [batch.column(name) for name in names]
    values = [_values(column) for column in columns]
    for row in zip(*values, strict=True) if names else ():
        yield dict(zip(names, row, strict=True))


def _values(column: Any) -> list[Any]:
    """The values of a column, those of structs without what is null in them."""
    clean = _without_nulls_in(column.type)
    values = column.to_pylist()
    return [value if value is None else clean(value) for value in values] if clean else values


def _without_nulls_in(kind: Any) -> Callable[[Any], Any] | None:
    """What leaves nulls out of structs in values of an Arrow type; None if there are no structs in it."""
    from pyarrow import types

    nested = types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return without_nulls if nested and "struct<" in str(kind) else None


def without_nulls(value: Any) -> Any:
    """`value` without fields that are null, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
