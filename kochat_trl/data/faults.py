"""What can be wrong with a record: each fault's name, how it is told, and what `kochat data clean` does about it.

`audit.py` counts these faults, `clean.py` mends them. A fault of a text is present exactly where its `mend` changes
the text, so what is counted is what would be mended.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .records import ANSWER_FIELDS, COMPLETION_FIELD, RawRecord, Turns


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
_ESCAPE = re.compile(r"""\\r?\\n(?![a-z])|\\n(?![a-z])|\\(["'])""")
_CONTROL = re.compile("\r\n?|[\u2028\u2029\x85]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_EMOJI = "\U0001f000-\U0001faff\u2600-\u27bf\ufe0f"
_ZERO_WIDTH = re.compile(
    "[\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\u3164\ufeff\uffa0]"
    f"|(?<![{_EMOJI}])\u200d|\u200d(?![{_EMOJI}])"  # a joiner between two emoji is meant
)
_NO_BREAK_SPACE = re.compile("[\u00a0\u202f]")
_SPECIAL_TOKEN = re.compile(r"</?s>|<(?:pad|unk|usr|sys|mask)>|<\|[a-z_]+\|>")
_HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]")


def _mend_swallowed(text: str) -> str:
    match = _SWALLOWED.search(text)
    return text[: match.start()].removeprefix(text[match.start()]).strip() if match else text


def _mend_escape(text: str) -> str:
    return _ESCAPE.sub(lambda match: match[1] or "\n", text)


def _mend_control(text: str) -> str:
    return _CONTROL.sub(lambda match: "\n" if match[0] in ("\r\n", "\r", "\u2028", "\u2029", "\x85") else "", text)


def _mend_special_token(text: str) -> str:
    while (mended := _SPECIAL_TOKEN.sub("", text)) != text:  # what is left may make a new one
        text = mended.strip()
    return text


def _mend_stray_quote(text: str) -> str:
    """Drop a quote mark at the start that nothing closes; apostrophes inside English words don't close it."""
    quote = text[:1]
    if quote not in ("'", '"'):
        return text
    marks = len(re.findall(rf"(?<![A-Za-z\\]){quote}|{quote}(?![A-Za-z])", text))
    return text[1:].lstrip() if marks % 2 else text


def has_hangul(text: str) -> bool:
    return _HANGUL.search(text) is not None


def normalized(text: str) -> str:
    """`text` after NFKC, with runs of whitespace as one space: what makes two texts the same to a reader."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


# --- The table ----------------------------------------------------------------------------------

_ALL = [
    # Faults that the recipes refuse.
    Fault("broken", "error", "not a usable record", "drop the record"),
    Fault("empty", "error", "a text is empty", "drop the record"),
    Fault("equal", "error", "two completions are the same", "keep the better one; drop a record left with one"),
    # Faults of a text, in the order in which they are mended.
    Fault(
        "swallowed",
        "warning",
        "a whole record inside a text",
        "keep what stands before it",
        mend=_mend_swallowed,
    ),
    Fault("escape", "warning", r"a literal \n, \' or \"", "put in what it stands for", mend=_mend_escape),
    Fault("control", "warning", "control characters", r"remove them; a line end is \n", mend=_mend_control),
    Fault("zero_width", "warning", "invisible characters", "remove them", mend=lambda text: _ZERO_WIDTH.sub("", text)),
    Fault(
        "no_break_space",
        "warning",
        "no-break spaces",
        "put in a space",
        mend=lambda text: _NO_BREAK_SPACE.sub(" ", text),
    ),
    Fault(
        "not_nfc",
        "warning",
        "not in Unicode's NFC form",
        "compose it",
        mend=lambda text: unicodedata.normalize("NFC", text),
    ),
    Fault("special_token", "warning", "a special token typed in a text", "remove it", mend=_mend_special_token),
    Fault("stray_quote", "warning", "begins with a quote never closed", "remove it", mend=_mend_stray_quote),
    # Faults that no mending brings back, or that are a matter of judgement.
    Fault("replacement", "warning", "has the replacement character \ufffd", "drop the record"),
    Fault("duplicate", "warning", "repeats an earlier record exactly", "keep the first"),
    Fault("near_duplicate", "warning", "repeats one after NFKC and spaces", "keep the first"),
    Fault("repeated_prompt", "warning", "repeats an earlier prompt", "keep the first record", default=False),
    Fault("contradiction", "warning", "prefers what an earlier one rejects", "drop both records", default=False),
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
    """The texts of a record that are strings: by field name, or by turn for a dialogue. Other fields are left out."""
    fields: Any = raw.fields
    if isinstance(fields, Turns):
        return {i: content for i, (_, content) in enumerate(fields)}
    if not isinstance(fields, dict):
        return {}
    if isinstance(fields.get("messages"), list):
        contents = [m.get("content") if isinstance(m, dict) else None for m in fields["messages"]]
        return {i: content for i, content in enumerate(contents) if isinstance(content, str)}
    return {name: value for name, value in fields.items() if is_text_field(name) and isinstance(value, str)}


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
    if isinstance(fields.get("messages"), list):
        messages = [m | {"content": new[i]} if i in new else m for i, m in enumerate(fields["messages"])]
        return fields | {"messages": messages}
    return fields | new


_PROMPT_FIELDS = {prompt for prompt, _ in ANSWER_FIELDS} | {"input"}
_TEXT_FIELDS = {name for names in ANSWER_FIELDS for name in names} | {"input", "chosen", "rejected"}
