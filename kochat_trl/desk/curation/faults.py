"""What can be wrong with a record: each fault's name, how it is told, and what `kochat data clean` does about it.

`audit.py` counts these faults, `clean.py` mends them. A fault of a text is present exactly where its `mend` changes
the text, so what is counted is what would be mended.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Literal
from unicodedata import normalize

import yaml

_SWALLOWED = re.compile(r"""["'],\s*["'](?:prompt|completion|tokens?)["']\s*:""")
_OWN_JSON = re.compile(r"""\{\s*["']""")
_LINE_END = re.compile("\r\n?|[\n\v\f\u2028\u2029\x85]")
_ESCAPES = {"n": "\n", "xa0": " ", "u200b": "", "ufeff": "", "'": "'", '"': '"'}
_ESCAPE = re.compile(rf"(?:\\+r(?=\\+n))?\\+({'|'.join(_ESCAPES)})")
_MEANT = re.compile(r"""\\n[a-z]|(["'`])\\n\1|\\n["'`](?!\w)|\b[C-F]:\\""")  # \nabla, '\n', print("가\n"), C:\
_EMPTY_LINE = re.compile(r"\\n\\+n")
_CONTROL = re.compile(f"{_LINE_END.pattern}|[\x00-\x08\x0e-\x1f\x7f-\x9f]")
# Joiners are meant between two emoji (arrows are among them), and in scripts from Arabic to Burmese.
_JOINED = "\U0001f000-\U0001faff\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u0600-\u109f"
_ZERO_WIDTH = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\u3164\ufeff\uffa0]"
    f"|(?<![{_JOINED}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINED}])"
)
_NO_BREAK_SPACE = re.compile("[\u00a0\u2007\u202f]")
_SPECIAL_TOKEN = re.compile(r"</?s>|<(?:pad|unk|usr|sys|mask)>|<\|[a-z0-9_]+\|>")


def _mend_swallowed(text: str) -> str:
    """Keep what stands before the next field, without the quote mark that opens it. Whole JSON in a text is meant."""
    match = _SWALLOWED.search(text)
    if not match or _OWN_JSON.search(text, 0, match.start()):
        return text
    return text[: match.start()].removeprefix(text[match.start()]).strip()


def _mend_escape(text: str) -> str:
    """Put in what escapes stand for. They are meant as they are in a text with a line end of its own, as code has."""
    if "\\" not in text or _LINE_END.search(text) or (_MEANT.search(text) and not _EMPTY_LINE.search(text)):
        return text
    return _ESCAPE.sub(lambda match: _ESCAPES[match[1]], text)


def _mend_control(text: str) -> str:
    return _CONTROL.sub(lambda match: "\n" if _LINE_END.match(match[0]) else "", text)


def _mend_special_token(text: str) -> str:
    while (mended := _SPECIAL_TOKEN.sub("", text)) != text:  # what is left may make a new one
        text = mended.strip()
    return text


def _mend_stray_quote(text: str) -> str:
    """Drop a quote mark at the start that nothing closes.

    An apostrophe in an English word closes nothing, nor does a mark that opens a quotation; '88 is a year.
    """
    while True:
        body = text.lstrip()
        mark = body[:1]
        if mark not in ("'", '"') or re.match(r"'\d\d(?!\d)", body):
            return text
        marks = [match.start() for match in re.finditer(rf"(?<![A-Za-z]){mark}|{mark}(?![A-Za-z])", body)]
        closed = len(marks) > 1 and not (body[marks[1] - 1].isspace() or body[marks[1] - 1] in "([<")
        if closed or len(marks) % 2 == 0:
            return text
        text = body[1:].lstrip()


Level = Literal["error", "warning"]
_MENDS: dict[str, Callable[[str], str]] = {
    "swallowed": _mend_swallowed,
    "escape": _mend_escape,
    "control": _mend_control,
    "zero_width": partial(_ZERO_WIDTH.sub, ""),
    "no_break_space": partial(_NO_BREAK_SPACE.sub, " "),
    "not_nfc": partial(normalize, "NFC"),
    "special_token": _mend_special_token,
    "stray_quote": _mend_stray_quote,
}


@dataclass(frozen=True)
class Fault:
    """One fault. An `error` is what the recipes refuse; a `warning` trains, but on something nobody meant."""

    name: str
    mend: Callable[[str], str] | None  # for a fault of a single text
    says: str
    fix: str
    level: Level = "warning"
    default: bool = True  # whether `clean` applies the fix where no --fix is given


_TABLE = yaml.safe_load(files(__package__).joinpath("faults.yaml").read_text(encoding="utf-8"))
FAULTS = {name: Fault(name, _MENDS.get(name), **row) for name, row in _TABLE.items()}
TEXT_FAULTS = [fault for fault in FAULTS.values() if fault.mend]
