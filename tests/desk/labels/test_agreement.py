"""Agreement: pairs counted by hand, Krippendorff's own examples, and rankings that come of judgements."""

import json
import math
import random
from dataclasses import replace
from itertools import permutations

from kochat_trl.data.records import Prompt
from kochat_trl.desk.evaluation.metrics import accuracy_of
from kochat_trl.desk.labels import items as module
from kochat_trl.desk.labels.agreement import agreement, coincidences, mid_ranks, ordinal_alpha
from kochat_trl.desk.labels.export import ranking_records
from kochat_trl.desk.labels.items import Item, score_items
from kochat_trl.desk.labels.journal import Judgement
from kochat_trl.desk.writers import write_records
from tests.tiny import parsed

import numpy as np
import pytest


def judged(annotator, prompt, verdict, answers="가나다", system=None, history=()):
    item = Item(Prompt(prompt, system, history), tuple(answers))
    shown = tuple(range(len(answers)))
    return Judgement(item, verdict, annotator, "2026-01-31T09:30:00+00:00", 1.0, shown, "order")


def test_ranks_of_ties_are_their_mean():
    assert mid_ranks(judged("a", "1", ((2,), (0, 1)))) == {"다": 1, "가": 2.5, "나": 2.5}
    assert mid_ranks(judged("a", "1", ((0, 1, 2),))) == {"가": 2, "나": 2, "다": 2}


def test_pairs_on_which_people_agree():
    found = agreement(
        [
            judged("a", "1", ((0,), (1,), (2,))),
            judged("b", "1", ((2,), (1,), (0,)), answers="다가나"),  # 나 > 가 > 다: the file had another order
            judged("a", "2", ((0,), (1, 2))),
            judged("b", "2", ((0, 1), (2,))),
            judged("c", "2", ((0,), (1,), (2,))),
            judged("a", "3", ((0,), (1,), (2,))),  # alone
            judged("a", "4", "all_bad"),
            judged("b", "4", ((0,), (1,), (2,))),
            judged("a", "5", "skip"),
        ]
    )
    assert found.items == 2
    told = {names: (figures["pairs"], figures["tied"]) for names, figures in found.people.items()}
    assert told == {("a", "b"): (4, 2), ("a", "c"): (2, 1), ("b", "c"): (2, 1)}
    assert [figures["accuracy"] for figures in found.people.values()] == [3 / 4, 1, 1]
    assert (found.all["pairs"], found.all["tied"], found.all["accuracy"]) == (8, 4, 7 / 8)
    item = [judged("a", "1", "skip").item.id, judged("a", "2", "skip").item.id]
    assert found.people["a", "b"]["interval"] == accuracy_of([0, 1, 1, 1], [*item[:1] * 3, item[1]])["interval"]
    (dispute,) = found.disputes
    assert (dispute.item.prompt.prompt, dispute.prefers) == ("1", {"a": "가", "b": "나"})
    assert found.model == {}


def test_people_and_a_reward_model():
    judgements = [judged("a", "1", ((0,), (1,), (2,))), judged("b", "2", ((0, 1), (2,)))]
    scores = {
        judgements[0].item.id: {"가": 1.0, "나": 3.0, "다": -2.0},
        judgements[1].item.id: dict.fromkeys("가나다", 0),
    }
    found = agreement(judgements, scores)
    assert found.model["a", ""]["accuracy"] == pytest.approx(2 / 3)
    assert found.model["b", ""] == {"pairs": 0, "tied": 3}
    assert (found.items, found.people, found.all, found.alpha) == (0, {}, {"pairs": 0, "tied": 0}, None)


def test_a_reward_model_is_compared_apart_where_it_had_a_part_in_the_choice_of_the_item():
    picked = {"1": ("order",), "2": ("uncertain", "overlap"), "3": ("talk",), "4": ("random",)}
    judgements = [
        replace(judged(who, prompt, ((0,), (1,), (2,))), picked=how)
        for prompt, hows in picked.items()
        for who, how in zip("ab", hows, strict=False)
    ]
    scores = {it.item.id: {"가": 3.0, "나": 2.0, "다": 1.0} for it in judgements}
    found = {names: figures["pairs"] for names, figures in agreement(judgements, scores).model.items()}
    assert found == {("a", ""): 6, ("a", "talk"): 3, ("a", "uncertain"): 3, ("b", "uncertain"): 3}


def test_scores_are_asked_for_each_answer_of_each_item(monkeypatch):
    def gather(model, prompts, answers):
        return [[float(f"{prompt.prompt}.{len(answer)}") for prompt, answer in zip(prompts, *answers, strict=True)]]

    monkeypatch.setattr(module, "gather_scores", gather)
    items = [Item(Prompt("1"), ("가", "나나")), Item(Prompt("2"), ("가", "나나", "다다다"))]
    found = score_items("model", items)
    assert found == {items[0].id: {"가": 1.1, "나나": 1.2}, items[1].id: {"가": 2.1, "나나": 2.2, "다다다": 2.3}}


# --- Krippendorff's alpha -------------------------------------------------------------------------

# "Computing Krippendorff's Alpha-Reliability" (2011): four observers, twelve units, values missing (0), example C.
FOUR = ("123321412000", "123322412503", "033323422510", "123324412510")


def units_of(rows):
    return [[float(value) for value in unit if value != "0"] for unit in zip(*rows, strict=True)]


def test_alpha_is_krippendorff_s_of_his_example():
    matrix = coincidences(units_of(FOUR), [1, 2, 3, 4, 5])
    assert matrix.tolist() == [  # as he prints it
        [7, 4 / 3, 1 / 3, 1 / 3, 0],
        [4 / 3, 10, 4 / 3, 1 / 3, 0],
        [1 / 3, 4 / 3, 8, 1 / 3, 0],
        [1 / 3, 1 / 3, 1 / 3, 4, 0],
        [0, 0, 0, 0, 3],
    ]
    assert matrix.sum() == 40
    assert float(ordinal_alpha(matrix)) == pytest.approx(0.815, abs=5e-4)


def alpha_by_the_formula(units):
    """In plain loops over pairs of values, not over coincidences."""
    units = [unit for unit in units if len(unit) > 1]
    values = sorted(value for unit in units for value in unit)
    n = len(values)

    def delta(c, k):
        c, k = min(c, k), max(c, k)
        return sum(c <= v <= k for v in values) - (values.count(c) + values.count(k)) / 2

    observed = sum(sum(delta(c, k) ** 2 for c, k in permutations(unit, 2)) / (len(unit) - 1) for unit in units) / n
    expected = sum(delta(c, k) ** 2 for c, k in permutations(values, 2)) / (n * (n - 1))
    return 1 - observed / expected


def test_alpha_is_the_formula_s_on_any_units():
    drawn = random.Random(0)
    for _ in range(20):
        units = [[drawn.choice([1, 1.5, 2, 3]) for _ in range(drawn.randint(1, 4))] for _ in range(12)]
        found = float(ordinal_alpha(coincidences(units, [1, 1.5, 2, 3])))
        assert found == pytest.approx(alpha_by_the_formula(units), abs=1e-12)


def test_alpha_at_its_ends():
    same = [[1, 1], [2, 2], [3, 3]]
    assert float(ordinal_alpha(coincidences(same, [1, 2, 3]))) == 1
    assert math.isnan(float(ordinal_alpha(coincidences([[1, 1]], [1]))))
    drawn = random.Random(0)
    chance = [[drawn.randint(1, 3), drawn.randint(1, 3)] for _ in range(5000)]
    assert abs(float(ordinal_alpha(coincidences(chance, [1, 2, 3])))) < 0.03
    matrices = np.stack([coincidences(its, [1, 2, 3]) for its in (same, chance)])
    assert ordinal_alpha(matrices).tolist() == [float(ordinal_alpha(matrix)) for matrix in matrices]


def test_alpha_of_rankings_with_its_interval_over_items():
    orders = [*permutations(range(3))]
    drawn = random.Random(1)
    judgements = []
    for i in range(150):
        first = drawn.choice(orders)
        other = first if drawn.random() < 0.6 else drawn.choice(orders)
        judgements += [judged(who, f"{i}", tuple((j,) for j in its)) for who, its in (("a", first), ("b", other))]
    found = agreement(judgements)
    low, high = found.alpha_interval
    assert low < found.alpha < high
    assert 0.1 < high - low < 0.3  # of 150 items
    assert 0.45 < found.alpha < 0.75  # three fifths of the items agree, the others by chance
    assert agreement(judgements) == found
    more = [judged(it.annotator, f"{it.item.prompt.prompt}, again", it.verdict) for it in judgements]
    twice = agreement(judgements + more)
    assert twice.alpha == pytest.approx(found.alpha, abs=2e-3)
    assert np.ptp(twice.alpha_interval) == pytest.approx((high - low) / 2**0.5, rel=0.15)


def test_without_an_interval_or_alpha():
    one = [judged("a", "1", ((0,), (1,), (2,))), judged("b", "1", ((0,), (2,), (1,)))]
    assert agreement(one).alpha_interval is None
    assert agreement(one).alpha is not None
    tied = [judged(who, prompt, ((0, 1, 2),)) for who in "ab" for prompt in "12"]
    assert (agreement(tied).alpha, agreement(tied).alpha_interval) == (None, None)
    assert agreement([]).alpha is None


# --- Rankings -------------------------------------------------------------------------------------


def test_rankings_are_read_as_they_were_judged(tmp_path):
    judgements = [
        judged("지은", "1", ((2,), (0, 1))),
        judged("지은", "2", ((1,), (0,)), "가나", "반말", ("안녕", "네")),
        judged("민지", "1", ((0, 1), (2,)), "다가나"),
        judged("민지", "3", "all_bad"),
        judged("민지", "4", "skip"),
        judged("민지", "5", ((0, 1, 2),)),
    ]
    records, without = ranking_records(judgements)
    beside = {"annotator": "지은", "judged_at": "2026-01-31T09:30:00+00:00"}
    completions = {"completion_0": "가", "completion_1": "나", "completion_2": "다"}
    assert records[0] == {"prompt": "1"} | completions | {"ranking": [2, [0, 1]]} | beside
    assert dict(without) == {"all_bad": 1, "skip": 1, "tied": 1}
    write_records(tmp_path / "r.jsonl", "array", records)
    found = parsed(tmp_path / "r.jsonl", "preference")
    assert [(it.asked, it.completions, it.tiers) for it in found] == [
        (it.item.prompt, it.item.answers, it.verdict) for it in judgements[:3]
    ]
    assert json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8")) == records
