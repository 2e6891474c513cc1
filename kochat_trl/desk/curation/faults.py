"""What can be wrong with a record: each fault's name, how it is told, and what `kochat data clean` does about it.

`audit.py` counts these faults, `clean.py` mends them. A fault of a text is present exactly where its `mend` changes
the text, so what is counted is what would be mended.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unicodedata import normalize

from kochat_trl.data.records import ANSWER_FIELDS, COMPLETION_FIELD, RawRecord, Turns


@dataclass(frozen=True)
class Fault:
    """One fault. An `error` is what the recipes refuse; a `warning` trains, but on something nobody meant."""

    name: str
    level: Literal["error", "warning"]
    says: str
    fix: str
    default: bool = True  # whether `clean` applies the fix where no --fix is given
    mend: Callable[[str], str] | None = None  # for a fault of a single text


# --- Texts --------------------------------------------------------------------------------------

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


# --- The table ----------------------------------------------------------------------------------

_ALL = [
    # Faults that the recipes refuse.
    Fault("broken", "error", "not a usable record", "drop the record"),
    Fault("empty", "error", "a text is empty", "drop the record"),
    Fault("equal", "error", "two completions are the same", "keep the better one; drop a record left with one"),
    # Faults of a text, in the order in which they are mended.
    Fault("swallowed", "warning", "a whole record inside a text", "keep what stands before it", mend=_mend_swallowed),
    Fault("escape", "warning", r"a literal \n, \xa0, \' or \"", "put in what it stands for", mend=_mend_escape),
    Fault("control", "warning", "control characters", r"remove them; a line end is \n", mend=_mend_control),
    Fault("zero_width", "warning", "invisible characters", "remove them", mend=partial(_ZERO_WIDTH.sub, "")),
    Fault("no_break_space", "warning", "no-break spaces", "put in a space", mend=partial(_NO_BREAK_SPACE.sub, " ")),
    Fault("not_nfc", "warning", "not in Unicode's NFC form", "compose it", mend=partial(normalize, "NFC")),
    Fault("special_token", "warning", "a special token typed in a text", "remove it", mend=_mend_special_token),
    Fault("stray_quote", "warning", "begins with a quote never closed", "remove it", mend=_mend_stray_quote),
    # Faults that no mending brings back, or that are a matter of judgement.
    Fault("replacement", "warning", "has the replacement character \ufffd", "drop the record"),
    Fault("duplicate", "warning", "repeats an earlier record exactly", "keep the first"),
    Fault("near_duplicate", "warning", "repeats one after NFKC and spaces", "keep the first"),
    Fault("repeated_prompt", "warning", "repeats an earlier prompt", "keep the first record", default=False),
    Fault("contradiction", "warning", "prefers what another one rejects", "drop both records", default=False),
    Fault("tied", "warning", "completions are tied", "drop a ranking that has ties", default=False),
    Fault("three_cycle", "warning", "the two readings differ", "drop the ranking", default=False),
    Fault("no_hangul", "warning", "an answer without Hangul", "drop the record", default=False),
    Fault("unknown_token", "warning", "<unk> under the tokenizer", "drop the record", default=False),
    Fault("round_trip", "warning", "doesn't decode to itself", "drop the record", default=False),
    Fault("overlong", "warning", "over max_length tokens", "drop the record", default=False),
    Fault("overlap", "warning", "prompt is in another file too", "drop the record", default=False),
]
FAULTS: dict[str, Fault] = {fault.name: fault for fault in _ALL}
TEXT_FAULTS = [fault for fault in _ALL if fault.mend is not None]


# --- The texts of a record ----------------------------------------------------------------------


def texts(raw: RawRecord) -> dict[str | int, str]:
    """The texts of a record that are strings: by field name, and by turn of a dialogue. Other fields are left out."""
    fields: Any = raw.fields
    if isinstance(fields, Turns):
        return {i: content for i, (_, content) in enumerate(fields)}
    if not isinstance(fields, dict):
        return {}
    found: dict[str | int, Any] = {name: value for name, value in fields.items() if is_text_field(name)}
    if isinstance(fields.get("messages"), list):
        found |= {i: m.get("content") for i, m in enumerate(fields["messages"]) if isinstance(m, dict)}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def is_text_field(name: str) -> bool:
    return name in _TEXT_FIELDS or COMPLETION_FIELD.fullmatch(name) is not None


def is_answer(field: str | int) -> bool:
    """Whether a key of `texts` is something that the model is to say, or to judge."""
    return field % 2 == 1 if isinstance(field, int) else field not in _PROMPT_FIELDS


def with_texts(raw: RawRecord, new: dict[str | int, str]) -> Any:
    """The fields of `raw` with the texts in `new` put in place; `raw` stays as it is."""
    fields: Any = raw.fields
    if isinstance(fields, Turns):
        return Turns((speaker, new.get(i, content)) for i, (speaker, content) in enumerate(fields))
    fields = fields | {name: text for name, text in new.items() if isinstance(name, str)}
    if isinstance(fields.get("messages"), list):
        messages = [m | {"content": new[i]} if i in new else m for i, m in enumerate(fields["messages"])]
        return fields | {"messages": messages}
    return fields


_PROMPT_FIELDS = {prompt for prompt, _ in ANSWER_FIELDS} | {"input"}
_TEXT_FIELDS = {name for names in ANSWER_FIELDS for name in names} | {"input", "chosen", "rejected"}
