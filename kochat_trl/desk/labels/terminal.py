"""Judging in a terminal: an item on the screen, a line typed, the next item."""

import os
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Literal

from kochat_trl.data.rankings import Tiers
from kochat_trl.desk.labels.agreement import Agreement
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, Judgement, Picked, now
from kochat_trl.desk.labels.queue import Queue

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

Lang = Literal["ko", "en"]
TEXTS: dict[Lang, dict[str, str]] = {
    "ko": {
        "keys": "순위를 좋은 것부터 적습니다: 213 또는 2>1=3 (=는 동점). x 모두 나쁨, s 건너뛰기, u 되돌리기, "
        "n 메모, q 끝내기",
        "user": "사용자",
        "assistant": "챗봇",
        "system": "시스템",
        "progress": "{done}개 끝, {left}개 남음",
        "time": ", 약 {minutes}분",
        "unclear": "답 {count}개의 번호를 한 번씩 모두 적어 주세요, 예: {example}. 나머지: x, s, u, n 메모, q",
        "noted": "메모해 두었습니다. 이제 순위를 적어 주세요.",
        "undone": "마지막 판단을 되돌렸습니다.",
        "nothing": "되돌릴 것이 없습니다.",
        "finished": "더 판단할 것이 없습니다. u 마지막 판단 되돌리기, Enter 끝내기",
        "saved": "{path}에 저장했습니다: {annotator} {done}개.",
    },
    "en": {
        "keys": "Type the order, best first: 213, or 2>1=3 with = for a tie. x all bad, s skip, u undo, n TEXT a note, "
        "q stop",
        "user": "user",
        "assistant": "assistant",
        "system": "system",
        "progress": "{done} done, {left} left",
        "time": ", about {minutes} min",
        "unclear": "Type the number of each of the {count} answers once, such as {example}. Or: x, s, u, n TEXT, q",
        "noted": "Noted. Now the order.",
        "undone": "Your last judgement is taken back.",
        "nothing": "There is nothing to take back.",
        "finished": "There is nothing left to judge. u takes the last one back, Enter ends.",
        "saved": "Saved in {path}: {done} by {annotator}.",
    },
}
# The same keys where the keyboard is set to Hangul.
_HANGUL_KEYS = dict(zip("ㅌㄴㅕㅜㅂ", "xsunq", strict=True))
_COMMANDS = {"x": "all_bad", "s": "skip", "u": "undo", "q": "quit"}


def language(environment: Mapping[str, str] = os.environ) -> Lang:
    """Korean if the locale is."""
    names = (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "ko" if next(filter(None, names), "").startswith("ko") else "en"


def visible(text: str) -> str:
    """`text` with everything that can't be seen, or that steers a terminal, as its escape: `\\x1b`, `\\u202e`."""

    def hidden(character: str) -> bool:
        category = unicodedata.category(character)
        return (category[0] == "C" and character not in "\n\t") or category in ("Zl", "Zp")

    return "".join(repr(character)[1:-1] if hidden(character) else character for character in text)


def tiers_of(typed: str, shown: Sequence[int]) -> Tiers:
    """The tiers that `2>1=3` or `213` says of the answers as they are numbered on the screen, from 1.

    Of ten answers or more, numbers are set apart: `10>2 1`. Raises `ValueError` unless it names each answer once.
    """
    numbers = r"\d" if len(shown) < 10 else r"\d+"
    text = unicodedata.normalize("NFKC", typed).strip()
    parts = re.findall(rf"([>=,\s]*)({numbers})", text)
    tiers: list[list[int]] = []
    for i, (sign, number) in enumerate(parts):
        if sign.strip() not in ("", ">", ",", "=") or bool(i) < bool(sign):
            raise ValueError(typed)
        if sign.strip() != "=":
            tiers.append([])
        tiers[-1].append(int(number) - 1)
    named = [place for tier in tiers for place in tier]
    if "".join(map("".join, parts)) != text or sorted(named) != list(range(len(shown))):
        raise ValueError(typed)
    return tuple(tuple(sorted(shown[place] for place in tier)) for tier in tiers)


def label(
    journal: Journal,
    queue: Queue,
    annotator: str,
    seed: int,
    lang: Lang,
    console: Console,
    ask: Callable[[str], str] = input,
) -> None:
    """Show `annotator` one item after the other, and keep what is typed, until nothing is left or `q`, Ctrl-D or
    Ctrl-C. What `ask` returns is a line that was typed."""
    says = TEXTS[lang]
    console.print(Text(says["keys"]))
    again: tuple[Item, Picked] | None = None  # what was taken back
    try:
        while True:
            left = [*([again] if again else []), *queue.left(journal.state, annotator)]
            shown: tuple[int, ...] = ()
            if left:
                item, picked = left[0]
                shown = item.shown_to(annotator, seed)
                progress = _progress(journal, annotator, len({it.id for it, _ in left}), says)
                _print_item(item, shown, progress, says, console)
            else:
                console.print(says["finished"])
            started = time.monotonic()
            said, note = _read_line(ask, shown, says, console)
            if said == "undo":
                undone = journal.undo(annotator)
                again = (undone.item, undone.picked) if undone else again
                console.print(says["undone" if undone else "nothing"])
            elif said == "quit":
                return
            else:
                seconds = round(time.monotonic() - started, 1)
                journal.add(Judgement(item, said, annotator, now(), seconds, shown, picked, note))
                again = None
    except (EOFError, KeyboardInterrupt):
        console.print()
    finally:
        done = len(journal.state.by(annotator))
        console.print(Text(says["saved"].format(annotator=annotator, done=done, path=journal.path)))


def _read_line(
    ask: Callable[[str], str], shown: Sequence[int], says: Mapping[str, str], console: Console
) -> tuple[Any, str]:
    """A verdict, "undo" or "quit", and the note that was made before it. Where nothing is shown, all but an undo ends
    it."""
    note = ""
    while True:
        try:
            typed = ask("> ").strip()
        except UnicodeDecodeError:  # a key of another encoding
            typed = "?"
        word, _, rest = typed.partition(" ")
        key = _HANGUL_KEYS.get(word, word.lower())
        if not shown and key != "u":
            return "quit", ""
        if key == "n" and rest.strip():
            note = rest.strip()
            console.print(says["noted"])
        elif key in _COMMANDS and not rest:
            return _COMMANDS[key], note
        else:
            try:
                return tiers_of(typed, shown), note
            except ValueError:
                example = ">".join(str(place) for place in range(len(shown), 0, -1))
                console.print(says["unclear"].format(count=len(shown), example=example))


def _progress(journal: Journal, annotator: str, left: int, says: Mapping[str, str]) -> str:
    """How many are done and left, and how long these take at the usual pace: the median of those done."""
    done = journal.state.by(annotator).values()
    text = says["progress"].format(done=len(done), left=left)
    if done:
        text += says["time"].format(minutes=max(1, round(left * median(it.seconds for it in done) / 60)))
    return text


def _print_item(item: Item, shown: Sequence[int], progress: str, says: Mapping[str, str], console: Console) -> None:
    console.print(Rule(Text(progress), align="left", style="dim"))
    for message in item.prompt.messages:
        console.print(Text(says[message["role"]], "dim"))
        console.print(Padding(Text(visible(message["content"])), (0, 0, 1, 2)))
    for number, index in enumerate(shown, start=1):
        console.print(Text(f"[{number}]", "bold"))
        console.print(Padding(Text(visible(item.answers[index])), (0, 0, 1, 2)))


def print_agreement(found: Agreement, console: Console, disputes: int = 20) -> None:
    """The figures, and the first of the pairs on which people disagree."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("who")
    for name in ("pairs", "tied", "agree", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = {f"{one}, {other}": figures for (one, other), figures in found.people.items()}
    rows |= {"all people": found.all} if len(rows) > 1 else {}
    rows |= {f"{name}, the reward model": figures for name, figures in found.model.items()}
    for who, figures in rows.items():
        cells = ("–", "–")
        if figures["pairs"]:
            low, high = figures["interval"]
            cells = f"{figures['accuracy']:.1%}", f"{low:.1%} – {high:.1%}"
        table.add_row(Text(who), f"{figures['pairs']:,}", f"{figures['tied']:,}", *cells)
    console.print(f"{found.items:,} items ranked by two people or more", highlight=False)
    if rows:
        console.print(table)
    if found.alpha is not None:
        interval = "" if found.alpha_interval is None else " (95 %: {:.3f} to {:.3f})".format(*found.alpha_interval)
        console.print(f"Krippendorff's alpha of their ranks: {found.alpha:.3f}{interval}", highlight=False)
    for dispute in found.disputes[:disputes]:
        console.print(Rule(style="dim"))
        console.print(Text(visible(dispute.item.prompt.prompt)))
        for name, answer in dispute.prefers.items():
            console.print(Padding(Text.assemble((f"{name}: ", "bold"), visible(answer)), (0, 0, 0, 2)))
    if len(found.disputes) > disputes:
        console.print(f"… and {len(found.disputes) - disputes:,} more pairs on which two people disagree")
