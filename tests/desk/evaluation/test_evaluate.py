"""A reward model's scores, and the metrics of them, against values worked out by hand."""

import io
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

from kochat_trl.desk.evaluation import scoring, view
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
from kochat_trl.desk.evaluation.scoring import Reading, read_rankings, score_rankings
from kochat_trl.desk.evaluation.view import print_evaluation
from kochat_trl.errors import UserError
from kochat_trl.files import new_file
from kochat_trl.models.loading import load_reward_model
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import load_scorer, score_dialogues, score_ids
from kochat_trl.rows.encode import conversation, encode_dialogue, encode_prompt
from kochat_trl.rows.rows import build_dataset
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.keys import DataArguments, ModelArguments
from kochat_trl.statistics import effective_size, wilson_interval
from tests.tiny import PAIRS

import pytest
import torch
from rich.console import Console
from transformers import BloomConfig

DIALOGUES = [conversation(prompt, answer) for prompt, _, _ in PAIRS[::2] for _, *answers in PAIRS for answer in answers]


def answer(score=0.0, rank=0, tokens=1, text="가"):
    return ScoredAnswer(text, rank, tokens, score)


def pair(better, worse, prompt="가", ranks=2):
    return ScoredPair(prompt, better, worse, ranks)


# --- Scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loading", ["float32", "int8"])
def test_scores_depend_neither_on_the_batch_nor_on_padding(tiny_reward, loading):
    tokenizer = load_tokenizer(tiny_reward)
    model = load_scorer(tiny_reward, loading, tokenizer)
    expected = score_dialogues(model, tokenizer, DIALOGUES, batch_size=1)
    assert max(expected) - min(expected) > 1

    padding = []

    def poison(module, args, kwargs):
        hidden = kwargs["attention_mask"] == 0
        padding.append(int(hidden.sum()))
        return (args[0].masked_fill(hidden, 77), *args[1:]), kwargs

    hook = model.base_model.model.transformer.register_forward_pre_hook(poison, with_kwargs=True)
    for batch_size in (3, 64):
        assert score_dialogues(model, tokenizer, DIALOGUES, batch_size) == pytest.approx(expected, abs=1e-5)
    hook.remove()
    assert sum(padding) > 50
    shuffled = random.Random(0).sample(DIALOGUES, len(DIALOGUES))
    alike = dict(zip(map(str, DIALOGUES), expected, strict=True))
    assert score_dialogues(model, tokenizer, shuffled) == pytest.approx([alike[str(d)] for d in shuffled], abs=1e-5)


@pytest.mark.parametrize("answer", ["도쿄입니다.", "<pad>", "서울<pad><pad>", "서울</s>", "</s> 서울", "<pad></s>"])
def test_the_score_is_read_at_the_end_of_the_answer(tiny_reward, answer):
    tokenizer = load_tokenizer(tiny_reward)
    model = load_reward_model(tiny_reward, ModelArguments(dtype="float32"), tokenizer)
    dialogue = conversation("일본의 수도는 어디인가요?", answer)
    ids = encode_dialogue(tokenizer, dialogue)[0]
    assert ids[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        states = model.base_model.model.transformer(torch.tensor([ids])).last_hidden_state[0]  # (length, width)
        by_hand = states @ model.base_model.model.score.modules_to_save["default"].weight[0]
    others = [conversation("반가워요", "네"), conversation("높다의 반대말은 뭐야?", "높다의 반대말은 낮다입니다. " * 3)]
    assert score_dialogues(model, tokenizer, [others[0], dialogue, others[1]])[1] == pytest.approx(
        by_hand[-1].item(), abs=1e-4
    )
    assert by_hand[-2].item() != pytest.approx(by_hand[-1].item(), abs=1e-2)


def test_where_padding_is_the_end_token_the_score_is_read_before_it(tiny_reward):
    tokenizer = load_tokenizer(tiny_reward)
    tokenizer.pad_token = tokenizer.eos_token
    model = load_reward_model(tiny_reward, ModelArguments(dtype="float32"), tokenizer)
    ids = encode_dialogue(tokenizer, DIALOGUES[0])[0]
    cut = score_ids(model, tokenizer, [ids[:-1]])[0]
    assert score_dialogues(model, tokenizer, DIALOGUES[:1])[0] == pytest.approx(cut, abs=1e-4)


def test_a_merged_reward_model_scores_as_its_adapter(tiny_reward, tmp_path):
    merge_adapter(tiny_reward, tmp_path / "merged")
    tokenizer = load_tokenizer(tiny_reward)
    one, other = (
        score_dialogues(load_scorer(path, "float32", tokenizer), tokenizer, DIALOGUES)
        for path in (tiny_reward, str(tmp_path / "merged"))
    )
    assert one == pytest.approx(other, abs=1e-4)


def test_what_can_not_be_scored_is_refused(tiny_reward):
    tokenizer = load_tokenizer(tiny_reward)
    model = load_scorer(tiny_reward, "float32", tokenizer)
    with pytest.raises(UserError, match=r"1 of 2 texts are longer than the 128 tokens .*--max-length 128"):
        score_ids(model, tokenizer, [[5] * 128, [5] * 129])
    model.base_model.model.score.modules_to_save["default"].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="the scores of 2 of 2 texts are not finite"):
        score_ids(model, tokenizer, [[5], [6]])


def test_an_answer_is_scored_once_and_an_unranked_one_not_at_all(tiny_reward, write, monkeypatch):
    seen = []

    def length(model, tokenizer, ids, batch_size):
        seen.extend(ids)
        return [float(len(row)) for row in ids]

    monkeypatch.setattr(scoring, "score_ids", length)
    records = [{"prompt": "가", "completion_0": "나", "completion_1": "다", "completion_2": "라", "ranking": [2, 0]}]
    records += [{"prompt": "가", "chosen": "다 라", "rejected": "라"}]
    rankings, _ = read_rankings(tiny_reward, [write("a.json", json.dumps(records))])
    scored = score_rankings(tiny_reward, rankings)
    assert len(seen) == 3
    assert [(prompt, [(a.text, a.rank) for a in answers]) for prompt, answers in scored] == [
        ("가", [("라", 0), ("나", 1)]),
        ("가", [("다 라", 0), ("라", 1)]),
    ]
    tokenizer = load_tokenizer(tiny_reward)
    for text, a in (("나", scored[0][1][1]), ("다 라", scored[1][1][0])):
        ids, labels = encode_dialogue(tokenizer, conversation("가", text))
        assert (a.score, a.tokens) == (len(ids), sum(label != -100 for label in labels))


# --- Metrics ------------------------------------------------------------------------------------


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


# --- Commands -----------------------------------------------------------------------------------


@pytest.fixture
def kochat(kochat):
    """Run `kochat reward …`."""
    return partial(kochat, "reward")


@pytest.fixture
def pretend(monkeypatch):
    """Replace every reward model by one that scores a row of ids as a function of the ids says."""

    class Scorer:
        config = BloomConfig()  # without a limit of positions
        device = "cpu"

        def __init__(self, score):
            self.score = score

        def eval(self):
            pass

        def __call__(self, input_ids, attention_mask, use_cache=False):
            rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
            return SimpleNamespace(logits=torch.tensor([[float(self.score(row))] for row in rows]))

    return lambda score: monkeypatch.setattr(scoring, "load_scorer", lambda *_: Scorer(score))


@pytest.fixture
def held_out(write):
    """Twelve pairs; the better answer is the longer one in six of them."""
    texts = [("서울", "서울 서울 서울"), ("반가워요 반가워요", "반가")] * 6
    records = [{"prompt": f"하나 {i}", "chosen": good, "rejected": bad} for i, (good, bad) in enumerate(texts)]
    return write("held_out.jsonl", json.dumps(records, ensure_ascii=False))


def test_eval_warns_of_a_model_that_is_a_baseline(kochat, pretend, held_out, tiny_reward, tmp_path):
    pretend(len)
    code, printed = kochat("eval", tiny_reward, held_out, "--output", tmp_path / "length")
    assert code == 0, printed
    printed = " ".join(printed.split())
    assert "WARNING: not shown to beat 'longer answer wins': better on 0 of 12 prompts, worse on 0, p = 1." in printed
    assert printed.count("WARNING") == 3

    tokenizer = load_tokenizer(tiny_reward)
    records = json.loads(Path(held_out).read_text(encoding="utf-8"))
    good = [encode_dialogue(tokenizer, conversation(r["prompt"], r["chosen"]))[0] for r in records]
    pretend(lambda ids: ids in good)
    code, printed = kochat("eval", tiny_reward, held_out, "--output", tmp_path / "right")
    assert code == 0
    assert "WARNING" not in printed
    assert printed.count("yes, p = ") + printed.count("yes, p < ") == 3
    report = json.loads((tmp_path / "right/evaluation.json").read_text(encoding="utf-8"))
    assert report["accuracy"]["accuracy"] == 1
    assert report["accuracy"]["interval"] == pytest.approx(wilson_interval(12, 12))
    longer = report["baselines"]["longer answer wins"]
    assert (longer["accuracy"]["accuracy"], longer["ahead"], longer["behind"], longer["p"]) == (0.5, 6, 0, 2 / 64)


def test_eval_writes_what_it_found_and_overwrites_nothing(kochat, kochatgpt_files, tiny_reward, tmp_path):
    command = ("eval", tiny_reward, kochatgpt_files["reward"], "--output", tmp_path / "new/folder")
    code, printed = kochat(*command, "--compare-quantized", "--load-in-8bit")
    assert code == 0, printed
    image = (tmp_path / "new/folder/reliability.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 10_000
    report = json.loads((tmp_path / "new/folder/evaluation.json").read_text(encoding="utf-8"))
    assert report["model"] == tiny_reward
    assert (report["files"], report["loading"], report["answers"]) == ([kochatgpt_files["reward"]], "int8", 18)
    assert (report["accuracy"]["pairs"], report["accuracy"]["prompts"]) == (18, 6)
    assert list(report["by_kind"]) == ["best–middle", "middle–worst", "best–worst"]
    assert list(report["scores_by_rank"]) == ["0", "1", "2"]
    assert sum(b["pairs"] for b in report["calibration"]["bins"]) == 18
    assert list(report["against_float32"]) == ["int8", "nf4"]
    int8, nf4 = report["against_float32"].values()
    assert 0 < int8["mean_difference"] < nf4["mean_difference"] < nf4["max_difference"] < 10
    assert 0.5 < int8["same_order"] <= 1

    code, printed = kochat(*command)
    assert code == 1
    assert "evaluation.json exists already" in printed
    (tmp_path / "new/folder/evaluation.json").unlink()
    code, printed = kochat(*command)
    assert code == 1
    assert "reliability.png exists already" in printed
    assert (tmp_path / "new/folder/reliability.png").read_bytes() == image


def test_eval_reads_rankings_as_told(kochat, pretend, write, tiny_reward, tmp_path):
    pretend(len)
    record = {"prompt": "가", "completion_0": "나", "completion_1": "다 다 다", "completion_2": "라 라"}
    path = write("rm.jsonl", json.dumps([record | {"ranking": [1, 2, 0]}, {"prompt": "나"}]))
    code, printed = kochat("eval", tiny_reward, path, "--output", tmp_path / "a")
    assert code == 1
    assert "1 of 2 records can't be used" in printed
    for order, right in (("best_first", 1.0), ("rank_of", 1 / 3)):
        options = ("--ranking-order", order, "--invalid-records", "skip", "--output", tmp_path / order)
        code, printed = kochat("eval", tiny_reward, path, *options)
        assert code == 0
        assert "left out: " in printed
        report = json.loads((tmp_path / order / "evaluation.json").read_text(encoding="utf-8"))
        assert (report["accuracy"]["accuracy"], report["records_left_out"]) == (right, 1)
    code, printed = kochat("eval", tiny_reward, write("b.jsonl", '[{"prompt": "나"}]'), *options[:4], "--output", "c")
    assert code == 1
    assert "there is nothing to score in " in printed


@pytest.fixture
def long(write):
    """Rankings of best, middle and worst: none is long; the middle one is; two are, of which a cut leaves one text."""
    record = {"prompt": "가", "completion_0": "나", "completion_1": "다 다", "completion_2": "라 라 라"}
    record["ranking"] = [2, 1, 0]
    records = [record, record | {"completion_1": "다 " * 90}]
    records.append({"prompt": "나", "chosen": "라 " * 90, "rejected": "라 " * 91})
    return write("long.jsonl", json.dumps(records, ensure_ascii=False))


def test_eval_refuses_cuts_or_leaves_out_what_is_too_long(kochat, long, tiny_reward, tmp_path):
    def evaluated(*options):
        code, printed = kochat("eval", tiny_reward, long, "--output", tmp_path / "-".join(("x", *options)), *options)
        file = tmp_path / "-".join(("x", *options)) / "evaluation.json"
        return code, printed, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    code, printed, found = evaluated()
    assert (code, found) == (1, None)
    assert "2 of 3 records can't be used" in printed
    assert "expected at most 128 tokens" in printed
    assert "`--overlong drop`" in printed

    for how, by_kind in (("drop", {"pair": 1, "best–middle": 1}), ("truncate", {"best–middle": 2})):
        code, printed, found = evaluated("--overlong", how)
        assert code == 0, printed
        assert (found["overlong"], found["max_length"]) == (how, None)
        assert (found["records_left_out"], found["records_in_part"]) == (1, 1)
        lines = [line.split(": ")[0] for line in printed.splitlines() if "at most 128 tokens" in line]
        assert lines == ["left out", "kept in part"]
        assert {name: found["by_kind"][name]["pairs"] for name in by_kind} == by_kind

    code, printed, found = evaluated("--max-length", "20", "--overlong", "truncate")
    assert "at most 20 tokens" in printed
    assert found["max_length"] == 20
    code, printed, _ = evaluated("--max-length", "3", "--overlong", "drop")
    assert code == 1
    assert "no text fits 3 tokens" in printed


def test_a_cut_is_the_one_of_training(long, tiny_reward, tiny_tokenizer):
    for overlong in ("truncate", "drop"):
        texts, report = read_rankings(tiny_reward, [long], Reading(overlong=overlong))
        rows, trained = build_dataset([long], "reward", tiny_tokenizer, 128, DataArguments(overlong=overlong))
        assert [[text.ids for text in group] for group in texts] == rows["completion_ids"]
        assert [[text.row["rank"] for text in group] for group in texts] == rows["ranks"]
        assert str(report) == str(trained)
    (_, texts), _ = read_rankings(tiny_reward, [long], Reading(overlong="truncate"))
    assert [len(text.ids) for text in texts if text.row["completion"].startswith("다")] == [128]
    assert [text.tokens for text in texts][1] == 128 - len(encode_prompt(tiny_tokenizer, "가"))


def test_score_refuses_cuts_or_leaves_out_what_is_too_long(kochat, long, tiny_reward, tmp_path):
    def scored(*options):
        out = tmp_path / "-".join(("x", *options))
        code, printed = kochat("score", tiny_reward, long, "--output", out, *options)
        return code, printed, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None

    code, printed, rows = scored()
    assert (code, rows) == (1, None)
    assert "3 of 8 records can't be used" in printed
    code, printed, rows = scored("--overlong", "drop")
    assert (code, printed.count("left out: "), len(rows)) == (0, 3, 5)
    code, printed, rows = scored("--overlong", "truncate")
    assert (code, printed.count("kept in part: "), len(rows)) == (0, 3, 8)
    assert rows[6]["score"] == rows[7]["score"]  # a cut has made them one text
    assert rows[4]["completion"] == "다 " * 90


def test_an_evaluations_figures_are_written_last(kochat, pretend, held_out, tiny_reward, tmp_path, monkeypatch):
    """They say that it is finished."""
    pretend(len)

    def last(path):
        assert (tmp_path / "out/reliability.png").stat().st_size > 10_000
        return new_file(path)

    monkeypatch.setattr(view, "new_file", last)
    code, printed = kochat("eval", tiny_reward, held_out, "--output", tmp_path / "out")
    assert code == 0, printed
    assert (tmp_path / "out/evaluation.json").is_file()


def test_eval_says_where_it_writes(kochat, pretend, held_out, tmp_path, tiny_reward):
    code, printed = kochat("eval", "someone/reward", held_out)
    assert code == 1
    assert "someone/reward is not a local folder: say with --output where to write" in printed
    pretend(len)
    shutil.copytree(tiny_reward, tmp_path / "reward")
    code, printed = kochat("eval", tmp_path / "reward", held_out)
    assert code == 0, printed
    assert f"Written to {tmp_path}/reward/evaluation: evaluation.json and reliability.png." in printed
    assert len(list((tmp_path / "reward/evaluation").iterdir())) == 2


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


def test_score_writes_a_row_for_each_answer(kochat, write, tiny_reward, tmp_path):
    tokenizer = load_tokenizer(tiny_reward)
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "가나다라", strict=True)]
    records = [
        {"prompt": "반가워요", "completion": "저도 반가워요."},
        {"prompt": "가", "completion_0": "나", "completion_1": "다", "completion_2": "라", "ranking": [2, 0]},
        {"instruction": "가", "output": "나"},
        {"messages": turns},
        {"prompt": "가", "chosen": "라", "rejected": "다"},
    ]
    path = write("mixed.jsonl", json.dumps(records, ensure_ascii=False))
    code, printed = kochat("score", tiny_reward, path, "--output", tmp_path / "out.jsonl", "--batch-size", 2)
    assert code == 0, printed
    assert f"8 scores, written to {tmp_path / 'out.jsonl'}" in printed
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.pop("score") for row in rows] == pytest.approx(
        score_dialogues(
            load_scorer(tiny_reward, "float32", tokenizer),
            tokenizer,
            [
                *(conversation(row["prompt"], row["completion"]) for row in rows[:5]),
                turns,
                *(conversation(row["prompt"], row["completion"]) for row in rows[6:]),
            ],
        ),
        abs=1e-5,
    )
    assert rows == [
        {"prompt": "반가워요", "completion": "저도 반가워요."},
        {"prompt": "가", "completion": "나", "rank": 1},
        {"prompt": "가", "completion": "다", "rank": None},
        {"prompt": "가", "completion": "라", "rank": 0},
        {"prompt": "가", "completion": "나"},
        {"messages": turns},
        {"prompt": "가", "completion": "라", "rank": 0},
        {"prompt": "가", "completion": "다", "rank": 1},
    ]
    code, printed = kochat("score", tiny_reward, path, "--output", tmp_path / "out.jsonl")
    assert code == 1
    assert "exists already" in printed


def test_score_loads_as_told(kochat, kochatgpt_files, tiny_reward, tmp_path):
    def scores(name, *options):
        code, printed = kochat("score", tiny_reward, kochatgpt_files["sft"], "--output", tmp_path / name, *options)
        assert code == 0, printed
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["score"] for line in lines]

    exact, int8, nf4 = scores("a"), scores("b", "--load-in-8bit"), scores("c", "--load-in-4bit")
    tokenizer = load_tokenizer(tiny_reward)
    dialogues = [conversation(prompt, good) for prompt, good, _ in PAIRS]
    for found, loading in ((exact, "float32"), (int8, "int8"), (nf4, "nf4")):
        model = load_scorer(tiny_reward, loading, tokenizer)
        assert found == pytest.approx(score_dialogues(model, tokenizer, dialogues), abs=1e-5)
    assert exact != pytest.approx(int8, abs=1e-4)
    assert int8 != pytest.approx(nf4, abs=1e-4)
