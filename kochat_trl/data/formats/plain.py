"""KoChatGPT's dialogues, and plain text: a prompt a line."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from kochat_trl.data.formats.beginning import Beginning, FileFormat, Located
from kochat_trl.errors import UserError

DIALOGUE_START = "<<start conversation>>"
SPEAKERS = ("<사람>", "<챗봇>")


def tell_said(beginning: Beginning) -> tuple[FileFormat, Iterator[Located]] | None:
    """What is to be read as prompts, whatever it looks like."""
    return tell_text(beginning) if beginning.options.plain_text else None


def tell_text(beginning: Beginning) -> tuple[FileFormat, Iterator[Located]]:
    """Any lines."""
    return beginning.told("text"), _read_text(beginning.lines())


def tell_dialogues(beginning: Beginning) -> tuple[FileFormat, Iterator[Located]] | None:
    if not beginning.start.startswith(DIALOGUE_START):
        return None
    return beginning.told("dialogues"), _read_dialogues(beginning.file, beginning.lines())


def _read_text(lines: Iterator[str]) -> Iterator[Located]:
    for number, line in enumerate(lines, start=1):
        yield number, {"prompt": line.rstrip("\r\n")}


def _read_dialogues(file: str, lines: Iterator[str]) -> Iterator[Located]:
    """Records of `messages`; a line without a speaker continues the turn before it."""
    start = 0
    turns: list[tuple[str, list[str]]] = []
    for number, line in enumerate(chain(lines, [DIALOGUE_START]), start=1):  # the end is told as a beginning is
        content = line.strip()
        speaker = next((speaker for speaker in SPEAKERS if content.startswith(f"{speaker}:")), None)
        if content.startswith(DIALOGUE_START):
            if content != DIALOGUE_START:
                raise UserError(f"{file}, line {number}: found {content[:40]!r}, expected '{DIALOGUE_START}' alone")
            if start:
                yield start, {"messages": [_message(speaker, its_lines) for speaker, its_lines in turns]}
            start, turns = number, []
        elif speaker:
            turns.append((speaker, [line.partition(":")[2].rstrip("\r\n")]))
        elif turns:
            turns[-1][1].append(line.rstrip("\r\n"))
        elif content:
            raise UserError(f"{file}, line {number}: found {content[:40]!r}, expected '<사람>:' or '<챗봇>:'")


def _message(speaker: str, lines: list[str]) -> dict[str, Any]:
    return {"role": speaker, "content": "\n".join(lines).strip()}
