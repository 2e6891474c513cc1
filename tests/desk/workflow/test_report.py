"""What the report says, from adapters drawn at random; and its page, in a browser where there is one."""

import copy
import html
import json
import re
import shutil
from pathlib import Path

from kochat_trl.data.probes import PROBES
from kochat_trl.data.records import Prompt, conversation
from kochat_trl.data.text import hangul_share, visible
from kochat_trl.desk.answers.generate import Response, decoding, generate_answers, mean_logprob
from kochat_trl.desk.sample.sample import Judge, make_questions, write_sample_data
from kochat_trl.desk.statistics import mean_interval, wilson_interval
from kochat_trl.desk.workflow import page
from kochat_trl.desk.workflow import report as reports
from kochat_trl.desk.workflow.page import render_page, write_report
from kochat_trl.desk.workflow.report import Run, build_report, named_runs, read_questions
from kochat_trl.errors import UserError
from kochat_trl.files import new_file
from kochat_trl.models.loading import add_lora, load_causal_lm, load_policy
from kochat_trl.reward.score import load_scorer, score_ids
from kochat_trl.rows.encode import encode_dialogue, encode_dialogues, encode_prompt
from kochat_trl.settings.keys import ModelArguments

import pytest
import torch
import yaml
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

FOUR = [prompt for prompt, _ in PROBES]
MODELS = ("base", "sft", "ppo")
HISTORY = {
    "sft": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}],
    "reward": [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}, {"step": 2, "eval_accuracy": 0.9}],
    "ppo": [{"step": i, "objective/scores": i / 2, "objective/kl": float(i)} for i in range(3)],
}
HISTORY["ppo"] += [{"step": 0, "eval_score": 0.5}, {"step": 2, "eval_score": 0.75}]


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
    assert not {"judge", "right", "polite"} & report["metrics"]["ppo"].keys()


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
    answers = generate_answers(model, tiny_tokenizer, prompts, decoding("sample", max_new_tokens=6), seed=1)
    assert [row["base"]["text"] for row in report["answers"]] == [answer.text for answer in answers]
    shown = [{key: row[key] for key in row if key in ("prompt", "system", "reference")} for row in report["answers"]]
    assert shown[len(FOUR) :] == [p.fields | {"reference": r} for p, r in references.items()]


def test_answers_scores_and_wins(run, report, tiny_base, tiny_tokenizer):
    prompts = [Prompt(row["prompt"]) for row in report["answers"]]
    settings = decoding("sample", max_new_tokens=6)
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
    assert (win["gain"], win["gain_low"], win["gain_high"]) == pytest.approx(mean_interval(gaps))


def test_kl(run, report, tiny_tokenizer):
    """The mean, over PPO's answers, of log π − log π_ref of the whole answer."""
    prompts = [Prompt(row["prompt"]) for row in report["answers"]]
    models = {n: load_policy(str(run / n), ModelArguments(dtype="float32"), tiny_tokenizer) for n in ("ppo", "sft")}
    answers = generate_answers(models["ppo"], tiny_tokenizer, prompts, decoding("sample", max_new_tokens=6), seed=1)
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


def test_the_judge_tells_what_is_right_from_what_is_polite(run, tmp_path, monkeypatch):
    """Of three answers one is both, one is only polite, and one only right."""
    files = write_sample_data(tmp_path / "data", seed=0)
    questions = {q.prompt: q for part in make_questions(0) for q in part}
    said = ("full", "wrong", "curt")

    def answered(model, tokenizer, prompts, *_, **__):
        texts = ["?" if p.prompt in FOUR else getattr(questions[p.prompt], said[i % 3]) for i, p in enumerate(prompts)]
        return [Response(text, (40,), True) for text in texts]

    monkeypatch.setattr(reports, "generate_answers", answered)
    report = build_report([run / "ppo"], str(files["sft_eval"]), limit=6)
    right = [(len(FOUR) + i) % 3 != 1 for i in range(6)]
    assert [row["ppo"]["right"] for row in report["answers"][len(FOUR) :]] == right
    found = report["metrics"]["ppo"]
    assert (found["right"], found["right_low"], found["right_high"]) == (4 / 6, *wilson_interval(4, 6))
    assert found["polite"] == pytest.approx(2 / 3)
    page = render_page(report)
    assert re.search(r"right answers, by the judge, 95 %</small></td>\s*<td>67 %<br><small>30 % – 90 %", page)
    assert re.search(r"polite answers, by the judge</small></td><td>67 %</td>", page)
    assert (page.count("정답 right"), page.count("오답 wrong")) == (4 * 3, 2 * 3)


# --- The loss on references


def test_the_loss_is_that_of_transformers_and_of_sft(run, report, kochatgpt_files, tiny_base, tiny_tokenizer, tmp_path):
    """All tokens of the answers count alike, whatever batch they are in, and those of the prompts don't count."""
    records = json.loads(Path(kochatgpt_files["sft"]).read_text(encoding="utf-8-sig"))
    dialogues = [conversation(record["prompt"], record["completion"]) for record in records]
    rows = [{"input_ids": i, "labels": k} for i, k in encode_dialogues(tiny_tokenizer, dialogues)]
    tokens = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert len(set(tokens)) > 1
    folders = {"base": tiny_base, "sft": str(run / "sft"), "ppo": str(run / "ppo")}
    for name, path in folders.items():
        model = load_policy(path, ModelArguments(dtype="float32"), tiny_tokenizer).eval()
        with torch.no_grad():
            batches = [{key: torch.tensor([value]) for key, value in row.items()} for row in rows]
            losses = [model(**batch).loss.item() for batch in batches]
        expected = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
        found = report["metrics"][name]
        assert found["loss"] == pytest.approx(expected, abs=1e-5)
        assert found["loss_tokens"] == sum(tokens)
        args = SFTConfig(
            str(tmp_path), per_device_eval_batch_size=len(rows), report_to="none", bf16=False, use_cpu=True
        )
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model, args, processing_class=tiny_tokenizer, train_dataset=data, eval_dataset=data)
        assert found["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    assert len({report["metrics"][name]["loss"] for name in MODELS}) == 3


def test_the_loss_follows_the_system_message_and_skips_what_does_not_fit(run, write, tiny_base, tiny_tokenizer):
    polite = {"system": "존댓말로 답해."}
    records = [{"prompt": "하나", "completion": "둘"} | polite, {"prompt": "하나"}, {"prompt": "셋"}]
    records += [{"prompt": "넷", "completion": "가나다라 " * 200}, {"prompt": FOUR[0], "completion": "네"}]
    report = build_report([run / "ppo"], write("p.jsonl", json.dumps(records)))
    ids, labels = encode_dialogue(tiny_tokenizer, conversation("하나", "둘", **polite))
    model = load_policy(tiny_base, ModelArguments(dtype="float32"), tiny_tokenizer).eval()
    expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    found = report["metrics"]["base"]
    assert (found["loss"], found["loss_tokens"]) == (pytest.approx(expected, abs=1e-5), sum(i >= 0 for i in labels))
    page = render_page(report)
    assert "held-out loss, nats a token" in page
    assert "loss on training prompts, nats a token" in render_page(report | {"held_out": False})
    assert page.count("존댓말로 답해.") == 1


def test_without_references_there_is_no_loss(run, write):
    report = build_report([run / "ppo"], write("p.jsonl", json.dumps([{"prompt": "하나"}, {"prompt": "둘"}])))
    assert not {"loss", "loss_tokens", "chrf"} & report["metrics"]["ppo"].keys()
    assert "nats a token;" not in render_page(report)


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
    assert page.count("<svg") == 7


def test_dpo_beside_ppo_is_scored_by_its_reward_model_and_alone_by_one_that_is_named(run, several, tmp_path):
    dpo = run / "dpo"
    shutil.copytree(run / "sft", dpo)
    settings = {"sft_model_path": str(run / "sft"), "ld_alpha": None, "eval_files": [], "train_files": []}
    (dpo / "resolved.yaml").write_text(yaml.safe_dump(settings))
    history = [{"step": i, "loss": 0.7 - i / 9, "rewards/margins": float(i)} for i in range(3)]
    (dpo / "metrics.json").write_text(json.dumps({"history": history}))
    with pytest.raises(UserError, match=r"trained without a reward model; say with --reward-model"):
        build_report([dpo])
    alone = build_report([dpo], seed=1, reward_model=str(run / "reward"), max_new_tokens=6)
    assert alone["metrics"]["sft"] == several["metrics"]["sft"]
    assert alone["metrics"]["dpo"] == several["metrics"]["again/ppo"]
    page = render_page(alone)
    assert "What DPO changed" in page
    assert "DPO margin" in page
    assert page.count("<svg") == 5  # scores; SFT loss, reward loss, DPO loss and margin
    assert {row["dpo"]["tokens"] <= 6 for row in alone["answers"]} == {True}


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
    with pytest.raises(UserError, match=r"not the output of recipes/ppo\.py, dpo\.py or kto\.py"):
        build_report([run / "sft"])


# --- The page


def test_the_page_needs_nothing_else(report):
    page = render_page(report)
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.findall(r"@import|url\((?!#)", page)
    assert page.count("<svg") == 7  # scores, score against KL; SFT loss, reward loss, PPO score, held out too, and KL
    assert "SFT held-out loss: 2.500" in page


@pytest.mark.parametrize("with_model", [True, False])
def test_reward_functions_are_shown_alone(run, tmp_path, with_model):
    """Beside the reward model's score; without one the score is what the functions give by their weights."""
    copied = shutil.copytree(run, tmp_path / "run")
    path = copied / "ppo/resolved.yaml"
    own = {"reward_functions": ["length", "hangul"], "reward_weights": [2.0, -0.5], "target_length": 3}
    own |= {} if with_model else {"reward_model_path": None}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | own))
    history = [entry | {"rewards/length/mean": -0.5, "rewards/hangul/mean": 0.25} for entry in HISTORY["ppo"]]
    (copied / "ppo/metrics.json").write_text(json.dumps({"history": history}))
    report = build_report([copied / "ppo"], seed=1)
    for row in report["answers"]:
        expected = {"length": -abs(row["ppo"]["tokens"] - 3) / 3, "hangul": hangul_share(row["ppo"]["text"])}
        assert row["ppo"]["rewards"] == pytest.approx(expected)
        total = 2 * expected["length"] - 0.5 * expected["hangul"]
        assert (row["ppo"]["score"] == pytest.approx(total)) == (not with_model)
    for name in MODELS:
        counted = [row[name]["rewards"]["length"] for row in report["answers"] if row["prompt"] not in FOUR]
        metrics = report["metrics"][name]
        assert metrics["rewards"]["length"] == pytest.approx(sum(counted) / len(counted))
        assert metrics["rewards"]["hangul"] == metrics["hangul"]
    assert report["reward"] == (str(run / "reward") if with_model else "length, hangul")
    page = render_page(report)
    assert "<td>length <small>reward function alone</small></td>" in page
    assert "PPO rewards/length" in page


def test_the_courses_questions_come_before_the_other_answers(report):
    """Under a heading of their own, which is not there without them."""
    page = render_page(report)
    own, others = page.index("강의의 네 질문"), page.index("답변 나란히 보기")
    places = [page.index(f"<h3>{row['prompt']}</h3>") for row in report["answers"]]
    assert all(own < place < others for place in places[: len(FOUR)])
    assert all(others < place for place in places[len(FOUR) :])
    assert page.count("<h3>") == len(places)
    odd = copy.deepcopy(report)
    for row in odd["answers"][: len(FOUR)]:
        row["ppo"]["score"] = 99.0  # which no plot shows
    assert re.findall("<svg.*?</svg>", render_page(odd), re.DOTALL) == re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert "강의의 네 질문" not in render_page(report | {"answers": report["answers"][len(FOUR) :]})


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script> & 가",
        "<img src=x onerror=alert(1)>",
        "{{ 7 * 7 }}",
        "가\u202e나\0\x1b",
        "\ud800",
        "가" * 50_000,
    ],
    ids=range(6),
)
def test_texts_stand_in_the_page_as_they_are(text, report):
    odd = copy.deepcopy(report)
    for row in odd["answers"]:
        row |= {"prompt": text, "system": text, "reference": text}
        row["ppo"]["text"] = text
    odd |= {"base": text, "runs": {"ppo": text}, "worries": [{"run": "ppo", "sign": text, "advice": text}]}
    page = render_page(odd)
    assert page.encode()
    assert html.escape(visible(text), quote=False) in page
    assert [acts for acts in ("<script", "<img src=x", "\u202e", "\0", "\x1b", "\ud800") if acts in page] == []


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
def test_the_page_fits_the_screen(report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_content(render_page(report))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
