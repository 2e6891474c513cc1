"""Several people judge at once: who sees what, what is kept, and items whose answers are made meanwhile."""

from threading import Event, Thread

from kochat_trl.data.records import Prompt
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, read_journal
from kochat_trl.desk.labels.labelling import AHEAD, HELD, Labelling
from kochat_trl.desk.labels.queue import Queue
from kochat_trl.errors import UserError

import pytest

ITEMS = [Item(Prompt(f"질문 {i}"), ("가", "나", "다")) for i in range(4)]
BEST = ((2,), (0, 1))


@pytest.fixture
def labelling(tmp_path):
    """Of a journal in `tmp_path`, with a clock that the test sets."""
    made = []

    def make(items=ITEMS, **queue):
        clock = {"now": 0.0}
        labelling = Labelling(Journal(tmp_path / f"j{len(made)}"), Queue(items, **queue), clock=lambda: clock["now"])
        labelling.set_clock = lambda now: clock.update(now=now)
        made.append(labelling)
        return labelling

    yield make
    for labelling in made:
        labelling.close()
        labelling.journal.close()


def standing(labelling):
    return [(it.annotator, it.item, it.verdict) for it in read_journal(labelling.journal.path).standing]


def test_a_turn_stays_until_it_is_judged_and_judging_is_on_disk(labelling):
    it = labelling()
    first = it.turn("a")
    assert it.turn("a") == first
    assert (first.item, first.shown, first.done, first.left) == (ITEMS[0], ITEMS[0].shown_to("a"), 0, 4)
    assert (first.minutes, first.last) == (None, None)
    assert it.judge("a", ITEMS[0].id, BEST, 90.0, "메모")
    (kept,) = read_journal(it.journal.path).standing
    assert (kept.verdict, kept.note, kept.seconds, kept.picked, kept.shown) == (
        BEST,
        "메모",
        90.0,
        "order",
        first.shown,
    )
    second = it.turn("a")
    assert (second.item, second.done, second.left, second.minutes, second.last) == (ITEMS[1], 1, 3, 4, kept)


def test_two_at_once_see_two_items_until_one_has_been_away_for_long(labelling):
    it = labelling(ITEMS[:2])
    assert [it.turn(who).item for who in "abab"] == [*ITEMS[:2], *ITEMS[:2]]
    waiting = it.turn("c")  # both are before others
    assert (waiting.item, waiting.left) == (None, 2)
    it.set_clock(HELD + 1)
    assert it.turn("c").item == ITEMS[0]
    assert it.turn("b").item == ITEMS[1]


def test_what_was_judged_while_another_was_faster_is_kept_too(labelling):
    it = labelling()
    it.turn("a")
    it.set_clock(HELD + 1)
    assert it.turn("b").item == ITEMS[0]
    assert it.judge("b", ITEMS[0].id, BEST, 1.0)
    assert it.judge("a", ITEMS[0].id, "all_bad", 1.0)
    assert standing(it) == [("b", ITEMS[0], BEST), ("a", ITEMS[0], "all_bad")]
    assert [kept.picked for kept in it.journal.state.standing] == ["order", "overlap"]


def test_the_same_judgement_twice_is_one_and_of_no_item_none(labelling):
    it = labelling()
    assert it.judge("a", ITEMS[2].id, BEST, 1.0)  # not the next one: of a page from before a restart
    assert not it.judge("a", ITEMS[2].id, "skip", 1.0)
    assert standing(it) == [("a", ITEMS[2], BEST)]
    with pytest.raises(UserError, match="no item 'x'"):
        it.judge("a", "x", BEST, 1.0)
    assert it.turn("a").item == ITEMS[0]


def test_an_undo_shows_its_item_again_and_asked_twice_takes_back_one(labelling):
    it = labelling()
    for item in ITEMS[:2]:
        it.judge("a", item.id, BEST, 1.0)
    assert it.undo("a", ITEMS[0].id) is None  # not the last one
    assert it.undo("a", ITEMS[1].id).item == ITEMS[1]
    assert it.undo("a", ITEMS[1].id) is None
    turn = it.turn("a")
    assert (turn.item, turn.left, turn.last.item) == (ITEMS[1], 3, ITEMS[0])
    assert it.judge("a", ITEMS[1].id, "skip", 1.0)
    assert standing(it) == [("a", ITEMS[0], BEST), ("a", ITEMS[1], "skip")]


def test_what_is_preferred_in_talk_is_a_ranking_of_the_different_answers(labelling):
    it = labelling([])
    prompt = Prompt("수도는?", "짧게")
    it.prefer("a", prompt, ("서울", "부산", "서울", "대구"), 1, 2.0)
    (kept,) = read_journal(it.journal.path).standing
    assert (kept.item, kept.verdict) == (Item(prompt, ("서울", "부산", "대구")), ((1,), (0, 2)))
    assert (kept.picked, kept.shown) == ("talk", (0, 1, 2))
    for answers, best in ((("가", "가"), 0), (("가", "나"), 2), (("가", "나"), -1)):
        with pytest.raises(UserError, match="two different answers"):
            it.prefer("a", prompt, answers, best, 2.0)
    assert it.undo("a") == kept
    assert it.turn("a").item is None  # it was no item of the queue


def test_many_threads_judge_each_item_once(labelling):
    items = [Item(Prompt(f"{i}"), ("가", "나")) for i in range(60)]
    it = labelling(items)

    def work(who):
        while (turn := it.turn(who)).item:
            it.judge(who, turn.item.id, ((0,), (1,)), 1.0)

    threads = [Thread(target=work, args=(who,)) for who in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(item.id for _, item, _ in standing(it)) == sorted(item.id for item in items)


def test_answers_are_made_a_few_ahead(labelling):
    it = labelling([])
    prompts = [Prompt(f"{i}") for i in range(AHEAD + 5)]
    asked, may_go = [], Event()

    def answers(prompt):
        asked.append(prompt)
        may_go.wait(10)
        return ("같다",) if prompt.prompt == "1" else (f"{prompt.prompt}가", "나")

    it.make_items(prompts, answers)
    turn = it.turn("a")
    assert (turn.item, turn.left) == (None, len(prompts))
    may_go.set()
    assert it.turn("a", wait=True).item.prompt == prompts[0]
    with it._changed:
        it._changed.wait_for(lambda: len(it.queue.items) == AHEAD, timeout=10)
    assert len(asked) <= AHEAD + 2
    judged = []
    while (turn := it.turn("a", wait=True)).item:
        judged.append(turn.item.prompt)
        it.judge("a", turn.item.id, "skip", 1.0)
    assert judged == [prompt for prompt in prompts if prompt.prompt != "1"]  # which has no two different answers
    assert turn.left == 0


def test_a_prompt_that_cannot_be_answered_is_left_out_and_told_and_the_others_go_on(labelling, caplog):
    it = labelling(ITEMS[:1])

    def answers(prompt):
        if prompt.prompt == "1":
            raise UserError("too long")
        if prompt.prompt == "3":
            raise MemoryError("full")
        return ("가", "나")

    it.make_items([Prompt(f"{i}") for i in range(5)], answers)
    asked = []
    while (turn := it.turn("a", wait=True)).item:
        asked.append(turn.item.prompt.prompt)
        assert it.judge("a", turn.item.id, "skip", 1.0)
    assert asked == [ITEMS[0].prompt.prompt, "0", "2"]
    assert (turn.left, turn.trouble) == (0, "left out: '3': MemoryError('full'); no more answers are made")
    other = labelling([])
    other.make_items([Prompt("1")], answers)
    assert other.turn("b", wait=True).trouble == "left out: '1': too long"
    assert [line.split(": ")[1] for line in caplog.messages] == ["'1'", "'3'", "'1'"]


def test_what_is_on_the_screen_stays_next_when_an_earlier_one_comes_free(labelling):
    it = labelling()
    assert [it.turn(who).item for who in "ba"] == ITEMS[:2]
    it.judge("b", ITEMS[0].id, "skip", 1.0)  # which is left to the others
    assert it.turn("a").item == ITEMS[1]
    it.judge("a", ITEMS[1].id, "skip", 1.0)
    assert it.turn("a").item == ITEMS[0]
    it.undo("a")
    assert it.turn("a").item == ITEMS[1]  # what was taken back goes before it


def test_once_it_is_closed_no_more_answers_are_made(labelling):
    it, asked, may_go = labelling([]), [], Event()

    def answers(prompt):
        asked.append(prompt)
        may_go.wait(10)
        return ("가", "나")

    it.make_items([Prompt(f"{i}") for i in range(5)], answers)
    closed = Thread(target=it.close)
    closed.start()
    may_go.set()
    closed.join(10)
    assert not closed.is_alive()
    assert (len(asked) <= 1, it.turn("a").left) == (True, len(it.queue.items))
