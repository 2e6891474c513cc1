"""Files → parsed records: the one place where records that can't be used are collected, and refused or listed."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from kochat_trl.data.readers import read_records
from kochat_trl.data.records import BrokenRecordsError, RawRecord, RecordError, Source

from tqdm import tqdm

Parsed = TypeVar("Parsed")


def read_parsed(
    files: Sequence[str],
    parse: Callable[[RawRecord], Parsed],
    invalid: list[RecordError],
    skip_invalid: bool = False,
    limit: int | None = None,
) -> Iterator[tuple[Source, Parsed]]:
    """Yield what `parse` makes of each of the first `limit` records of `files`, and where it came from.

    The errors of those that it raises a `RecordError` for are added to `invalid`. All files are read before it raises
    `BrokenRecordsError` for them, so that a person sees all that is wrong; it doesn't if `skip_invalid`.
    """
    raws = (raw for file in files for raw in tqdm(read_records(file), desc=f"Reading {file}", delay=2, leave=False))
    read = 0
    for raw in islice(raws, limit):
        read += 1
        try:
            parsed = parse(raw)
        except RecordError as error:
            invalid.append(error)
        else:
            yield raw.source, parsed
    if invalid and not skip_invalid:
        raise BrokenRecordsError(invalid, read)
