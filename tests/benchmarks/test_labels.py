"""The simulated annotator, and which rankings it is asked for."""

import json
from collections import Counter
from itertools import permutations

from benchmarks import labels
from benchmarks.labels import Annotator
from kochat_trl.data.records import Prompt
from kochat_trl.desk.labels.items import Item, read_items, score_items
from kochat_trl.desk.labels.journal import read_journal
from kochat_trl.desk.sample.sample import Judge, Question, judge_of, write_sample_data
from tests.tiny import ROOT

import pytest

CAPITAL = Question("수도가 어디야?", ("서울",), "수도는 서울이에요.", "수도는 부산이에요.", "서울", "capital")
ANSWERS = ("English", "서울", "수도는 서울이에요.", "It is")  # 0.2, 0.8, 1 and 0.2 of the judge


def item(number=0):
    return Item(Prompt(CAPITAL.prompt, "", (str(number), "")), ANSWERS)


def test_an_annotator_without_errors_ranks_as_the_judge_with_its_ties():
    assert Annotator(Judge([CAPITAL]), 0.0, seed=0).rank(item(), "random").verdict == ((2,), (1,), (0, 3))


def test_errors_are_as_many_as_said_and_every_order_is_as_likely():
    annotator = Annotator(Judge([CAPITAL]), 0.4, seed=0)
    said = Counter(annotator.rank(item(i), "random").verdict for i in range(2400))
    assert said.pop(((2,), (1,), (0, 3))) / 2400 == pytest.approx(0.6, abs=0.04)  # 4 standard errors
    assert said.keys() == {tuple((i,) for i in order) for order in permutations(range(4))}
    assert max(said.values()) < 80  # 40 each, give or take 6


def test_what_is_said_of_an_item_hangs_on_it_and_the_seed_alone():
    judge = Judge([CAPITAL])
    one, other = ([Annotator(judge, 1.0, seed).rank(item(i), "random").verdict for i in range(9)] for seed in (0, 1))
    assert [Annotator(judge, 1.0, 0).rank(item(i), "uncertain").verdict for i in reversed(range(9))] == one[::-1]
    assert one != other


@pytest.fixture
def small(tmp_path, monkeypatch, recipe, tiny_base):
    """Twelve rankings to judge, one and then four of them, on the tiny base; what was trained stands in a list."""
    files = write_sample_data(tmp_path / "data", 0)
    pool, measured = tmp_path / "pool.jsonl", tmp_path / "measured.jsonl"
    records = json.loads(files["rm"].read_text(encoding="utf-8"))
    pool.write_text(json.dumps(records[:12]))
    measured.write_text(json.dumps(records[12:15]))
    own = ["--model_name_or_path", tiny_base, "--eval_files", measured, "--max_steps", 1]
    trained = []

    def train(*words):
        trained.append(words[3].name)
        recipe("reward", "--config", ROOT / "configs/tiny/reward.yaml", *words, *own)

    monkeypatch.setattr(labels, "SIZES", (1, 4))
    monkeypatch.setattr(labels, "MEASURED", {"held-out": str(measured)})
    monkeypatch.setattr(labels, "train", train)
    items, *_ = read_items([str(pool)])
    return Annotator(judge_of(files["rm"]), 0.0, seed=3), items, trained


def test_those_are_judged_next_of_which_the_last_model_is_least_certain(small, tmp_path):
    annotator, items, trained = small
    figures = [labels.curve(tmp_path / "out", order, annotator, items) for order in ("random", "uncertain")]
    assert trained == ["random-1", "random-4", "uncertain-4"]
    assert figures[0][0] == figures[1][0]
    at_random, uncertain = (read_journal(tmp_path / f"out/{o}.jsonl").standing for o in ("random", "uncertain"))
    assert [judgement.picked for judgement in uncertain] == ["random", *["uncertain"] * 3]
    assert at_random[0].item == uncertain[0].item
    scores = score_items(str(tmp_path / "out/random-1"), items)

    def margin(item):
        *_, second, best = sorted(scores[item.id].values())
        return best - second

    rest = sorted((item for item in items if item != uncertain[0].item), key=margin)
    assert [judgement.item for judgement in uncertain[1:]] == rest[:3]
    rankings = json.loads((tmp_path / "out/uncertain-4.rankings.jsonl").read_text(encoding="utf-8"))
    assert [record["prompt"] for record in rankings] == [judgement.item.prompt.prompt for judgement in uncertain]


def test_it_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch):
    annotator, items, trained = small
    monkeypatch.setattr(labels, "SIZES", (1,))
    (first,) = labels.curve(tmp_path, "random", annotator, items)
    monkeypatch.setattr(labels, "SIZES", (1, 2))
    assert labels.curve(tmp_path, "random", annotator, items)[0] == first
    assert trained == ["random-1", "random-2"]
    assert len(read_journal(tmp_path / "random.jsonl").standing) == 2


def test_the_table_has_the_difference_of_the_orders_seed_by_seed(monkeypatch):
    """The seeds differ by 0.1 in both orders, and not in the difference."""
    monkeypatch.setattr(labels, "SIZES", (25,))
    at_random = [[{"held-out": 0.5 + i / 10, "hard": 0.5}] for i in range(3)]
    uncertain = [[{"held-out": 0.55 + i / 10, "hard": 0.25}] for i in range(3)]
    *_, line = labels.table_of({"random": at_random, "uncertain": uncertain}).splitlines()
    gaps = "0.050 ± 0.000", "-0.250 ± 0.000"
    held_out, hard = "0.600 ± 0.248 | 0.650 ± 0.248", "0.500 ± 0.000 | 0.250 ± 0.000"
    assert line == f"| 25 | {held_out} | {gaps[0]} | {hard} | {gaps[1]} |"
