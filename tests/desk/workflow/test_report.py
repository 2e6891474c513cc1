"""What the report says, from adapters drawn at random; and its page, in a browser where there is one."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

from kochat_trl.data.probes import PROBES
from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import Response, decoding, generate_answers, mean_logprob
from kochat_trl.desk.sample.sample import Judge, make_questions, write_sample_data
from kochat_trl.desk.statistics import mean_interval, wilson_interval
from kochat_trl.desk.workflow import page
from kochat_trl.desk.workflow.page import render_page, write_report
from kochat_trl.desk.workflow.report import Run, build_report, named_runs, read_questions, worries
from kochat_trl.errors import UserError
from kochat_trl.files import new_file
from kochat_trl.models.loading import add_lora, load_causal_lm, load_policy
from kochat_trl.reward.score import load_scorer, score_ids
from kochat_trl.rows.encode import encode_prompt
from kochat_trl.settings.keys import ModelArguments

import pytest
import torch
import yaml

FOUR = [prompt for prompt, _ in PROBES]
MODELS = ("base", "sft", "ppo")
HISTORY = {
    "sft": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}],
    "reward": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}, {"step": 2, "eval_accuracy": 0.9}],
    "ppo": [{"step": i, "objective/scores": i / 2, "objective/kl": float(i)} for i in range(3)],
}


@pytest.fixture(scope="module")
def run(tiny_base, tiny_tokenizer, tiny_reward, kochatgpt_files, tmp_path_factory):
    """The folders of SFT, reward model and PPO."""
    folder = tmp_path_factory.mktemp("run")
    args = ModelArguments(use_peft=True, lora_r=4, dtype="float32")
    for seed, name in enumerate(("sft", "ppo")):
        model = add_lora(load_causal_lm(tiny_base, args, tiny_tokenizer), args)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    shutil.copytree(tiny_reward, folder / "reward")
    settings = {
        "sft": {"model_name_or_path": tiny_base, "eval_files": [kochatgpt_files["sft"]]},
        "reward": {"model_name_or_path": tiny_base},
        "ppo": {"sft_model_path": str(folder / "sft"), "reward_model_path": str(folder / "reward")}
        | {"response_length": 6, "temperature": 1.0, "kl_target": None, "eval_files": []}
        | {"train_files": [kochatgpt_files["ppo"]]},
    }
    for name, values in settings.items():
        (folder / name / "resolved.yaml").write_text(yaml.safe_dump(values))
        (folder / name / "metrics.json").write_text(json.dumps({"history": HISTORY[name]}))
    return folder


@pytest.fixture(scope="module")
def report(run):
    return build_report([run / "ppo"], seed=1)


def test_it_asks_what_sft_held_out_after_the_courses_four(run, report, kochatgpt_files):
    records = json.loads(Path(kochatgpt_files["sft"]).read_text(encoding="utf-8-sig"))
    expected = dict.fromkeys([*FOUR, *(record["prompt"] for record in records)])
    assert [row["prompt"] for row in report["answers"]] == list(expected)
    references = {record["prompt"]: record["completion"] for record in records}
    assert {row["prompt"]: row["reference"] for row in report["answers"] if row["reference"]} == references
    assert report["held_out"]
    assert report["prompts"] == len(expected) - len(FOUR)
    assert "judge" not in report["metrics"]["ppo"]


def test_other_prompts(run, tmp_path, write):
    found, asked = [Run.of(run / "ppo")], [Prompt(text) for text in (*FOUR, "하나")]
    file = write("p.jsonl", json.dumps([{"prompt": "하나"}, {"prompt": ""}, {"prompt": "둘"}, {"prompt": "하나"}]))
    assert read_questions(found, file) == ([*asked, Prompt("둘")], {}, True, None)
    assert not read_questions(found, found[0].settings["train_files"][0])[2]  # whoever names it
    assert read_questions(found, file, limit=1)[0] == asked
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    for name, changes in {"sft": {"eval_files": []}, "ppo": {"sft_model_path": str(copied / "sft")}}.items():
        path = copied / name / "resolved.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    prompts, _, held_out, _ = read_questions([Run.of(copied / "ppo")], None)
    assert len(prompts) > len(FOUR)
    assert not held_out


def test_a_prompt_is_asked_with_its_system_message(run, write, tiny_base, tiny_tokenizer):
    """One text under two system messages is two prompts; each has its own reference."""
    polite = {"system": "존댓말로 답해."}
    records = [{"prompt": "하나", "completion": "둘"}, {"prompt": "하나", "completion": "셋"} | polite]
    file = write("p.jsonl", json.dumps(records))
    prompts, references, *_ = read_questions([Run.of(run / "ppo")], file)
    asked = [Prompt("하나"), Prompt("하나", "존댓말로 답해.")]
    assert (prompts[len(FOUR) :], references) == (asked, dict(zip(asked, ["둘", "셋"], strict=True)))
    report = build_report([run / "ppo"], file, seed=1)
    model = load_policy(tiny_base, ModelArguments(dtype="float32"), tiny_tokenizer)
    answers = generate_answers(model, tiny_tokenizer, prompts, decoding("sample", ["max_new_tokens=6"]), seed=1)
    assert [row["base"]["text"] for row in report["answers"]] == [answer.text for answer in answers]
    shown = [{key: row[key] for key in row if key in ("prompt", "system", "reference")} for row in report["answers"]]
    assert shown[len(FOUR) :] == [p.fields | {"reference": r} for p, r in references.items()]


def test_answers_scores_and_wins(run, report, tiny_base, tiny_tokenizer):
    prompts = [Prompt(row["prompt"]) for row in report["answers"]]
    settings = decoding("sample", ["max_new_tokens=6"])
    scorer = load_scorer(str(run / "reward"), "float32", tiny_tokenizer)
    for name, path in {"base": tiny_base, "sft": str(run / "sft"), "ppo": str(run / "ppo")}.items():
        model = load_policy(path, ModelArguments(dtype="float32"), tiny_tokenizer)
        answers = generate_answers(model, tiny_tokenizer, prompts, settings, seed=1)
        ids = [[*encode_prompt(tiny_tokenizer, p.messages), *a.ids] for p, a in zip(prompts, answers, strict=True)]
        for row, answer, score in zip(report["answers"], answers, score_ids(scorer, tiny_tokenizer, ids), strict=True):
            assert (row[name]["text"], row[name]["tokens"]) == (answer.text, len(answer.ids))
            assert row[name]["score"] == pytest.approx(score, abs=1e-6)
        scores = [row[name]["score"] for row in report["answers"][len(FOUR) :]]
        assert report["metrics"][name]["score"] == pytest.approx(sum(scores) / len(scores))
    gaps = [row["ppo"]["score"] - row["sft"]["score"] for row in report["answers"][len(FOUR) :]]
    better = [0.5 if gap == 0 else float(gap > 0) for gap in gaps]
    assert {0.0, 1.0} <= set(better)
    win = report["wins"]["ppo over sft"]
    assert win["share"] == pytest.approx(sum(better) / len(better))
    assert (win["low"], win["high"]) == pytest.approx(wilson_interval(sum(better), len(better)))


def test_kl(run, report, tiny_tokenizer):
    """The mean, over PPO's answers, of log π − log π_ref of the whole answer."""
    prompts = [Prompt(row["prompt"]) for row in report["answers"]]
    models = {n: load_policy(str(run / n), ModelArguments(dtype="float32"), tiny_tokenizer) for n in ("ppo", "sft")}
    answers = generate_answers(models["ppo"], tiny_tokenizer, prompts, decoding("sample", ["max_new_tokens=6"]), seed=1)
    total = 0.0
    for prompt, answer in list(zip(prompts, answers, strict=True))[len(FOUR) :]:
        ids = encode_prompt(tiny_tokenizer, prompt.messages)
        for name, sign in (("ppo", 1), ("sft", -1)):
            with torch.no_grad():
                logits = models[name].eval()(input_ids=torch.tensor([[*ids, *answer.ids]])).logits[0].double()
            for i, token in enumerate(answer.ids):
                total += sign * logits[len(ids) - 1 + i].log_softmax(-1)[token].item()
    kl = report["kl"]["ppo"]
    assert kl["mean"] == pytest.approx(total / (len(prompts) - len(FOUR)), abs=1e-4)
    assert kl["low"] < kl["mean"] < kl["high"]


def test_kl_is_at_the_runs_temperature(run, tiny_tokenizer):
    model = load_policy(str(run / "ppo"), ModelArguments(dtype="float32"), tiny_tokenizer)
    ids, answer = encode_prompt(tiny_tokenizer, Prompt("반가워요").messages), Response("", (40, 41), True)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*ids, 40, 41]])).logits[0, -3:-1].double() / 0.5
        expected = logits.log_softmax(-1)[[0, 1], [40, 41]].mean().item()
        assert mean_logprob(model, ids, answer, 0.5) == pytest.approx(expected, abs=1e-5)


def test_the_judge_of_sample_data(run, tmp_path, report):
    files = write_sample_data(tmp_path / "data", seed=0)
    report = build_report([run / "ppo"], str(files["sft_eval"]), limit=12)
    judge = Judge(question for part in make_questions(0) for question in part)
    for name in MODELS:
        points = [
            judge.score(row["prompt"], row[name]["text"], row[name]["ended"]) for row in report["answers"][len(FOUR) :]
        ]
        assert [row[name]["judge"] for row in report["answers"][len(FOUR) :]] == points
        mean, low, high = mean_interval(points)
        found = report["metrics"][name]
        assert (found["judge"], found["judge_low"], found["judge_high"]) == (mean, low, high)
    assert "정답을 아는 심판" in render_page(report)


@pytest.fixture(scope="module")
def several(run):
    """The page of two runs from one SFT model; the second is SFT itself under another name."""
    other = run / "again/ppo"
    shutil.copytree(run / "sft", other)
    shutil.copy(run / "ppo/resolved.yaml", other / "resolved.yaml")
    shutil.copy(run / "ppo/metrics.json", other / "metrics.json")
    return build_report([run / "ppo", other], seed=1)


def test_several_runs_on_one_page(report, several):
    assert list(several["metrics"]) == ["base", "sft", "ppo", "again/ppo"]
    assert several["metrics"]["ppo"] == report["metrics"]["ppo"]
    assert several["kl"]["ppo"] == report["kl"]["ppo"]
    assert several["kl"]["again/ppo"]["mean"] == pytest.approx(0, abs=1e-5)
    assert several["wins"]["again/ppo over sft"]["share"] == 0.5
    assert list(several["curves"]) == ["sft", "reward", "ppo", "again/ppo"]
    assert {"ppo", "again/ppo"} == {worry["run"] for worry in several["worries"]}
    page = render_page(several)
    assert "KL of again/ppo from SFT" in page
    assert page.count("<svg") == 6


def test_names_of_runs_are_what_tells_their_folders_apart(run, tmp_path):
    folders = [tmp_path / name for name in ("a/ppo", "b/c/ppo")]
    for folder in folders:
        folder.mkdir(parents=True)
        shutil.copy(run / "ppo/resolved.yaml", folder)
    assert list(named_runs(folders)) == ["a", "b/c"]
    assert list(named_runs(folders[:1])) == ["ppo"]
    shutil.copytree(tmp_path / "a", tmp_path / "base")
    assert list(named_runs([folders[0], tmp_path / "base/ppo"])) == ["a", "base/ppo"]  # the base has that name
    assert list(named_runs([run / "ppo", run / "again/ppo"])) == ["ppo", "again/ppo"]
    with pytest.raises(UserError, match="a/ppo is named twice"):
        named_runs([folders[0], folders[0]])


def test_several_runs_start_from_one_sft_model(run, tmp_path):
    other = tmp_path / "ppo"
    other.mkdir()
    settings = yaml.safe_load((run / "ppo/resolved.yaml").read_text()) | {"sft_model_path": str(run / "reward")}
    (other / "resolved.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="a page compares runs that start from the same SFT model"):
        build_report([run / "ppo", other])


def test_curves_are_the_stages_histories(report):
    assert report["curves"] == HISTORY


def test_prompts_without_room_are_left_out(run, write, tiny_tokenizer):
    long = "가나다라 " * 200
    file = write("p.jsonl", json.dumps([{"prompt": prompt} for prompt in ("하나", long, "둘")]))
    report = build_report([run / "ppo"], file)
    assert [row["prompt"] for row in report["answers"]] == [*FOUR, "하나", "둘"]
    with pytest.raises(UserError, match="1 prompts to ask"):
        build_report([run / "ppo"], file, limit=1)


def test_folders_that_are_no_run(run, tmp_path):
    with pytest.raises(UserError, match=r"no resolved\.yaml there"):
        build_report([tmp_path])
    with pytest.raises(UserError, match=r"not the output of recipes/ppo\.py"):
        build_report([run / "sft"])


# --- Worries


@pytest.fixture
def fine():
    """Figures that nothing is wrong with."""
    metrics = {"tokens": 20.0, "distinct_2": 0.8, "ended": 0.9, "hangul": 0.95, "score": 0.0}
    return {
        "metrics": {name: dict(metrics) for name in MODELS},
        "wins": {"ppo over sft": {"share": 0.8, "low": 0.7, "high": 0.87, "n": 100}},
        "kl": {"ppo": {"mean": 4.0, "low": 3.0, "high": 5.0}},
    }


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "evaluation").mkdir()
    rules = {"longer answer wins": {"beaten": True}, "more Hangul wins": {"beaten": True}}
    (tmp_path / "evaluation/evaluation.json").write_text(json.dumps({"baselines": rules}))
    return {"reward_model_path": str(tmp_path), "kl_target": None}


def test_nothing_to_worry_about(fine, settings):
    assert worries(fine, "ppo", settings) == []


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"wins": {"ppo over sft": {"share": 0.52, "low": 0.42, "high": 0.62, "n": 100}}}, "can't be told from SFT"),
        ({"kl": {"ppo": {"mean": 0.01, "low": -0.02, "high": 0.04}}}, "can't be told from SFT"),
        ({"wins": {"ppo over sft": {"share": 0.2, "low": 0.1, "high": 0.3, "n": 100}}}, "score worse than SFT's"),
        ({"kl": {"ppo": {"mean": 20.1, "low": 15.0, "high": 25.0}}}, "20.1 nats a response from SFT"),
        ({"ppo": {"tokens": 30.1}}, "grew from 20 to 30 tokens"),
        ({"ppo": {"distinct_2": 0.55}}, "repeats itself"),
        ({"ppo": {"ended": 0.7}}, "fell from 90% to 70%"),
        ({"ppo": {"hangul": 0.8}}, "share of Hangul fell to 80%"),
    ],
)
def test_each_worry(fine, settings, change, sign):
    changed = copy.deepcopy(fine)
    if "ppo" in change:
        changed["metrics"]["ppo"] |= change["ppo"]
    else:
        changed |= change
    found = worries(changed, "ppo", settings)
    assert len(found) == 1
    assert sign in found[0]["sign"]
    assert found[0]["advice"]


@pytest.mark.parametrize(
    ("metric", "value"), [("tokens", 30.0), ("distinct_2", 0.57), ("ended", 0.73), ("hangul", 0.86)]
)
def test_just_short_of_a_worry(fine, settings, metric, value):
    fine["metrics"]["ppo"][metric] = value
    assert worries(fine, "ppo", settings) == []


def test_far_from_sft_without_scoring_better_is_not_too_near(fine, settings):
    fine["wins"]["ppo over sft"] = {"share": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    (found,) = worries(fine | {"kl": {"ppo": {"mean": 60.0, "low": 50.0, "high": 70.0}}}, "ppo", settings)
    assert "60.0 nats a response from SFT" in found["sign"]


def test_the_kl_target_is_the_measure(fine, settings):
    assert worries(fine, "ppo", settings | {"kl_target": 2.5}) == []
    assert "over 3.8" in worries(fine, "ppo", settings | {"kl_target": 1.9})[0]["sign"]


def test_the_reward_up_and_the_judge_down(fine, settings):
    for name, score, judge in (("sft", 0.0, 0.6), ("ppo", 1.0, 0.5)):
        fine["metrics"][name] |= {"score": score, "judge": judge, "judge_low": judge - 0.04, "judge_high": judge + 0.04}
    (found,) = worries(fine, "ppo", settings)
    assert "The reward went up (0.00 → 1.00) and the judge down (0.60 → 0.50)" in found["sign"]
    assert found["run"] == "ppo"
    fine["metrics"]["ppo"]["judge_high"] = 0.57  # not told apart
    assert worries(fine, "ppo", settings) == []
    fine["metrics"]["ppo"] |= {"judge_high": 0.54, "score": -0.1}
    assert worries(fine, "ppo", settings) == []


def test_a_reward_model_that_nobody_looked_at_or_that_is_a_rule(fine, settings, tmp_path):
    path = tmp_path / "evaluation/evaluation.json"
    rules = json.loads(path.read_text())
    rules["baselines"]["longer answer wins"]["beaten"] = False
    path.write_text(json.dumps(rules))
    (found,) = worries(fine, "ppo", settings)
    assert "no better than the rule 'longer answer wins'" in found["sign"]
    path.unlink()
    (found,) = worries(fine, "ppo", settings)
    assert "kochat reward eval" in found["advice"]


# --- The page


def test_the_page_needs_nothing_else(report):
    page = render_page(report)
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.findall(r"@import|url\((?!#)", page)
    assert page.count("<svg") == 6  # scores, score against KL; SFT loss, reward loss, PPO score and KL
    assert "SFT held-out loss: 2.500" in page


def test_texts_stand_in_the_page_as_they_are(report):
    odd = copy.deepcopy(report)
    odd["answers"][0]["prompt"] = "<script>alert(1)</script> & 가"
    page = render_page(odd)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; 가" in page


def test_a_page_that_is_there_is_whole(report, tmp_path, monkeypatch):
    """It says that the report is finished, so it comes last, and at once."""
    seen = []

    def watched(path):
        seen.append((path.name, [file.name for file in tmp_path.iterdir()]))
        return new_file(path)

    monkeypatch.setattr(page, "new_file", watched)
    write_report(report, tmp_path)
    assert seen == [("report.json", []), ("report.html", ["report.json"])]


def test_an_older_report_is_kept(report, tmp_path):
    page = write_report(report, tmp_path / "report")
    assert json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8")) == report
    page.write_text("mine")
    write_report(report, tmp_path / "report")
    assert (tmp_path / "report/report.html-1").read_text() == "mine"
    assert page.read_text(encoding="utf-8") == render_page(report)


@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_fits_the_screen(report, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine; it is a browser, which no Python package brings")
    script = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script>"
    page = tmp_path / "page.html"
    page.write_text(render_page(report).replace("</body>", f"{script}</body>"), encoding="utf-8")
    # A window can't be narrower than 500 pixels, but a frame can.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="page.html" width="{width}" height="800" onload="document.title = '
                     "contentDocument.title\"></iframe>")  # fmt: skip
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom", str(frame)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    inner, scroll = re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups()
    assert int(scroll) <= int(inner) <= width
