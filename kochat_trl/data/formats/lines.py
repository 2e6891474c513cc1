"""Bytes → lines of text: unpacked, decoded, and an error that names the line where either fails."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from kochat_trl.errors import UserError

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
PACKED_SUFFIXES = {".gz", ".zst"}


@dataclass(frozen=True)
class Opened:
    """The bytes of a file, unpacked; `magic` is the first eight of them, which are still to be read."""

    stream: BinaryIO
    packed: Literal["gzip", "zstd"] | None
    magic: bytes


@contextmanager
def open_file(file: str) -> Iterator[Opened]:
    """Open a file once, so that a pipe can be read, too. Raises `UserError` if it can't be opened."""
    try:
        raw = open(file, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}. Check the path.") from None
    with raw:
        stream, packed = cast(BinaryIO, raw), None
        magic = raw.peek(8)[:8]
        if magic.startswith(_GZIP):
            stream, packed = cast(BinaryIO, gzip.GzipFile(fileobj=raw)), "gzip"
        elif magic.startswith(_ZSTD):
            import pyarrow as pa  # takes a while to import, and most data isn't packed so

            stream, packed = cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))), "zstd"
        yield Opened(stream, cast(Literal["gzip", "zstd"] | None, packed), b"" if packed else magic)


def name_inside(file: str) -> str:
    """The name of what is in a file, in lower case: without `.gz` or `.zst`."""
    name = file.lower()
    return name.rpartition(".")[0] if Path(name).suffix in PACKED_SUFFIXES else name


def decoded(file: str, stream: BinaryIO, encoding: str) -> Iterator[str]:
    """The lines of a file, with their ends; a line ends at `\\n` alone.

    Raises `UserError`, with the line, where the bytes can't be unpacked or decoded. Of an encoding in which `\\n` takes
    more bytes than one, such as UTF-16, that line is the last one before, since it is decoded in blocks.
    """
    codec = codecs.lookup(encoding)
    if codec.name in ("utf-8", "utf-8-sig"):
        return _utf8_lines(file, stream)
    if "\n".encode(codec.name) != b"\n":
        return _wide_lines(file, stream, codec.name)
    return _narrow_lines(file, stream, codec)


_CUT = (OSError, EOFError, zlib.error)


def _cut(file: str, line: int, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(f"{file}, line {line}: can't be read on: {reason}")


def _utf8_lines(file: str, stream: BinaryIO) -> Iterator[str]:
    number, line = 0, b""
    try:
        for number, line in enumerate(iter(stream.readline, b""), start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"{file}: is UTF-16, expected UTF-8. {_say('utf-16')}")
            yield line.decode()
    except UnicodeDecodeError as error:
        where = f"{file}, line {number}"
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line.{_try_cp949(line)}") from None
    except _CUT as error:
        raise _cut(file, number + 1, error) from None


def _narrow_lines(file: str, stream: BinaryIO, codec: codecs.CodecInfo) -> Iterator[str]:
    """In these `\\n` is one byte, which is part of no other character; what the decoder keeps goes over lines' ends."""
    number = 0
    try:
        decoder = codecs.getincrementaldecoder(codec.name)()
        for number, line in enumerate(iter(stream.readline, b""), start=1):  # noqa: B007
            if text := decoder.decode(line):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest
    except (UnicodeError, LookupError) as error:
        where = f" at byte {error.start} of the line" if isinstance(error, UnicodeDecodeError) else ""
        hint = "Name the encoding that it is in: cp949, utf-8 or utf-16 for most Korean files."
        raise UserError(f"{file}, line {max(number, 1)}: not {codec.name}{where}. {hint}") from None
    except _CUT as error:
        raise _cut(file, number + 1, error) from None


def _wide_lines(file: str, stream: BinaryIO, encoding: str) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(stream, encoding, newline="\n"), start=1):  # noqa: B007
            yield line
    except UnicodeError as error:
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{file}, line {max(number, 1)}: not {encoding} here or after it: {reason}") from None
    except _CUT as error:
        raise _cut(file, number + 1, error) from None


def _say(encoding: str) -> str:
    return f"Say so: `encoding: {encoding}` in a config, `--encoding {encoding}` in a command"


def _try_cp949(line: bytes) -> str:
    try:
        text = line.decode("cp949")
    except UnicodeDecodeError:
        return " Convert the file to UTF-8, or name its encoding: `encoding:` in a config, `--encoding` in a command"
    say = _say("cp949")
    return f" As CP949 it reads {text.strip()[:30]!r}; if that is right, {say[0].lower()}{say[1:]}"
