"""File shapes → raw records with their file, line and index.

The shape is sniffed from the first characters, never guessed from the file's name: KoChatGPT's `.jsonl` files
are JSON arrays, and one of them is not JSON at all.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .records import RawRecord, Source, Turns

DIALOGUE_START = "<<start conversation>>"
SPEAKERS = ("<사람>", "<챗봇>")


def read_records(path: str | Path) -> Iterator[RawRecord]:
    """Yield the records of a JSON array, of JSON lines or of a KoChatGPT dialogue file, in order.

    Raises `UserError`, with the line, if the file is missing, is not UTF-8 or breaks its own format.
    """
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some files begin with a BOM, some don't
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}. Check the path in the config.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}. Convert it to UTF-8 first.") from None
    head = text.lstrip()
    if head.startswith("["):
        yield from _read_array(file, text)
    elif head.startswith("{"):
        yield from _read_lines(file, text)
    elif head.startswith(DIALOGUE_START):
        yield from _read_dialogues(file, text)
    else:
        raise UserError(
            f"{file}, line 1: found {head[:40]!r}, expected a JSON array ('['), JSON lines ('{{') "
            f"or dialogues ('{DIALOGUE_START}')"
        )


def _json_error(file: str, error: json.JSONDecodeError, index: int, line: int) -> UserError:
    return UserError(f"{file}, line {line} (record {index}): broken JSON: {error.msg}")


def _read_array(file: str, text: str) -> Iterator[RawRecord]:
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    index = 0

    def skip_blank(position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return position

    while True:
        position = skip_blank(position)
        line += text.count("\n", counted, position)
        counted = position
        if index == 0 and text.startswith("]", position):
            break
        try:
            fields, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _json_error(file, error, index, error.lineno) from None
        yield RawRecord(Source(file, index, line), fields)
        index += 1
        position = skip_blank(position)
        if text.startswith(",", position):
            position += 1
        elif text.startswith("]", position):
            break
        else:
            found = text[position : position + 20]
            line += text.count("\n", counted, position)
            raise UserError(f"{file}, line {line}: found {found!r}, expected ',' or ']' after record {index - 1}")
    rest = text[skip_blank(position + 1) :]
    if rest:
        raise UserError(f"{file}: found {rest[:40]!r} after the end of the JSON array, expected nothing")


def _read_lines(file: str, text: str) -> Iterator[RawRecord]:
    index = 0
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            fields = json.loads(content)
        except json.JSONDecodeError as error:
            raise _json_error(file, error, index, line) from None
        yield RawRecord(Source(file, index, line), fields)
        index += 1


def _read_dialogues(file: str, text: str) -> Iterator[RawRecord]:
    """Records of `Turns`; a line without a speaker continues the turn before it."""
    index, start, turns = -1, 0, Turns()
    for line, content in enumerate(text.split("\n"), start=1):
        content = content.strip()
        if content == DIALOGUE_START:
            if index >= 0:
                yield RawRecord(Source(file, index, start), turns)
            index, start, turns = index + 1, line, Turns()
            continue
        speaker = next((s for s in SPEAKERS if content.startswith(s + ":")), None)
        if speaker:
            turns.append((speaker, content[len(speaker) + 1 :].strip()))
        elif content and turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{content}")
        elif content:
            raise UserError(f"{file}, line {line}: found {content[:40]!r}, expected '<사람>:' or '<챗봇>:'")
    yield RawRecord(Source(file, index, start), turns)
