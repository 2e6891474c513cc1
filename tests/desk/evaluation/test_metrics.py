"""The metrics of a reward model's scores against values worked out by hand, and the tables of them."""

import io
import math
import random
from statistics import fmean, stdev

from kochat_trl.desk.evaluation.metrics import (
    BASELINES,
    ScoredAnswer,
    ScoredPair,
    accuracy_of,
    against_baseline,
    agreement,
    evaluate,
    expected_calibration_error,
    gap_kind,
    pair_kind,
    scored_pairs,
    wins,
)
from kochat_trl.desk.evaluation.view import print_evaluation
from kochat_trl.desk.statistics import effective_size, wilson_interval

import pytest
from rich.console import Console


def answer(score=0.0, rank=0, tokens=1, text="가"):
    return ScoredAnswer(text, rank, tokens, score)


def pair(better, worse, prompt="가", ranks=2):
    return ScoredPair(prompt, better, worse, ranks)


def test_wilson_interval():
    z = 1.959963984540054
    assert wilson_interval(0, 10) == pytest.approx((0, z * z / (10 + z * z)), abs=1e-12)
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z * z), 1), abs=1e-12)
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    for successes, trials in ((1, 4), (7.5, 20), (799, 1000)):
        share = successes / trials
        for p in wilson_interval(successes, trials):  # each end is z standard errors, its own, from what was seen
            assert abs(share - p) == pytest.approx(z * math.sqrt(p * (1 - p) / trials), rel=1e-9)
    for trials in range(1, 200):
        for successes in (0, 1, trials / 2, trials):
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1


def test_effective_size():
    assert effective_size([1, 0, 1, 1], ["a", "b", "c", "d"]) == 4  # a prompt each: what they are
    assert effective_size([1, 1, 1, 0, 0, 0], list("aaabbb")) == 2  # all alike: as many as prompts
    assert effective_size([1, 1, 1, 1], list("aabc")) == pytest.approx(16 / 6)  # nothing lost: the least, n²/Σn_g²
    assert effective_size([1, 0, 1, 0], list("aaaa")) == 1
    assert effective_size([1, 0, 1, 0, 1, 0], list("aabbcc")) == 6  # not above n, though a half each is no chance
    assert effective_size([1, 0, 1, 0, 1, 1], list("aabbcc")) == 6
    # mean 1/2; the prompts add 1, −1, 0, 0 to it, so the variance is 4/3 · 2/64 = 1/24, and 1/4 of that is 6 pairs.
    assert effective_size([1, 1, 0, 0, 1, 0, 1, 0], list("aabbccdd")) == pytest.approx(6)


def test_the_interval_is_as_wide_as_a_bootstrap_over_prompts():
    rng = random.Random(0)
    rankings = [(str(i), [answer(rng.gauss(-rank, 1), rank) for rank in range(3)]) for i in range(300)]
    pairs = scored_pairs(rankings)
    won, prompts = wins(pairs), [p.prompt for p in pairs]
    of_prompt = [sum(won[i : i + 3]) / 3 for i in range(0, len(won), 3)]
    spread = stdev(fmean(rng.choices(of_prompt, k=300)) for _ in range(1000))
    found = accuracy_of(won, prompts)
    (low, high), (low_2, high_2) = found["interval"], found["if_independent"]
    assert (found["pairs"], found["prompts"], found["accuracy"]) == (900, 300, fmean(won))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.08)
    assert high_2 - low_2 < 0.97 * (high - low)
    assert (low_2, high_2) == wilson_interval(sum(won), 900)


def test_a_baseline_is_beaten_by_a_sign_test_over_prompts():
    def verdict(model, baseline, prompts=None):
        found = against_baseline(model, baseline, prompts or list(map(str, range(len(model)))))
        return tuple(found[key] for key in ("ahead", "behind", "p", "beaten"))

    assert verdict([1] * 6, [0] * 6) == (6, 0, 2 / 64, True)
    assert verdict([1] * 6, [0.5] * 6) == (6, 0, 2 / 64, True)  # against draws
    assert verdict([1] * 5, [0] * 5) == (5, 0, 2 / 32, False)  # too few to tell
    assert verdict([0] * 6, [1] * 6) == (0, 6, 2 / 64, False)
    assert verdict([1, 0, 1, 1], [1, 0, 1, 1]) == (0, 0, 1, False)
    # McNemar's exact test: 9 against 1 of the pairs that they don't agree on, 2 · (1 + 10) / 2¹⁰.
    assert verdict([1] * 29 + [0], [1] * 20 + [0] * 9 + [1]) == (9, 1, 22 / 1024, True)
    assert verdict([1] * 6, [0] * 6, list("aaabbb")) == (2, 0, 2 / 4, False)  # three pairs of a prompt are one case
    # Ahead on eight prompts by one pair and behind on one by all its nine: the accuracy is lower.
    assert verdict([1] * 8 + [0] * 9, [0] * 8 + [1] * 9, [*"abcdefgh", *"i" * 9]) == (8, 1, 20 / 512, False)
    assert verdict([0] * 8 + [1] * 9, [1] * 8 + [0] * 9, [*"abcdefgh", *"i" * 9]) == (1, 8, 20 / 512, False)
    found = against_baseline([1, 0, 1, 1], [1, 0, 0.5, 1], list("abcd"))
    assert found["accuracy"] == accuracy_of([1, 0, 0.5, 1], list("abcd"))


def test_wins_and_baselines():
    pairs = [
        pair(answer(2.0, tokens=3, text="가나 ok"), answer(1.0, tokens=5, text="가나")),
        pair(answer(1.0, tokens=4, text="가 12!"), answer(1.5, tokens=4, text="no")),
        pair(answer(1.0, tokens=9, text="다."), answer(1.0, tokens=2, text="다라 마")),
    ]
    assert wins(pairs) == [1, 0, 0.5]
    assert {name: wins(pairs, worth) for name, worth in BASELINES.items()} == {
        "longer answer wins": [0, 0.5, 1],
        "shorter answer wins": [1, 0.5, 0],
        "more Hangul wins": [0, 1, 0.5],
    }
    shares = [BASELINES["more Hangul wins"](answer(text=text)) for text in ("가나 ok", "가 12!", "no", "…12", "ㅋㅋ")]
    assert shares == [0.5, 1, 0, 0, 1]


def test_kinds_of_pairs():
    assert [pair_kind(*ranks, 3) for ranks in ((0, 1), (1, 2), (0, 2))] == ["best–middle", "middle–worst", "best–worst"]
    assert pair_kind(0, 1, 2) == "pair"
    assert pair_kind(1, 3, 5) == "2–4 of 5"
    gaps = [-40, -33, -32, -9, -8, -1, 0, 1, 8, 9, 32, 33, 400]
    assert [gap_kind(gap) for gap in gaps] == [
        *["shorter by 33 or more"] * 2,
        *["shorter by 9–32"] * 2,
        *["shorter by 1–8"] * 2,
        "same length",
        *["longer by 1–8"] * 2,
        *["longer by 9–32"] * 2,
        *["longer by 33 or more"] * 2,
    ]


def test_expected_calibration_error():
    def margin(confidence):
        return math.log(confidence / (1 - confidence))

    # Bins: 0.72 right and 0.74 wrong; 0.93 right; 0.97 right; a draw at 0.5. ECE = (2·|½ − 0.73| + 0.07 + 0.03 + 0)/5.
    found = expected_calibration_error([margin(0.72), -margin(0.74), margin(0.93), margin(0.97), 0.0])
    assert found["error"] == pytest.approx((2 * 0.23 + 0.07 + 0.03) / 5)
    assert [(b["pairs"], b["accuracy"]) for b in found["bins"]] == [(1, 0.5), (2, 0.5), (1, 1), (1, 1)]
    assert [b[key] for b in found["bins"] for key in ("low", "confidence", "high")] == pytest.approx(
        [0.5, 0.5, 0.55, 0.7, 0.73, 0.75, 0.9, 0.93, 0.95, 0.95, 0.97, 1]
    )
    assert expected_calibration_error([1000.0, 2000.0]) == {
        "error": 0,
        "bins": [{"low": 0.95, "high": 1, "pairs": 2, "confidence": 1, "accuracy": 1}],
    }
    assert expected_calibration_error([-1000.0])["error"] == 1
    rng = random.Random(0)
    margins = [rng.uniform(0, 4) for _ in range(20_000)]
    calibrated = [m if rng.random() < 1 / (1 + math.exp(-m)) else -m for m in margins]
    assert expected_calibration_error(calibrated)["error"] < 0.015
    assert expected_calibration_error([3 * m for m in calibrated])["error"] > 0.08  # too sure


def test_agreement():
    def scored(*scores):
        return [("가", [answer(score, rank, text=str(rank)) for rank, score in enumerate(scores)])]

    # Of three pairs the first is turned round: 2 > 1, 2 > 0 and 1 > 0 become 2 < 2.5, 2 > 0.25 and 2.5 > 0.25.
    found = agreement(scored(2.0, 1.0, 0.0), scored(2.0, 2.5, 0.25))
    assert found == {"same_order": 2 / 3, "mean_difference": (1.5 + 0.25) / 3, "max_difference": 1.5}
    assert agreement(scored(1.0, 0.0), scored(1.0, 1.0))["same_order"] == 0  # a draw is an order of its own
    assert agreement(scored(0.0, 1.0), scored(1.0, 1.0))["same_order"] == 0


def test_evaluate():
    rankings = [
        ("가", [answer(3.0, 0, 5, "a"), answer(4.0, 1, 50, "b"), answer(1.0, 2, 5, "c")]),
        ("나", [answer(1.0, 0, 9, "a"), answer(0.0, 1, 8, "b"), answer(2.0, 1, 1, "c")]),  # a tie
        ("나", [answer(1.0, 0, 9, "a"), answer(0.0, 1, 8, "b")]),  # scored already, and a pair of that prompt
    ]
    found = evaluate(rankings)
    assert found["answers"] == 6
    assert [found["accuracy"][key] for key in ("pairs", "prompts", "accuracy")] == [6, 2, 4 / 6]
    assert {kind: (part["pairs"], part["accuracy"]) for kind, part in found["by_kind"].items()} == {
        "pair": (3, 2 / 3),
        "best–middle": (1, 0),
        "middle–worst": (1, 1),
        "best–worst": (1, 1),
    }
    assert list(found["by_kind"])[1:] == ["best–middle", "middle–worst", "best–worst"]
    assert [(gap, part["pairs"], part["accuracy"]) for gap, part in found["by_length_gap"].items()] == [
        ("shorter by 33 or more", 1, 0),
        ("same length", 1, 1),
        ("longer by 1–8", 3, 2 / 3),
        ("longer by 33 or more", 1, 1),
    ]
    assert found["baselines"]["longer answer wins"]["accuracy"]["accuracy"] == 4.5 / 6
    assert found["calibration"] == expected_calibration_error([-1.0, 2.0, 3.0, 1.0, -1.0, 1.0])
    assert found["scores_by_rank"][0] == pytest.approx(
        {"answers": 3, "mean": 5 / 3, "std": math.sqrt(8 / 9), "min": 1, "max": 3}
    )
    assert [scores["answers"] for scores in found["scores_by_rank"].values()] == [3, 4, 1]


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off_on_a_terminal(width):
    rng = random.Random(0)
    rankings = [
        (str(i), [answer(100 * rng.gauss(-rank, 1), rank, rng.randint(2, 60), str(rank)) for rank in range(3)])
        for i in range(2000)
    ]
    console = Console(width=width, file=io.StringIO(), record=True)
    int8 = {"int8": {"same_order": 1, "mean_difference": 0.0123, "max_difference": 12.3456}}
    print_evaluation(evaluate(rankings), int8, console)
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    table = [line.split("  ") for line in lines]
    assert "6,000 pairs of 6,000 answers to 2,000 prompts" in lines[0]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in table if len(row) > 1}
    assert rows["all pairs"] == ["pairs", "right", "95 % interval", "beaten"]
    assert [len(rows[name]) for name in ("the model", "longer answer wins", "more Hangul wins")] == [3, 4, 4]
    assert rows["longer answer wins"][-1] == "yes, p < 0.001"
    assert rows["shorter by 33 or more"][0].isdigit()
    assert len(rows["0, the best"]) == 5
    assert rows["int8"] == ["100.0%", "0.0123", "12.3456"]
