"""Judging in a terminal: an item on the screen, a line typed, the next item."""

import os
import re
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from kochat_trl.data.rankings import Tiers
from kochat_trl.data.text import visible
from kochat_trl.desk.labels.agreement import Agreement
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.labelling import Labelling, Turn

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
MODEL_PICKED = {"": "", "uncertain": ", where it was least sure", "talk": ", in talk"}
# The same keys where the keyboard is set to Hangul.
_HANGUL_KEYS = dict(zip("ㅌㄴㅕㅜㅂ", "xsunq", strict=True))
_COMMANDS = {"x": "all_bad", "s": "skip", "u": "undo", "q": "quit"}


def language(environment: Mapping[str, str] = os.environ) -> Lang:
    """Korean if the locale is."""
    names = (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "ko" if next(filter(None, names), "").startswith("ko") else "en"


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
    labelling: Labelling, annotator: str, lang: Lang, console: Console, ask: Callable[[str], str] = input
) -> None:
    """Show `annotator` one item after the other, and keep what is typed, until nothing is left or `q`, Ctrl-D or
    Ctrl-C. What `ask` returns is a line that was typed."""
    says = TEXTS[lang]
    console.print(Text(says["keys"]))
    try:
        while True:
            turn = labelling.turn(annotator, wait=True)
            if turn.item:
                _print_item(turn.item, turn.shown, _progress(turn, says), says, console)
            else:
                console.print(Text(turn.trouble) if turn.trouble else says["finished"])
            started = time.monotonic()
            said, note = _read_line(ask, turn.shown, says, console)
            if said == "undo":
                console.print(says["undone" if labelling.undo(annotator) else "nothing"])
            elif said == "quit" or turn.item is None:
                return
            else:
                labelling.judge(annotator, turn.item.id, said, round(time.monotonic() - started, 1), note)
    except (EOFError, KeyboardInterrupt):
        console.print()
    finally:
        done = len(labelling.journal.state.by(annotator))
        console.print(Text(says["saved"].format(annotator=annotator, done=done, path=labelling.journal.path)))


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


def _progress(turn: Turn, says: Mapping[str, str]) -> str:
    text = says["progress"].format(done=turn.done, left=turn.left)
    return text if turn.minutes is None else text + says["time"].format(minutes=turn.minutes)


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
    rows |= {f"{name}, the reward model{MODEL_PICKED[how]}": figures for (name, how), figures in found.model.items()}
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
