"""What is judged: items of every shape of file, their ids, the blind order, and the queue."""

import hashlib
import json

from kochat_trl.data.records import BrokenRecordsError, Prompt
from kochat_trl.desk.labels.items import Item, read_items
from kochat_trl.desk.labels.journal import Judgement, State
from kochat_trl.desk.labels.queue import Queue
from kochat_trl.errors import UserError

import pytest

ANSWERS = [f"답 {i}" for i in range(3)]


def item(prompt="가", answers=ANSWERS, system=None, history=()):
    return Item(Prompt(prompt, system, history), tuple(answers))


def test_an_id_is_of_the_content_alone():
    assert item().id == item(answers=reversed(ANSWERS)).id == item(system="").id
    others = [item("나"), item(answers=ANSWERS[:2]), item(system="가"), item(history=("가", "나")), item("\ud800")]
    assert len({it.id for it in [item(), *others]}) == 6
    content = rb'["\uac00", null, [], ["\ub2f5 0", "\ub2f5 1", "\ub2f5 2"]]'
    assert item().id == hashlib.sha256(content).hexdigest()[:16]  # journals have it


def test_the_order_shown_is_drawn_and_says_nothing_of_the_file_s():
    def texts(of, *draw):
        return [of.answers[i] for i in of.shown_to(*draw)]

    assert texts(item(), "지은", 1) == texts(item(answers=reversed(ANSWERS)), "지은", 1)
    first = [item(f"질문 {i}").shown_to(name, seed)[0] for i in range(100) for name in "ab" for seed in (0, 1)]
    assert all(100 < first.count(place) < 170 for place in range(3))
    many = [item(answers=list("가나다라마바")).shown_to(name, seed) for name in "ab" for seed in (0, 1)]
    assert len(set(many)) == 4
    assert all(sorted(order) == list(range(6)) for order in many)


FILES = {
    "ranking.json": '[{"prompt": "가", "completion_0": "나", "completion_1": "다", "ranking": [1, 0]}]',
    "pair.jsonl": '{"prompt": "가", "chosen": "다", "rejected": "나"}',
    "answers.jsonl": '{"prompt": "가", "responses": ["나", "다"]}',
    "kto.jsonl": '{"prompt": "가", "completion": "나", "label": false}\n'
    '{"prompt": "가", "completion": "다", "label": true}',
}


@pytest.mark.parametrize("name", FILES)
def test_any_file_of_several_answers_is_read(name, write):
    (only,), invalid, few = read_items([write(name, FILES[name])])
    assert (only.prompt, set(only.answers), invalid, few) == (Prompt("가"), {"나", "다"}, [], [])


def test_files_are_read_in_their_order_and_what_stands_twice_once(write):
    second = write("b.jsonl", '{"prompt": "하", "chosen": "나", "rejected": "다", "system": "반말"}')
    files = [write(name, text) for name, text in FILES.items()]
    items, _, _ = read_items([files[0], second, *files[1:]])
    assert items == [item("가", ["나", "다"]), item("하", ["나", "다"], "반말")]


def test_prompts_with_files_of_answers(write):
    prompts = write("p.txt", "가\n나\n다\n라\n")
    rows = {"a": ["1", "2", "", "4"], "b": ["5", "2", "6", "7"], "c": ["1", "2", "", "8"]}
    answers = [
        write(name, json.dumps([{"prompt": p, "completion": c} for p, c in zip("가나다라", its, strict=True)]))
        for name, its in rows.items()
    ]
    items, invalid, few = read_items([prompts], answers)
    assert items == [item("가", "15"), item("라", "478")]
    assert (invalid, few) == ([], ["나", "다"])
    with pytest.raises(UserError, match="no prompt has two different answers"):
        read_items([write("q.txt", "나\n")], answers)
    with pytest.raises(UserError, match=r"b: no answer to 1 of 1 prompts, such as \['마'\]"):
        read_items([write("r.txt", "마\n")], [answers[1], answers[2]])


def test_what_has_one_answer_or_none_is_told_what_to_do(write):
    ranked = FILES["ranking.json"][1:-1]
    for record in ('{"prompt": "가"}', '{"prompt": "가", "completion": "나"}'):
        path = write("one.json", f"[{ranked}, {record}]")
        with pytest.raises(BrokenRecordsError, match=r"1 of 2 records .*\n.*record 1.*--answers"):
            read_items([path])
        items, invalid, _ = read_items([path], skip_invalid=True)
        assert (len(items), [error.source.index for error in invalid]) == (1, [1])


# --- The queue ------------------------------------------------------------------------------------

ITEMS = [item(f"질문 {i}") for i in range(200)]


def judge(state, its, annotator, verdict=((0,), (1, 2))):
    state.add(Judgement(its, verdict, annotator, "2026-01-31T09:30:00+00:00", 1.0, (0, 1, 2), "order"))


def test_an_item_is_for_whoever_comes_first_and_a_share_for_two():
    queue, state = Queue(ITEMS, overlap=0.2), State()
    assert queue.left(state, "a") == [(it, "order") for it in ITEMS]
    for it in ITEMS:
        judge(state, it, "a")
    assert queue.left(state, "a") == []
    twice = queue.left(state, "b")
    assert 25 <= len(twice) <= 55
    assert {picked for _, picked in twice} == {"overlap"}
    assert Queue(ITEMS[::-1], "random", 7, overlap=0.2).left(state, "c") != twice  # another order, the same items
    assert {it.id for it, _ in Queue(ITEMS[::-1], "random", 7, 0.2).left(state, "c")} == {it.id for it, _ in twice}
    assert {it.id for it, _ in Queue(ITEMS, overlap=0.5).left(state, "b")} > {it.id for it, _ in twice}
    for it, _ in twice:
        judge(state, it, "b", "all_bad")
    assert queue.left(state, "c") == []
    assert (len(Queue(ITEMS).left(state, "c")), len(Queue(ITEMS, overlap=1).left(state, "c"))) == (0, 200 - len(twice))


def test_what_one_skips_is_left_to_the_others():
    state = State()
    judge(state, ITEMS[0], "a", "skip")
    assert Queue(ITEMS[:2]).left(state, "a") == [(ITEMS[1], "order")]
    assert Queue(ITEMS[:2]).left(state, "b") == [(ITEMS[0], "order"), (ITEMS[1], "order")]


def test_orders():
    random = [it for it, picked in Queue(ITEMS, "random", 1).left(State(), "a") if picked == "random"]
    assert random != ITEMS
    assert sorted(random, key=ITEMS.index) == ITEMS
    assert random == [it for it, _ in Queue(ITEMS[::-1], "random", 1).left(State(), "b")]
    assert random != [it for it, _ in Queue(ITEMS, "random", 2).left(State(), "a")]


def test_uncertain_begins_where_the_best_two_are_nearest():
    rows = [(0.0, 5.0, 1.0), (3.0, 2.5, 2.5), (1.0, 1.0, 9.0), (-1.0, -1.0, -4.0), (2.0, 2.0, 2.0)]
    few = ITEMS[:5]
    scores = {it.id: dict(zip(it.answers, row, strict=True)) for it, row in zip(few, rows, strict=True)}
    found = Queue(few, "uncertain", scores=scores).left(State(), "a")
    tied = sorted([few[3], few[4]], key=lambda it: it.id)
    assert found == [(it, "uncertain") for it in (*tied, few[1], few[0], few[2])]
    del scores[few[2].id][ANSWERS[0]]
    with pytest.raises(UserError, match="no scores of the answers to '질문 2'"):
        Queue(few, "uncertain", scores=scores)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(UserError, match="overlap: found"):
        Queue(ITEMS, overlap=share)
