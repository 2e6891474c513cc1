"""The journal of judgements: what stands, what can't be read, and that no kill loses or doubles a judgement."""

import json
import os
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

from kochat_trl.data.records import Prompt
from kochat_trl.desk.labels import journal as module
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, Judgement, Undo, read_journal
from kochat_trl.errors import UserError
from tests.tiny import ROOT

import pytest

WHEN = "2026-01-31T09:30:00+00:00"


def judgement(prompt="가", verdict=((1,), (0,)), annotator="지은", answers=("나", "다"), **changes):
    item = Item(Prompt(prompt, changes.pop("system", None), changes.pop("history", ())), tuple(answers))
    fields = {"judged_at": WHEN, "seconds": 2.5, "shown": tuple(range(len(answers))), "picked": "order"} | changes
    return Judgement(item, verdict, annotator, **fields)


def written(path, *lines):
    with Journal(path) as journal:
        for line in lines:
            journal.add(line)
    return Path(path).read_bytes()


def test_what_is_added_is_read_again(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    lines = [
        judgement("가", answers="나다라", verdict=((2,), (0, 1)), note="길다", system="반말", history=("ㄱ", "ㄴ")),
        judgement("나", "all_bad", picked="overlap", shown=(1, 0)),
        judgement("다", "skip", "민지", seconds=0.0),
    ]
    text = written(path, *lines)
    assert text.count(b"\n") == 3
    assert json.loads(text.split(b"\n")[0])["verdict"] == [[2], [0, 1]]
    state = read_journal(path)
    assert state.standing == lines
    assert [it.tiers for it in lines] == [((2,), (0, 1)), None, None]
    assert state.by("지은") == {it.item.id: it for it in lines[:2]}
    assert state.annotators == ["지은", "민지"]
    with Journal(path) as journal:
        assert journal.state.standing == lines
    assert path.read_bytes() == text


def test_the_last_of_an_annotator_is_taken_back_and_the_earlier_one_stands_again(tmp_path):
    path = tmp_path / "j"
    first, again, other = judgement("가"), judgement("가", ((0, 1),)), judgement("가", "skip", "민지")
    with Journal(path) as journal:
        for line in (first, other, again):
            journal.add(line)
        assert journal.state.standing == [again, other]  # judged twice: the later one
        assert journal.undo("지은") == again
        assert journal.state.standing == [first, other]
        assert journal.undo("지은") == first
        assert journal.undo("지은") is None
        with pytest.raises(UserError, match=r"field 'undo': found 'x', expected .* 민지 judged last"):
            journal.add(Undo("x", "민지", WHEN))
    assert len(path.read_bytes().splitlines()) == 5  # nothing is rewritten
    assert read_journal(path).standing == [other]


def test_two_journals_one_after_the_other_are_one(tmp_path):
    with Journal(tmp_path / "a") as one:
        one.add(judgement("가"))
        one.add(judgement("나"))
        one.undo("지은")
    other = judgement("가", "skip", "민지")
    (tmp_path / "both").write_bytes((tmp_path / "a").read_bytes() + written(tmp_path / "b", other))
    assert read_journal(tmp_path / "both").standing == [judgement("가"), other]


HOSTILE = [
    "\0",
    "\x1b[2J",
    "가\u202e나\u200f",
    "a\r\nb\u2028c\x85",
    "\ud800",
    "가" * 50_000,
    "\ufeff",
    "[red]",
    '"}\n{"',
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_survives(text, tmp_path):
    line = judgement(text, answers=(text + "1", text + "2"), note=text, system=text, history=(text, text))
    assert written(tmp_path / "j", line, judgement()).count(b"\n") == 2
    assert read_journal(tmp_path / "j").standing == [line, judgement()]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (judgement(annotator="a\nb"), "annotator"),
        (judgement(annotator=""), "annotator"),
        (judgement(annotator=" a"), "annotator"),
        (judgement(annotator="\udcff"), "annotator"),
        (judgement(verdict=((0,),)), "verdict"),
        (judgement(verdict=((0,), (0, 1))), "verdict"),
        (judgement(verdict=((0,), (2,))), "verdict"),
        (judgement(verdict="bad"), "verdict"),
        (judgement(shown=(0, 0)), "shown"),
        (judgement(shown=(False, True)), "shown"),
        (judgement(seconds=float("nan")), "seconds"),
        (judgement(seconds=-1), "seconds"),
        (judgement(picked="luck"), "picked"),
        (judgement(judged_at="2026-01-31T09:30:00"), "judged_at"),
        (judgement(judged_at="2026-01-31T09:30:00+09:00"), "judged_at"),
        (judgement(answers=["나"], verdict=((0,),)), "answers"),
        (judgement(answers=["나", "나"]), "answers"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(line, field, tmp_path):
    with Journal(tmp_path / "j") as journal, pytest.raises(UserError, match=f"field '{field}': found"):
        journal.add(line)
    assert (tmp_path / "j").read_bytes() == b""


def changed(**changes):
    fields = json.loads(json.dumps(judgement().fields)) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        pytest.param(b"[" * 100_000, "recursion", id="deep"),
        (b"[]", "expected an object"),
        (changed(prompt="other"), "field 'item': found .*was a text changed"),
        (changed(seconds=None), "field 'seconds' is missing"),
        (changed(stars=5), "field 'stars' is unknown"),
        (changed(answers=["나", 1]), "field 'answers': found"),
        (changed(history=["나", 1]), "field 'history': found"),
        (changed(note=1), "field 'note': found"),
        (changed(verdict={}), "field 'verdict': found"),
        (b'{"undo": "x", "annotator": "a", "judged_at": "%s"}' % WHEN.encode(), "found 'x', expected nothing"),
    ],
)
def test_a_broken_line_is_named_and_the_file_left_as_it_is(line, says, tmp_path):
    path = tmp_path / "j"
    text = written(path, judgement()) + line + b"\n" + changed() + b'\n{"item": "'
    path.write_bytes(text)
    for read in (read_journal, Journal):
        with pytest.raises(UserError, match=rf"j, line 2: found .*{says}"):
            read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["j"]
    assert path.read_bytes() == text


@pytest.mark.parametrize("text", [b'[{"prompt": "a"}]', b"prompt,answer", b"{}", b'{"prompt": "a"', b"\0" * 9])
def test_another_file_is_refused_and_left_as_it_is(text, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"no journal|no line of a journal"):
        Journal(path)
    assert path.read_bytes() == text
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def test_no_file_no_journal(tmp_path):
    with pytest.raises(UserError, match="can't be read: No such file"):
        read_journal(tmp_path / "none")
    with pytest.raises(UserError, match="can't be opened for writing: Is a directory"):
        Journal(tmp_path)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.add(judgement())
        with pytest.raises(UserError, match="in use by another process"):
            Journal(path)
        assert read_journal(path).standing == [judgement()]  # reading is free
    Journal(path).close()


def test_a_last_line_cut_anywhere_is_completed_or_set_aside(tmp_path):
    """Also inside a character, and but for its newline: the whole judgement stands, and of a part nothing does."""
    path, torn = tmp_path / "j", tmp_path / "j.torn"
    first = written(path, judgement())
    last = written(path, judgement("나", "skip"))[len(first) :]
    for cut in (*range(1, 60), *range(60, len(last) - 1, 7), len(last) - 1):
        path.write_bytes(first + last[:cut])
        torn.unlink(missing_ok=True)
        whole = cut == len(last) - 1
        assert len(read_journal(path).standing) == 1 + whole
        assert path.read_bytes() == first + last[:cut]  # reading mends nothing
        with Journal(path) as journal:
            assert len(journal.state.standing) == 1 + whole
            journal.add(judgement("다"))
        assert [it.item.prompt.prompt for it in read_journal(path).standing] == ["가", *"나" * whole, "다"]
        assert not torn.exists() if whole else torn.read_bytes() == last[:cut] + b"\n"


def test_a_first_line_cut_is_set_aside(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(written(path, judgement())[:20])
    with Journal(path) as journal:
        assert journal.state.standing == []


def test_of_what_can_t_be_written_nothing_stays(tmp_path, monkeypatch):
    write, path = os.write, tmp_path / "j"
    with Journal(path) as journal:
        journal.add(judgement("가"))

        def full(descriptor, data):
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return write(descriptor, data[:-99])

        monkeypatch.setattr(module.os, "write", full)
        with pytest.raises(UserError, match="the disk is full"):
            journal.add(judgement("나"))
        assert journal.state.standing == [judgement("가")]
        monkeypatch.setattr(module.os, "write", lambda descriptor, data: write(descriptor, data[:7]))  # bit by bit
        journal.add(judgement("다"))
    assert read_journal(path).standing == [judgement("가"), judgement("다")]


# Each call writes 64 bytes, as the system may: kills come within a line, too.
WRITER = """
import os, sys
from kochat_trl.data.records import Prompt
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, Judgement, now

write = os.write
os.write = lambda descriptor, data: write(descriptor, data[:64])
with Journal(sys.argv[1]) as journal:
    done = journal.state.by("a")
    for i in range(1000):
        item = Item(Prompt(f"질문 {i}"), ("가" * (20_000 if i % 10 == 0 else 20), "2"))
        if item.id not in done:
            journal.add(Judgement(item, ((i % 2,), (1 - i % 2,)), "a", now(), 0.5, (0, 1), "order"))
            print(i, flush=True)
"""


def test_of_a_thousand_judgements_thirty_kills_lose_none_and_double_none(tmp_path):
    path, drawn = tmp_path / "j", random.Random(0)
    acknowledged: list[int] = []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for kill in [True] * 30 + [False]:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, env=environment
        )
        if kill:
            acknowledged += map(int, islice(writer.stdout, drawn.randint(1, 40)))
            time.sleep(drawn.random() * 0.002)  # anywhere in the next ones
            writer.kill()
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.stdout.close()
        assert writer.wait() == 0 or kill
        its = [it.item.prompt.prompt for it in read_journal(path).standing]
        assert {f"질문 {i}" for i in acknowledged} <= set(its)
    lines = [json.loads(line) for line in path.read_bytes().decode().splitlines()]
    assert [line["prompt"] for line in lines] == [f"질문 {i}" for i in range(1000)]
    assert [line["verdict"] for line in lines] == [[[i % 2], [1 - i % 2]] for i in range(1000)]
    assert acknowledged == sorted(set(acknowledged))
