"""What the sample data knows: the tables of `facts.yaml`, whose head says how they are written, as `Fact`s.

Each fact is asked in several ways, with the particles that each word takes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import Any

import yaml

# --- Korean particles ---------------------------------------------------------------------------

# The form after a final consonant -> the form after a vowel.
_PARTICLES = {"은": "는", "이": "가", "을": "를", "과": "와", "으로": "로", "이에요": "예요", "이야": "야"}
# 0 stands for every number that ends in it: 영, 십, 백, 천 and 만 all have a final consonant.
_DIGIT_READINGS = "영일이삼사오육칠팔구"
_FINAL_RIEUL = 8


def with_particle(word: str, particle: str) -> str:
    """Append ``particle``, named by its form after a consonant, in the form that suits ``word``.

    Digits are read in Sino-Korean: ``with_particle("3", "은")`` is "3은", and "2" gives "2는".
    """
    last = word[-1]
    syllable = _DIGIT_READINGS[int(last)] if last in "0123456789" else last
    if not "가" <= syllable <= "힣":
        raise ValueError(f"Cannot tell which particle follows {word!r}: it ends in {last!r}")
    final = (ord(syllable) - ord("가")) % 28
    takes_vowel_form = final == 0 or (particle == "으로" and final == _FINAL_RIEUL)
    return word + (_PARTICLES[particle] if takes_vowel_form else particle)


class _Word(str):
    """A string whose format spec is a particle: ``f"{_Word('개'):은}"`` is "개는"."""

    def __format__(self, particle: str) -> str:
        return with_particle(self, particle) if particle else str(self)


# --- From tables to facts -----------------------------------------------------------------------

_Row = tuple[str, ...]
_GENERATED: dict[str, list[_Row]] = {  # the rows of topics that have a rule rather than a table
    "sums": [(str(a), str(b), str(a + b)) for a, b in product(range(1, 10), repeat=2)],
    "differences": [(str(a), str(b), str(a - b)) for a in range(2, 11) for b in range(1, a)],
    "products": [(str(a), str(b), str(a * b)) for a, b in product(range(2, 10), repeat=2)],
    "neighbours": [row for n in range(2, 31) for row in ((f"{n} 다음", str(n + 1)), (f"{n} 바로 앞", str(n - 1)))],
}


@dataclass(frozen=True)
class Fact:
    """One thing to know, every way to ask for it, and the right, wrong and curt ways to say it."""

    domain: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    full: str
    wrongs: tuple[str, ...]
    curts: tuple[str, ...]
    held_out_whole: bool = False


def _rows(topic: dict[str, Any]) -> list[_Row]:
    """The rows of a topic: generated, a table, or the items of each answer."""
    if "generated" in topic:
        return _GENERATED[topic["generated"]]
    if isinstance(topic["rows"], dict):
        return [(item, answer) for answer, items in topic["rows"].items() for item in items.split(", ")]
    rows = [tuple(row.strip().split(":")) for row in re.split(r"[,\n]", topic["rows"].strip())]
    return rows + [row[::-1] for row in rows] if topic.get("both_ways") else rows


def _topic_facts(topic: dict[str, Any], synonyms: dict[str, str]) -> Iterator[Fact]:
    """A fact for each row of a topic."""
    pairs = (product(stems.split("/"), endings.split("/")) for stems, endings in topic["ask"].items())
    prompts = [f"{stem} {ending}" for some in pairs for stem, ending in some]
    prompts += topic["also"].split("/") if "also" in topic else []
    curts = topic.get("curts", "{a}/{a}./{a:이야}").split("/")
    rows, full = _rows(topic), topic["full"]
    size = topic.get("pool", len(rows))
    for place, row in enumerate(rows):
        first = place - place % size
        pool = dict.fromkeys(other[-1] for other in rows[first : first + size])
        *cells, answer = map(_Word, row)
        slots = dict(zip("xyz", cells, strict=False))
        yield Fact(
            domain=topic["domain"],
            prompts=tuple(template.format(**slots) for template in prompts),
            answers=(str(answer), *filter(None, synonyms.get(answer, "").split("/"))),
            full=full.format(**slots, a=answer),
            wrongs=tuple(full.format(**slots, a=_Word(other)) for other in pool if other != answer),
            curts=tuple(template.format(**slots, a=answer) for template in curts),
            held_out_whole=topic.get("held_out_whole", False),
        )


def _small_talk_facts(intents: list[dict[str, str]]) -> Iterator[Fact]:
    for intent in intents:
        yield Fact(
            domain="small_talk",
            prompts=tuple(intent["prompts"].split("/")),
            answers=tuple(intent["keywords"].split("/")),
            full=intent["reply"],
            wrongs=tuple(other["reply"] for other in intents if other is not intent),
            curts=(intent["curt"], f"{intent['curt']}."),
        )


@cache
def tables() -> dict[str, Any]:
    """What is in `facts.yaml`."""
    return yaml.safe_load(files(__package__).joinpath("facts.yaml").read_text(encoding="utf-8"))


@cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact of every topic, in a fixed order."""
    facts = [fact for topic in tables()["topics"] for fact in _topic_facts(topic, tables()["synonyms"])]
    return (*facts, *_small_talk_facts(tables()["small_talk"]))
