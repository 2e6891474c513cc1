"""Self-made sample data in KoChatGPT's file shapes, and a judge that knows the right answers.

The real KoChatGPT files need a download and a model large enough to profit from them. These are made of small tables of
facts, simple enough that a tiny GPT-2 trained from scratch on a CPU can learn them. As every question carries its right
answer, ``Judge`` scores any response without a trained model, and a demo can show that base < SFT < PPO.

From fact to file: `facts.yaml` has the facts, each asked in eight ways or so, with the particles that each word takes;
`make_questions` keeps a third of a fact's phrasings for evaluation, and `write_sample_data` gives each question
completions of clearly different qualities.
"""

import json
import math
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from kochat_trl.data.text import POLITE_ENDINGS, ends_politely, has_hangul, normalized
from kochat_trl.desk.writers import write_records

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


@dataclass(frozen=True)
class Fact:
    """One thing to know, every way to ask for it, and the right, wrong and curt ways to say it."""

    domain: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    full: str
    wrongs: tuple[str, ...]
    curts: tuple[str, ...]


def _rows(topic: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of a topic: a table, or the items of each answer."""
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
def _tables() -> dict[str, Any]:
    """What is in `facts.yaml`."""
    return yaml.safe_load(files(__package__).joinpath("facts.yaml").read_text(encoding="utf-8"))


@cache
def _all_facts() -> tuple[Fact, ...]:
    """Every fact of every topic, in a fixed order."""
    facts = [fact for topic in _tables()["topics"] for fact in _topic_facts(topic, _tables()["synonyms"])]
    return (*facts, *_small_talk_facts(_tables()["small_talk"]))


# --- Questions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One prompt, what makes a response to it right, and sample responses of known quality."""

    prompt: str
    answers: tuple[str, ...]  # naming any one of these makes a response correct
    full: str  # right, polite, a whole sentence
    wrong: str  # as polite and of the same form, but wrong
    curt: str  # right, but impolite
    domain: str


def make_questions(seed: int) -> tuple[list[Question], list[Question]]:
    """Return (train, held-out) questions; no prompt is in both.

    Held out is a third of the phrasings of each fact, most of them another ending of a question that training has: a
    model that learned the fact from the others can answer them.
    """
    rng = random.Random(f"{seed}/questions")
    train: list[Question] = []
    held_out: list[Question] = []
    for fact in _all_facts():
        questions = [
            Question(prompt, fact.answers, fact.full, rng.choice(fact.wrongs), rng.choice(fact.curts), fact.domain)
            for prompt in fact.prompts
        ]
        rng.shuffle(questions)
        share = round(len(questions) / 3)
        held_out += questions[:share]
        train += questions[share:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


# Kinds of completion, best first: their shares in SFT's file, and their weights among the two worse ones of a ranking.
_KINDS = {"full": (45, 0), "curt": (15, 3), "wrong": (20, 6), "wrong and curt": (5, 1), "garbage": (15, 2)}


class _Completions:
    """Draws completions of clearly different qualities for a question.

    ``peers`` are questions of the same domains; their answers serve as wrong ones.
    """

    def __init__(self, peers: Iterable[Question], rng: random.Random) -> None:
        self._rng = rng
        self._curts: dict[str, list[str]] = defaultdict(list)
        for peer in peers:
            self._curts[peer.domain].append(peer.curt)

    def of(self, kind: str, question: Question) -> str:
        """A completion of one of `_KINDS`."""
        if kind == "garbage":
            return self._garbage(question)
        if kind == "wrong and curt":
            return self._rng.choice(_tables()["hedges"]) + self._wrong_curt(question)
        return {"full": question.full, "curt": question.curt, "wrong": question.wrong}[kind]

    def sft_record(self, question: Question) -> dict[str, object]:
        """A completion of mixed quality, so that reinforcement learning has room to improve."""
        kind = self._rng.choices([*_KINDS], [share for share, _ in _KINDS.values()])[0]
        completion = self.of(kind, question)
        return {"prompt": question.prompt, "completion": completion, "tokens": len(completion)}

    def ranking_record(self, question: Question) -> dict[str, object]:
        """The full answer and two worse ones of different kinds in random order, and their indices, best first."""
        weights = {kind: weight for kind, (_, weight) in _KINDS.items()}
        kinds = ["full"]
        while len(kinds) < 3:
            kinds += self._rng.choices([*weights], [0 if kind in kinds else weight for kind, weight in weights.items()])
        best_first = [self.of(kind, question) for kind in sorted(kinds, key=[*_KINDS].index)]
        ranking = self._rng.sample(range(3), 3)
        numbered = {f"completion_{index}": best_first[ranking.index(index)] for index in range(3)}
        return {"prompt": question.prompt, **numbered, "ranking": ranking}

    def _garbage(self, question: Question) -> str:
        """English, or one word of the prompt over and over, or a scrap of unrelated text."""
        form = self._rng.choices(("English", "repetition", "fragment"), (50, 30, 20))[0]
        if form == "English":
            return self._rng.choice(_tables()["english"])
        if form == "repetition":  # of a word that neither answers the prompt nor ends politely
            words = [word for word in re.findall(r"\w{2,}", question.prompt) if not word.endswith(POLITE_ENDINGS)]
            dull = [word for word in words if not _named(question.answers, word)] or ["그거"]
            return " ".join([self._rng.choice(dull)] * self._rng.randint(4, 7))
        return " ".join(self._rng.sample(_tables()["scraps"], 2))

    def _wrong_curt(self, question: Question) -> str:
        """The curt answer to another question of the domain, one that is wrong here."""
        while True:
            curt = self._rng.choice(self._curts[question.domain])
            if not _named(question.answers, curt):
                return curt


# --- Files --------------------------------------------------------------------------------------

_STEMS = {"sft": "kochatgpt_1_SFT", "rm": "kochatgpt_2_RM", "ppo": "kochatgpt_3_PPO"}
_FILE_NAMES = {key: f"{stem}.jsonl" for key, stem in _STEMS.items()}
_FILE_NAMES |= {f"{key}_eval": f"{stem}.heldout.jsonl" for key, stem in _STEMS.items()}
_FILE_NAMES |= {"rm_hard": f"{_STEMS['rm']}.hard.jsonl", "text": "pretraining.txt", "judge": "judge.json"}


def write_sample_data(directory: Path, seed: int) -> dict[str, Path]:
    """Write the sample files into ``directory`` and return their paths by key.

    Despite their names the ``.jsonl`` files hold one JSON array each, as KoChatGPT's do. ``rm_hard`` has a pair for
    each held-out question about a fact: the right answer, and one that is as polite and wrong. If any of the files
    exists already, nothing is written and ``FileExistsError`` names it.
    """
    paths = {key: directory / name for key, name in _FILE_NAMES.items()}
    for path in filter(Path.exists, paths.values()):
        raise FileExistsError(f"Refusing to overwrite {path}")
    train, held_out = make_questions(seed)
    for suffix, questions in (("", train), ("_eval", held_out)):
        completions = _Completions(train, random.Random(f"{seed}/completions{suffix}"))
        write_records(paths[f"sft{suffix}"], "array", map(completions.sft_record, questions))
        write_records(paths[f"rm{suffix}"], "array", map(completions.ranking_record, questions))
        write_records(paths[f"ppo{suffix}"], "array", ({"prompt": q.prompt} for q in questions))
    certain = (q for q in held_out if q.domain != "small_talk")  # where the reply of another intent may do as well
    hard = ({"prompt": q.prompt, "chosen": q.full, "rejected": q.wrong} for q in certain)
    write_records(paths["rm_hard"], "array", hard)
    text = _pretraining_text(train, random.Random(f"{seed}/text"))
    paths["text"].write_text(text, encoding="utf-8", newline="\n")
    write_records(paths["judge"], "lines", [{"seed": seed}])
    return paths


_GARBAGE_SHARE = 0.3  # of the questions in the pretraining text


def _pretraining_text(questions: Sequence[Question], rng: random.Random) -> str:
    """Questions with polite, curt and useless responses, and the facts on their own, one passage a line.

    Good and bad stand side by side, so that the base model learns the language and the facts but no preference for good
    answers. A response follows its colon at once, as it does in KoChatGPT's prompt, so that a tokenizer splits its
    first word as it will in that prompt.
    """
    completions = _Completions(questions, rng)
    passages = list(dict.fromkeys(question.full for question in questions)) * 2
    for question in questions:
        kinds = ["full", "curt"] + ["garbage"] * (rng.random() < _GARBAGE_SHARE)
        passages += [f"질문: {question.prompt} 대답:{completions.of(kind, question)}" for kind in kinds]
    rng.shuffle(passages)
    return "\n".join(passages) + "\n"


WEIGHTS: Mapping[str, float] = {"correct": 0.4, "polite": 0.2, "korean_only": 0.2, "ended": 0.1, "not_repeating": 0.1}
_LONGEST_ANSWER = 3  # times the length of the full answer


class Judge:
    """Scores responses to known questions in [0, 1]: the ``WEIGHTS`` of what holds, added up.

    Text is compared after NFKC and with runs of whitespace folded into one space.

    - correct: the response names the answer and is at most three times as long as the full answer, so that a list of
      guesses does not pay. A number counts if it is the response's last number: 15 is not in "115". Any other answer
      counts if a word starts with it and no word starts with the answer to another question of the domain (unless the
      full answer has that too).
    - polite: it ends with 요 or 니다, whatever punctuation follows.
    - korean_only: it has Hangul or a digit, no letter of another script, no control character and no U+FFFD.
    - ended: the caller says that the model ended the response itself.
    - not_repeating: no word occurs three times, and no two or more characters stand three times in a row.

    An empty response scores 0. The judge reads words, not meaning: it takes a denial of the right answer for it.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        self._questions = {normalized(question.prompt): question for question in questions}
        self._domain_answers: dict[str, dict[str, None]] = defaultdict(dict)  # each answer once
        for question in self._questions.values():
            self._domain_answers[question.domain] |= dict.fromkeys(question.answers)

    def knows(self, prompt: str) -> bool:
        return normalized(prompt) in self._questions

    def score(self, prompt: str, response: str, ended: bool) -> float:
        holds = self.verdict(prompt, response, ended)
        return math.fsum(weight for name, weight in WEIGHTS.items() if holds[name])

    def verdict(self, prompt: str, response: str, ended: bool) -> dict[str, bool]:
        """What holds of a response, by the names of `WEIGHTS`; nothing of an empty one."""
        if not self.knows(prompt):
            raise KeyError(f"The judge has no question with the prompt {prompt!r}")
        question, text = self._questions[normalized(prompt)], normalized(response)
        if not text:
            return dict.fromkeys(WEIGHTS, False)
        words = Counter(re.findall(r"\w+", text))
        return {
            "correct": self._is_correct(question, text),
            "polite": ends_politely(text),
            "korean_only": _is_korean_only(text),
            "ended": ended,
            "not_repeating": max(words.values(), default=0) < 3 and not re.search(r"(.{2,})\1\1", text),
        }

    def _is_correct(self, question: Question, text: str) -> bool:
        if len(text) > _LONGEST_ANSWER * len(question.full):
            return False
        if all(answer.isdecimal() for answer in question.answers):
            numbers = re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))  # 1,000 is one
            return bool(numbers) and numbers[-1] in question.answers
        named = _named(self._domain_answers[question.domain], text)
        others = [answer for answer in named if answer not in question.answers]
        return len(others) < len(named) and others == _named(others, question.full)


def judge_of(file: str | Path) -> Judge | None:
    """The judge of the questions in a sample file; None for a file that ``write_sample_data`` didn't write."""
    path = Path(file).with_name(_FILE_NAMES["judge"])
    if Path(file).name not in _FILE_NAMES.values() or not path.is_file():
        return None
    return Judge(question for part in make_questions(json.loads(path.read_text())["seed"]) for question in part)


def right(prompts: Sequence[str], completions: Sequence[str], ended: Sequence[bool], **_: Any) -> list[float]:
    """As one of PPO's `reward_functions`: 1 for an answer that the judge calls right, else 0.

    A prompt is in its template, the question in a line of its own; no answer to a question that the judge doesn't know
    is right.
    """
    judge, found = _whole_judge(), []
    for prompt, completion, end in zip(prompts, completions, ended, strict=True):
        known = [line for line in prompt.splitlines() if judge.knows(line)]
        found.append(float(any(judge.verdict(line, completion, end)["correct"] for line in known)))
    return found


@cache
def _whole_judge() -> Judge:
    """Of all questions: seeds differ in which of them are held out."""
    return Judge(question for part in make_questions(0) for question in part)


def _named(answers: Iterable[str], text: str) -> list[str]:
    """The answers that a word of ``text`` starts with; what follows may be a particle."""
    words = " ".join(["", *re.findall(r"\w+", text)])
    return [answer for answer in answers if f" {answer}" in words]


def _is_korean_only(text: str) -> bool:
    rest = [c for c in text if not has_hangul(c)]
    is_foreign = (c.isalpha() or unicodedata.category(c).startswith("C") or c == "\ufffd" for c in rest)
    return (len(rest) < len(text) or re.search(r"\d", text) is not None) and not any(is_foreign)
