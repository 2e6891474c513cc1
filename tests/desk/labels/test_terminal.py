"""Judging in a terminal: what is typed, what is shown, and what becomes of it."""

import io
import itertools
import string

from kochat_trl.data.records import Prompt
from kochat_trl.desk.labels import terminal
from kochat_trl.desk.labels.agreement import agreement
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, Judgement, read_journal
from kochat_trl.desk.labels.labelling import Labelling
from kochat_trl.desk.labels.queue import Queue
from kochat_trl.desk.labels.terminal import TEXTS, label, language, print_agreement, tiers_of

import pytest
from rich.console import Console

ITEMS = [Item(Prompt(f"질문 {i}"), ("가", "나", "다")) for i in range(3)]


@pytest.mark.parametrize(
    ("typed", "tiers"),
    [
        ("213", ((2,), (0,), (1,))),
        ("2>1=3", ((2,), (0, 1))),
        (" 2 > 1 = 3 ", ((2,), (0, 1))),
        ("2 1 3", ((2,), (0,), (1,))),
        ("2,1,3", ((2,), (0,), (1,))),
        ("21=3", ((2,), (0, 1))),
        ("1=2=3", ((0, 1, 2),)),
        ("２＞１＝３", ((2,), (0, 1))),
    ],
)
def test_an_order_is_read_as_the_numbers_on_the_screen(typed, tiers):
    assert tiers_of(typed, shown=(0, 2, 1)) == tiers


@pytest.mark.parametrize(
    "typed", ["", "12", "1123", "1234", "012", ">123", "123>", "1>>2>3", "1<2<3", "1=>23", "a", "1 2 b", "²13x"]
)
def test_what_is_no_order_is_refused(typed):
    with pytest.raises(ValueError, match=typed.replace("²", ".")):
        tiers_of(typed, shown=(0, 2, 1))


def test_numbers_of_two_digits_are_set_apart():
    shown = tuple(range(11))
    assert tiers_of("11 10>9=8 7 6 5 4 3 2 1", shown)[:3] == ((10,), (9,), (7, 8))
    with pytest.raises(ValueError, match="1110"):
        tiers_of("1110987654321", shown)


def test_the_language_is_the_locale_s():
    assert language({"LANG": "ko_KR.UTF-8"}) == language({"LC_ALL": "", "LC_MESSAGES": "ko", "LANG": "C"}) == "ko"
    assert language({}) == language({"LC_ALL": "en_US.UTF-8", "LANG": "ko_KR.UTF-8"}) == "en"


def test_both_languages_say_everything():
    fields = [{name: set(string.Formatter().parse(text)) for name, text in says.items()} for says in TEXTS.values()]
    named = [{name: {part[1] for part in parts if part[1]} for name, parts in its.items()} for its in fields]
    assert named[0] == named[1]


def run(path, typed, items=ITEMS, annotator="지은", lang="en", **queue):
    """What is on the screen after these lines were typed; at their end Ctrl-D."""
    screen = io.StringIO()
    lines = iter(typed)

    def ask(mark):
        screen.write(mark)
        if (line := next(lines, None)) is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    with Journal(path) as journal:
        label(Labelling(journal, Queue(items, **queue)), annotator, lang, Console(file=screen, width=100), ask)
    return screen.getvalue()


def stands(path):
    return [(it.item, it.verdict) for it in read_journal(path).standing]


def test_judgements_are_kept_and_the_next_session_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "j"
    ticks = itertools.count(step=30)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(ticks))
    screen = run(path, ["2>1=3", "q"])
    shown = ITEMS[0].shown_to("지은")
    (kept,) = read_journal(path).standing
    tiers = ((shown[1],), tuple(sorted((shown[0], shown[2]))))
    assert kept == Judgement(ITEMS[0], tiers, "지은", kept.judged_at, 30.0, shown, "order")
    assert "0 done, 3 left ─" in screen
    assert "1 done, 2 left, about 1 min" in screen
    assert screen.split("[1]\n")[1].split()[0] == "가나다"[shown[0]]
    screen = run(path, ["n 둘 다 별로", "x", "s"])
    assert "질문 0" not in screen
    assert "There is nothing left to judge" in screen
    assert "j: 3 by 지은." in screen
    state = read_journal(path).by("지은")
    assert [(state[it.id].verdict, state[it.id].note) for it in ITEMS[1:]] == [("all_bad", "둘 다 별로"), ("skip", "")]


def test_an_undo_shows_the_item_again_also_the_last_one_and_of_an_earlier_session(tmp_path):
    path = tmp_path / "j"
    assert TEXTS["en"]["nothing"] in run(path, ["u"])
    run(path, ["123", "u", "321", "x", "s", "u", "x", ""])
    first = ITEMS[0].shown_to("지은")[::-1]
    assert stands(path) == [(ITEMS[0], tuple((i,) for i in first)), (ITEMS[1], "all_bad"), (ITEMS[2], "all_bad")]
    screen = run(path, ["u", "u", "s"], items=ITEMS[:2])  # the last one is not among these, and can be judged again
    assert screen.count("질문 2") == 1
    assert stands(path)[1:] == [(ITEMS[1], "skip")]


def test_what_can_t_be_read_is_asked_again_and_changes_nothing(tmp_path):
    screen = run(tmp_path / "j", ["12", "", "n", "hello", "x y", UnicodeDecodeError("utf-8", b"\xff", 0, 1, ""), "q"])
    assert screen.count("Type the number of each of the 3 answers once, such as 3>2>1") == 6
    assert stands(tmp_path / "j") == []


def test_ctrl_c_ends_and_what_was_typed_before_is_kept(tmp_path):
    screen = run(tmp_path / "j", ["x", KeyboardInterrupt()])
    assert "j: 1 by 지은." in screen
    assert stands(tmp_path / "j") == [(ITEMS[0], "all_bad")]


def test_keys_on_a_hangul_keyboard_and_korean_texts(tmp_path):
    screen = run(tmp_path / "j", ["ㅌ", "ㅕ", "ㅜ 메모", "ㄴ", "ㅂ"], lang="ko")
    assert "순위를 좋은 것부터" in screen
    assert "1개 끝, 2개 남음, 약 1분" in screen
    (kept,) = read_journal(tmp_path / "j").standing
    assert (kept.verdict, kept.note) == ("skip", "메모")


def test_a_prompt_is_shown_whole_and_as_text(tmp_path):
    item = Item(Prompt("[bold]셋[/bold]", "반말\x1b[2J", ("하나", "둘")), ("[red]", "\u202e"))
    screen = run(tmp_path / "j", ["12"], items=[item])
    words = ["system", "반말\\x1b[2J", "user", "하나", "assistant", "둘", "user", "[bold]셋[/bold]", "[1]"]
    assert [line.strip() for line in screen.splitlines() if line.strip() in words] == words
    assert "[red]" in screen
    assert "\\u202e" in screen
    assert not {"\x1b", "\u202e"} & set(screen)


def test_two_annotators_share_the_items(tmp_path):
    run(tmp_path / "j", ["123", "q"])
    assert "질문 0" not in run(tmp_path / "j", ["q"], annotator="민지")
    run(tmp_path / "j", ["123", "q"], annotator="민지", overlap=1)
    assert [it.picked for it in read_journal(tmp_path / "j").standing] == ["order", "overlap"]


def test_agreement_is_printed_with_the_first_disputes():
    judgements = []
    for i in range(30):
        item = Item(Prompt(f"질문 {i}\x1b"), ("가", "[나]"))
        for who, verdict in (("a", ((0,), (1,))), ("b", ((i % 2,), (1 - i % 2,)))):
            judgements.append(Judgement(item, verdict, who, "2026-01-31T09:30:00+00:00", 1.0, (0, 1), "order"))
    screen = io.StringIO()
    scores = {it.item.id: {"가": 1.0, "[나]": 0.0} for it in judgements}
    print_agreement(agreement(judgements, scores), Console(file=screen, width=100), disputes=2)
    text = screen.getvalue()
    rows = [line.split()[:6] for line in text.splitlines()]
    assert ["a,", "b", "30", "0", "50.0%", "33.2%"] in rows
    assert "a, the reward model     30     0  100.0%" in text
    assert "Krippendorff's alpha of their ranks: 0.008 (95 %: " in text  # 1 − 119 · 30 / 60²
    assert "  b: [나]" in text
    assert "… and 13 more pairs" in text
    assert "\x1b" not in text
