"""A reward model's scores, and the commands that evaluate one and score with it."""

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from kochat_trl.data.records import conversation
from kochat_trl.desk.evaluation import scoring, view
from kochat_trl.desk.evaluation.metrics import ScoredAnswer
from kochat_trl.desk.evaluation.scoring import read_rankings, score_rankings
from kochat_trl.desk.statistics import wilson_interval
from kochat_trl.errors import UserError
from kochat_trl.files import new_file
from kochat_trl.models.loading import load_reward_model
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import load_scorer, score_dialogues, score_ids
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.rows.rows import build_dataset
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.keys import DataArguments, ModelArguments
from tests.tiny import PAIRS

import pytest
import torch
from transformers import BloomConfig

DIALOGUES = [conversation(prompt, answer) for prompt, _, _ in PAIRS[::2] for _, *answers in PAIRS for answer in answers]


def answer(score=0.0, rank=0, tokens=1, text="가"):
    return ScoredAnswer(text, rank, tokens, score)


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
        return args, kwargs | {"input_ids": kwargs["input_ids"].masked_fill(hidden, 77)}

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


def test_where_padding_is_the_end_token_the_score_is_read_at_it_too(tiny_reward):
    tokenizer = load_tokenizer(tiny_reward)
    expected = score_dialogues(load_scorer(tiny_reward, "float32", tokenizer), tokenizer, DIALOGUES)
    tokenizer.pad_token = tokenizer.eos_token
    model = load_scorer(tiny_reward, "float32", tokenizer)
    assert score_dialogues(model, tokenizer, DIALOGUES) == pytest.approx(expected, abs=1e-5)
    cut = score_ids(model, tokenizer, [encode_dialogue(tokenizer, DIALOGUES[0])[0][:-1]])[0]
    assert cut != pytest.approx(expected[0], abs=1e-2)


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
        texts, report = read_rankings(tiny_reward, [long], DataArguments(overlong=overlong))
        rows, trained = build_dataset([long], "reward", tiny_tokenizer, 128, DataArguments(overlong=overlong))
        assert [[text.ids for text in group] for group in texts] == rows["completion_ids"]
        assert [[text.row["rank"] for text in group] for group in texts] == rows["ranks"]
        assert str(report) == str(trained)
    (_, texts), _ = read_rankings(tiny_reward, [long], DataArguments(overlong="truncate"))
    assert [len(text.ids) for text in texts if text.row["completion"].startswith("다")] == [128]
    assert [text.tokens for text in texts][1] == 128 - len(encode_prompt(tiny_tokenizer, conversation("가")))


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


def test_system_messages_are_scored_and_written(kochat, write, tiny_reward, tmp_path):
    tokenizer, system = load_tokenizer(tiny_reward), {"system": "존댓말로 답해."}
    pair = {"prompt": "가", "chosen": "나", "rejected": "다"}
    turns = list(conversation(*"가나다라", system="존댓말로 답해."))
    path = write("a.jsonl", json.dumps([{"prompt": "가", "completion": "나"} | system, pair | system, pair]))
    out, long = tmp_path / "out.jsonl", write("b.jsonl", json.dumps([{"messages": turns}]))
    assert kochat("score", tiny_reward, path, "--output", out)[0] == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    scores = [row.pop("score") for row in rows]
    answers = [{"prompt": "가"} | fields for fields in ({"completion": "나"}, {"completion": "다"})]
    ranked = [answer | {"rank": rank} for rank, answer in enumerate(answers)]
    assert rows == [answers[0] | system, *(row | system for row in ranked), *ranked]
    dialogues = [conversation("가", row["completion"], system=row.get("system")) for row in rows]
    model = load_scorer(tiny_reward, "float32", tokenizer)
    assert scores == pytest.approx(score_dialogues(model, tokenizer, dialogues), abs=1e-5)
    assert scores[0] == scores[1] != pytest.approx(scores[3], abs=1e-4)
    assert kochat("score", tiny_reward, long, "--output", tmp_path / "long.jsonl")[0] == 0
    assert json.loads((tmp_path / "long.jsonl").read_text(encoding="utf-8"))["messages"] == turns
    texts, _ = read_rankings(tiny_reward, [write("c.jsonl", json.dumps([pair | system]))])
    assert [text.ids for text in texts[0]] == [encode_dialogue(tokenizer, d)[0] for d in dialogues[1:3]]


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
