"""What is told of a text by its characters alone."""

import re
import unicodedata
from statistics import fmean
from typing import Any

_HANGUL = re.compile("[\uac00-\ud7ff\u1100-\u115e\u1161-\u11ff\u3131-\u3163\u3165-\u318e\ua960-\ua97f]")  # no fillers

POLITE_ENDINGS = ("요", "니다")


def has_hangul(text: str) -> bool:
    return _HANGUL.search(text) is not None


def normalized(text: str) -> str:
    """`text` after NFKC, with runs of whitespace as one space: what makes two texts the same to a reader."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def visible(text: str) -> str:
    """`text` with all that can't be seen, steers a terminal or turns the direction of writing as its escape: `\\x1b`,
    `\\u202e`. Line ends and tabs stay."""

    def hidden(character: str) -> bool:
        category = unicodedata.category(character)
        return (category[0] == "C" and character not in "\n\t") or category in ("Zl", "Zp")

    return "".join(repr(character)[1:-1] if hidden(character) else character for character in text)


def all_visible(value: Any) -> Any:
    """`value` with every text in its lists, values and keys, however deep, as `visible` has it."""
    if isinstance(value, dict):
        return {visible(key): all_visible(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [all_visible(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value


def ends_politely(text: str) -> bool:
    """Whether `text` ends in 요 or 니다, whatever punctuation follows."""
    return re.sub(r"\W+$", "", text).endswith(POLITE_ENDINGS)


def hangul_share(text: str) -> float:
    """The share of Hangul in a text's letters; 0 if it has none."""
    letters = [character for character in text if character.isalpha()]
    return fmean(map(has_hangul, letters)) if letters else 0.0
