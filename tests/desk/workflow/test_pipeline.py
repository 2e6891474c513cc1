"""`kochat run`: what it plans from what is there, and the whole of it with real recipes."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from statistics import stdev

from kochat_trl.checkpoints import seal
from kochat_trl.desk.statistics import half_interval
from kochat_trl.desk.workflow.pipeline import (
    Step,
    as_markdown,
    compare_runs,
    make_plan,
    make_plans,
    print_runs,
    run_plan,
)
from kochat_trl.errors import UserError
from tests.tiny import ROOT

import pytest
import yaml
from rich.console import Console

STAGES = ["sft", "reward", "ppo", "merge", "report"]


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A set of configs whose outputs are in the test's folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    for stage in STAGES[:3]:
        values = {"output_dir": f"out/{stage}", "use_peft": True, "learning_rate": "1e-3", "seed": 7}
        values |= {"train_files": ["none"], "report_to": "none"}
        if stage == "ppo":
            values |= {"sft_model_path": "out/sft", "reward_model_path": "out/reward"}
        else:
            values |= {"model_name_or_path": "none"}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder


def finish(*stages, **settings):
    for stage in stages:
        output = Path("out") / ("merged" if stage == "merge" else stage)
        output.mkdir(parents=True, exist_ok=True)
        name = {"merge": "config.json", "report": "report.html"}.get(stage, "metrics.json")
        (output / name).write_text("{}")
        resolved = {"output_dir": f"out/{stage}", "learning_rate": 1e-3, "seed": 7} | settings
        (output / "resolved.yaml").write_text(yaml.safe_dump(resolved))


def checkpoint(stage, step, whole=True):
    folder = Path("out") / stage / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_text("moments")
    if whole:
        seal(folder)
    return folder


def states(plan):
    return {step.stage: step.why if step.command else "done" for step in plan.steps}


RENAMED = "again; what is there is renamed"


def test_a_new_run(configs):
    plan = make_plan(configs)
    steps = plan.steps
    assert states(plan) == dict.fromkeys(STAGES, "new")
    assert plan.outputs == {step.stage: step.output for step in steps}
    assert [str(step.output) for step in steps] == ["out/sft", "out/reward", "out/ppo", "out/merged", "out/report"]
    for step in steps[:3]:
        assert f"recipes/{step.stage}.py" in " ".join(step.command)
        assert step.command[-2:] == ["--config", f"{configs}/{step.stage}.yaml"]
        assert Path(step.command[step.command.index("--config_file") + 1]).resolve() == ROOT / (
            "configs/accelerate/cpu.yaml"
        )
    assert steps[3].command[2:] == ["--adapter", "out/ppo", "--output", "out/merged"]
    assert steps[4].command[3:] == ["report", "out/ppo", "--output", "out/report"]


def test_launcher_and_seed(configs):
    steps = make_plan(configs, seed=3, launcher="mine.yaml").steps
    for step in steps[:3]:
        assert step.command[step.command.index("--config_file") + 1] == "mine.yaml"
        assert step.command[-2:] == ["--seed", "3"]
    assert steps[4].command[-2:] == ["--seed", "3"]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_code_that_a_config_trusts_is_trusted_by_what_follows(evaluated, stage):
    steps = {step.stage: step.command for step in make_plan(evaluated).steps}
    assert not any("--trust-remote-code" in command for command in steps.values())
    file = evaluated / f"{stage}.yaml"
    file.write_text(f"{file.read_text()}trust_remote_code: true\n")
    steps = {step.stage: step.command for step in make_plan(evaluated).steps}
    told = [name for name, command in steps.items() if command[-1] == "--trust-remote-code"]
    assert told == ["evaluate", "merge", "report"]


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (STAGES, "ddddd"),
        (["sft"], "dnnnn"),
        (["reward", "ppo", "merge"], "ndrrn"),
        (["sft", "ppo", "merge", "report"], "dnrrr"),
        (["sft", "reward", "ppo", "report"], "dddnd"),
    ],
    ids=["all", "sft", "no sft", "no reward", "no merge"],
)
def test_what_is_done_is_kept_and_what_depends_on_the_rest_is_not(configs, done, expected):
    finish(*done)
    plan = make_plan(configs)
    words = {"d": "done", "n": "new", "r": RENAMED}
    assert states(plan) == {stage: words[letter] for stage, letter in zip(STAGES, expected, strict=True)}
    for step in plan.steps[:3]:
        if step.command:
            assert ("--overwrite_output_dir" in step.command) == (step.why == RENAMED)


def test_a_stage_that_broke_off_goes_on_from_its_last_whole_checkpoint(configs):
    finish("sft", "reward")
    for step, whole in (5, True), (20, True), (100, False):
        checkpoint("ppo", step, whole)
    step = make_plan(configs).steps[2]
    assert step.why == "goes on from checkpoint-20; checkpoint-100: has no digests.json, which is written last"
    assert step.command[-2:] == ["--resume_from_checkpoint", "out/ppo/checkpoint-20"]
    (Path("out/ppo/checkpoint-20") / "optimizer.pt").write_text("Moments")
    why = make_plan(configs).steps[2].why
    assert why.startswith("goes on from checkpoint-5; checkpoint-100: ")
    assert why.endswith("; checkpoint-20: optimizer.pt isn't as it was written")


def test_a_stage_that_broke_off_without_a_checkpoint_starts_anew(configs):
    Path("out/sft").mkdir(parents=True)
    assert states(make_plan(configs))["sft"] == "new"  # an empty folder is in nobody's way
    Path("out/sft/progress.json").write_text("{}")
    assert states(make_plan(configs))["sft"] == "new"
    Path("out/sft/samples.jsonl").write_text("")
    assert states(make_plan(configs))["sft"] == RENAMED


def test_a_checkpoint_of_other_inputs_is_not_gone_on_from(configs):
    finish("sft")
    checkpoint("ppo", 5)
    assert states(make_plan(configs))["ppo"] == RENAMED  # as there is a new reward model


def test_a_stage_that_is_older_than_what_it_reads_runs_again(configs):
    """A run with --from reward was stopped between the reward model and PPO, or a recipe was run by hand."""
    finish(*STAGES)
    newest = (Path("out/report") / "report.html").stat().st_mtime + 10
    os.utime("out/reward/metrics.json", (newest, newest))
    assert states(make_plan(configs)) == {"sft": "done", "reward": "done"} | dict.fromkeys(STAGES[2:], RENAMED)


def test_ppo_must_read_what_the_stages_before_write(configs):
    path = configs / "ppo.yaml"
    path.write_text(path.read_text().replace("out/reward", "out/other"))
    with pytest.raises(UserError, match=r"reward_model_path is out/other, and .*reward.yaml writes"):
        make_plan(configs)


def test_another_ppo_beside_the_first_has_a_merge_and_a_report_of_its_own(configs):
    path = configs / "ppo.yaml"
    path.write_text(path.read_text().replace("output_dir: out/ppo", "output_dir: out/ppo_b"))
    assert [str(step.output) for step in make_plan(configs).steps[3:]] == ["out/ppo_b-merged", "out/ppo_b-report"]


def test_from(configs):
    finish(*STAGES)
    assert states(make_plan(configs, "reward")) == {"sft": "done"} | dict.fromkeys(STAGES[1:], RENAMED)
    merge_on = dict.fromkeys(STAGES[:3], "done") | {"merge": RENAMED, "report": RENAMED}
    assert states(make_plan(configs, "merge")) == merge_on
    shutil.rmtree("out/reward")
    with pytest.raises(UserError, match="reward isn't finished"):
        make_plan(configs, "ppo")
    with pytest.raises(UserError, match="--from: found 'rm', expected sft, reward, ppo, merge, report"):
        make_plan(configs, "rm")


def test_no_merge_without_an_adapter(configs):
    path = configs / "ppo.yaml"
    path.write_text(path.read_text().replace("use_peft: true", "use_peft: false"))
    assert [step.stage for step in make_plan(configs).steps] == ["sft", "reward", "ppo", "report"]


def test_other_settings_than_a_finished_stage_had(configs):
    finish(*STAGES)
    with pytest.raises(UserError, match="sft was run with seed: 7, and its config says 8"):
        make_plan(configs, seed=8)
    finish("reward", learning_rate=2e-3)
    with pytest.raises(UserError, match=r"reward was run with learning_rate: 0\.002, and its config says 0\.001"):
        make_plan(configs)
    assert states(make_plan(configs, "reward"))["reward"] == RENAMED


def test_a_setting_that_was_removed_is_another_setting(configs):
    finish(*STAGES, max_length=99)
    with pytest.raises(UserError, match="sft was run with max_length: 99, and its config says 1024"):
        make_plan(configs)


def test_what_the_hardware_chose_or_changes_nothing_is_no_other_setting(configs):
    finish(*STAGES, bf16=True, dtype="bfloat16", use_cpu=False, overwrite_output_dir=True, report_to="wandb")
    assert set(states(make_plan(configs)).values()) == {"done"}
    path = configs / "sft.yaml"
    path.write_text(path.read_text() + "dtype: float32\n")
    with pytest.raises(UserError, match="sft was run with dtype: bfloat16, and its config says float32"):
        make_plan(configs)


def test_a_mistake_in_a_later_stage_is_told_before_the_first_runs(configs):
    path = configs / "ppo.yaml"
    path.write_text(path.read_text() + "kl_coeff: 1\n")
    with pytest.raises(UserError, match=r"ppo.yaml, line \d+: unknown key 'kl_coeff'. Did you mean 'kl_coef'"):
        make_plan(configs)


def test_configs_that_are_none(configs):
    (configs / "reward.yaml").unlink()
    with pytest.raises(UserError, match=r"reward.yaml: can't read this config: No such file"):
        make_plan(configs)
    (configs / "reward.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=r"'output_dir' is not set for reward"):
        make_plan(configs)
    with pytest.raises(UserError, match=r"sft.yaml: expected a folder with sft.yaml"):
        make_plan(configs / "sft.yaml")


# --- Evaluation, experiments, and several runs


@pytest.fixture
def evaluated(configs):
    """The set with rankings to evaluate the reward model on."""
    path = configs / "reward.yaml"
    path.write_text(path.read_text() + "eval_files: [held_out.jsonl]\ninvalid_records: skip\n")
    return configs


def experiment(configs, name, text, extends="configs"):
    path = configs.parent / f"{name}.yaml"
    path.write_text(f"extends: {extends}\n{text}")
    return path


def test_a_reward_model_with_held_out_rankings_is_evaluated(evaluated):
    plan = make_plan(evaluated)
    assert list(states(plan)) == ["sft", "reward", "evaluate", "ppo", "merge", "report"]
    step = plan.steps[2]
    assert step.command[3:] == [
        *("reward", "eval", "out/reward", "held_out.jsonl", "--ranking-order", "best_first"),
        *("--invalid-records", "skip", "--overlong", "error"),
    ]
    finish(*STAGES)
    assert states(make_plan(evaluated))["ppo"] == "done"
    assert states(make_plan(evaluated))["evaluate"] == "new"
    assert states(make_plan(evaluated))["report"] == RENAMED


def flags(step):
    words = step.command[step.command.index("--config") :]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_an_experiment_runs_again_what_it_changes_and_what_reads_that(evaluated):
    path = experiment(evaluated, "odd", "pairs: adjacent\nranking_order: rank_of\n")
    finish("sft", "reward")
    plan = make_plan(path)
    assert states(plan) == {"sft": "done"} | dict.fromkeys(["reward", "evaluate", *STAGES[2:]], "new")
    paths = [str(plan.outputs[stage]) for stage in ("sft", "reward", "evaluate", *STAGES[2:])]
    mine = ["out/odd/reward", "out/odd/reward/evaluation", "out/odd/ppo", "out/odd/merged", "out/odd/report"]
    assert paths == ["out/sft", *mine]
    assert flags(plan.steps[1]) == {"--config": str(path), "--output_dir": "out/odd/reward"}
    ppo = {"--output_dir": "out/odd/ppo", "--reward_model_path": "out/odd/reward"}
    assert flags(plan.steps[3]) == {"--config": str(path)} | ppo
    # judged by the folder's own reading of the rankings
    assert plan.steps[2].command[7:9] == ["--ranking-order", "best_first"]


def test_an_experiment_on_ppo_alone_shares_the_rest(configs):
    path = experiment(configs, "kl", "kl_coef: 0\n")
    outputs = make_plan(path).outputs
    assert [str(outputs[s]) for s in STAGES] == [
        "out/sft",
        "out/reward",
        "out/kl/ppo",
        "out/kl/merged",
        "out/kl/report",
    ]
    child = experiment(configs, "child", "kl_estimator: k3\n", extends="kl.yaml")
    assert str(make_plan(child).outputs["ppo"]) == "out/child/ppo"
    assert make_plan(experiment(configs, "same", "")).outputs == make_plan(configs).outputs


@pytest.mark.parametrize("key", ["output_dir", "sft_model_path", "reward_model_path"])
def test_an_experiment_names_no_folders(configs, key):
    with pytest.raises(UserError, match=f"leave {key} out: each stage gets a folder 'own' beside out/"):
        make_plan(experiment(configs, "own", f"{key}: out/mine\n"))


def test_an_experiment_does_not_run_the_stages_of_others_again(configs):
    finish(*STAGES)
    path = experiment(configs, "kl", "kl_coef: 0\n")
    with pytest.raises(
        UserError, match=r"--from reward: that stage is not .*kl.yaml's own; run it again with .*configs"
    ):
        make_plan(path, "reward")
    assert states(make_plan(path, "ppo"))["ppo"] == "new"
    assert states(make_plan(configs, "reward"))["reward"] == RENAMED


def test_runs_that_would_be_taken_for_one_another(configs, tmp_path):
    path = experiment(configs, "kl", "kl_coef: 0\n")
    (tmp_path / "b").mkdir()
    other = tmp_path / "b/kl.yaml"
    other.write_text("extends: ../configs\nkl_coef: 1\n")
    with pytest.raises(UserError, match="a config is named twice, or two have the same name: kl, kl"):
        make_plans([str(path), str(other)], [])
    with pytest.raises(UserError, match="a seed is named twice"):
        make_plans([str(path)], [0, 0])


def test_an_evaluation_of_other_rankings_is_not_the_one(evaluated):
    finish(*STAGES)
    folder = Path("out/reward/evaluation")
    folder.mkdir()
    facts = {"files": ["held_out.jsonl"], "ranking_order": "best_first"}
    for change, state in (({}, "done"), ({"files": ["x"]}, RENAMED), ({"ranking_order": "rank_of"}, RENAMED)):
        (folder / "evaluation.json").write_text(json.dumps(facts | change))
        assert states(make_plan(evaluated))["evaluate"] == state


def test_an_evaluation_fits_texts_as_the_training_did(evaluated):
    """Else a run would die of a long text after its reward model is trained."""
    path = evaluated / "reward.yaml"
    path.write_text(path.read_text() + "overlong: truncate\nmax_length: 64\n")
    step = make_plan(evaluated).steps[2]
    assert step.command[-4:] == ["--overlong", "truncate", "--max-length", "64"]
    finish("sft")
    finish("reward", max_length=64)
    finish(*STAGES[2:])
    folder = Path("out/reward/evaluation")
    folder.mkdir()
    for change, state in (({"max_length": 64}, "done"), ({"max_length": 32}, RENAMED), ({"overlong": "drop"}, RENAMED)):
        facts = {"files": ["held_out.jsonl"], "ranking_order": "best_first", "overlong": "truncate"} | change
        (folder / "evaluation.json").write_text(json.dumps(facts))
        assert states(make_plan(evaluated))["evaluate"] == state


def test_several_runs_have_folders_of_their_own_and_share_what_they_can(configs):
    path = experiment(configs, "kl", "kl_coef: 0\n")
    plans = make_plans([str(configs), str(path)], [3, 4])
    assert [(plan.name, plan.seed) for plan in plans] == [("configs", 3), ("configs", 4), ("kl", 3), ("kl", 4)]
    assert [[step.stage for step in plan.steps] for plan in plans] == [["sft", "reward", "ppo", "report"]] * 2 + [
        ["ppo", "report"]
    ] * 2
    assert [str(plan.outputs["ppo"]) for plan in plans] == [
        *("out/seed3/ppo", "out/seed4/ppo", "out/kl/seed3/ppo", "out/kl/seed4/ppo")
    ]
    assert flags(plans[3].steps[0]) == {
        **{"--config": str(path), "--output_dir": "out/kl/seed4/ppo", "--seed": "4"},
        **{"--sft_model_path": "out/seed4/sft", "--reward_model_path": "out/seed4/reward"},
    }
    assert make_plans([str(configs)], [])[0].outputs["ppo"] == Path("out/ppo")


@pytest.fixture
def dpo(evaluated):
    """The set with DPO beside PPO."""
    values = yaml.safe_load((evaluated / "ppo.yaml").read_text()) | {"output_dir": "out/dpo"}
    del values["reward_model_path"]
    (evaluated / "dpo.yaml").write_text(yaml.safe_dump(values))
    with (evaluated / "ppo.yaml").open("a") as file:
        file.write("response_length: 24\n")
    return evaluated


def test_a_method_takes_the_place_of_ppo(dpo):
    """It is trained after SFT, whatever the reward model is, and scored by that, on answers as long as PPO's."""
    plan = make_plan(dpo, method="dpo")
    assert list(states(plan)) == ["sft", "reward", "evaluate", "dpo", "merge", "report"]
    steps = {step.stage: step for step in plan.steps}
    assert "recipes/dpo.py" in " ".join(steps["dpo"].command)
    assert [str(steps[s].output) for s in ("dpo", "merge", "report")] == ["out/dpo", "out/dpo-merged", "out/dpo-report"]
    scored = ["--reward-model", "out/reward", "--max-new-tokens", "24"]
    assert steps["report"].command[3:] == ["report", "out/dpo", "--output", "out/dpo-report", *scored]
    finish("sft", "dpo")
    assert states(make_plan(dpo, method="dpo")) | {"dpo": "done"} == states(make_plan(dpo, method="dpo"))
    (dpo / "ppo.yaml").unlink()
    assert make_plan(dpo, method="dpo").steps[-1].command[-2:] == scored[:2]


def test_an_experiment_on_the_reward_model_trains_no_other_dpo(dpo):
    """Its report is another, as it is scored by another. One on the pairs is for both."""
    outputs = make_plan(experiment(dpo, "margins", "rank_margins: true\n"), method="dpo").outputs
    expected = {"reward": "out/margins/reward", "dpo": "out/dpo", "report": "out/margins/dpo-report"}
    assert {stage: str(outputs[stage]) for stage in expected} == expected
    outputs = make_plan(experiment(dpo, "pairs", "pairs: adjacent\n"), method="dpo").outputs
    assert str(outputs["dpo"]) == "out/pairs/dpo"


def test_several_methods_are_several_runs(dpo):
    plans = make_plans([str(dpo)], [3, 4], methods=["dpo", "ppo"])
    assert [(plan.name, plan.seed) for plan in plans] == [
        *(("configs, dpo", 3), ("configs, dpo", 4), ("configs", 3), ("configs", 4))
    ]
    assert [[step.stage for step in plan.steps] for plan in plans] == [
        *[["sft", "reward", "evaluate", "dpo", "report"]] * 2,
        *[["ppo", "report"]] * 2,
    ]
    assert flags(plans[1].steps[3])["--sft_model_path"] == "out/seed4/sft"
    with pytest.raises(UserError, match="a method is named twice"):
        make_plans([str(dpo)], [], methods=["dpo", "dpo"])


def test_the_table_of_several_runs(evaluated, capsys):
    """Means by hand; half an interval of 0.1, 0.2, 0.3: 4.303 · 0.1 / √3."""
    plans = make_plans([str(evaluated), str(experiment(evaluated, "kl", "kl_coef: 0\n"))], [0, 1, 2])
    for plan in plans:
        value = 0.1 * (plan.seed + 1)
        metrics = {"tokens": 20.0 + plan.seed} | ({"right": value} if plan.name == "kl" else {})
        report = {"runs": {"ppo": ""}, "wins": {"ppo over sft": {"share": value}}, "kl": {"ppo": {"mean": 2 * value}}}
        report |= {"metrics": {"sft": metrics, "ppo": metrics}}
        scores = {"하나": -1.0, "둘": 1.0, "불고기용 고기 한우에요?": 9.0}  # √2 without the course's question
        report["answers"] = [{"prompt": prompt, "sft": {"score": score}} for prompt, score in scores.items()]
        files = {"report": ("report.json", report), "sft": ("metrics.json", {"eval_loss": 1.5})}
        files["evaluate"] = ("evaluation.json", {"accuracy": {"accuracy": 1 - value}})
        for stage, (name, content) in files.items():
            plan.outputs[stage].mkdir(parents=True, exist_ok=True)
            (plan.outputs[stage] / name).write_text(json.dumps(content))
    lines = compare_runs(plans)
    assert lines[0] == [
        "",
        "SFT loss",
        "RM accuracy",
        "RM spread",
        "PPO wins",
        "KL",
        "tokens",
        "right, SFT",
        "right, PPO",
    ]
    tenths = "0.200 ± 0.248"
    figures = ["1.50 ± 0.00", "0.800 ± 0.248", "1.41 ± 0.00", tenths, "0.400 ± 0.497", "21.0 ± 2.5"]
    assert lines[1] == ["configs", *figures, "–", "–"]
    assert lines[2][-2:] == [tenths, tenths]
    assert compare_runs(plans[:1])[1][:3] == ["configs", "1.50", "0.900"]
    print_runs(lines, Console(width=80))
    printed = capsys.readouterr().out
    assert printed.count("± 0.248") == 6  # accuracy and wins of both, and the right answers twice
    assert "…" not in printed
    assert as_markdown(lines).splitlines()[2].startswith("| configs | 1.50 ± 0.00 | 0.800 ± 0.248 |")


def test_half_an_interval_is_of_students_t():
    """The quantile of t against the integral of its density, for 2 to 11 values; the normal's for many."""
    for count in range(2, 12):
        freedom = count - 1
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        t = half_interval([*range(count)]) * math.sqrt(count) / stdev(range(count))
        middles = [t * (i + 0.5) / 10_000 for i in range(10_000)]
        inside = sum(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2) for x in middles) * t / 10_000
        assert 2 * inside == pytest.approx(0.95, abs=3e-3 if freedom == 10 else 1e-4)


def test_a_stage_that_fails_stops_the_rest(tmp_path):
    marker = tmp_path / "ran"
    steps = [
        Step("sft", tmp_path, None, "done"),
        Step("reward", tmp_path, [sys.executable, "-c", "raise SystemExit(3)"], "new"),
        Step("ppo", tmp_path, [sys.executable, "-c", f"open({str(marker)!r}, 'w')"], "new"),
    ]
    with pytest.raises(UserError, match="reward failed"):
        run_plan(steps, Console())
    assert not marker.exists()
    assert set(run_plan(steps[::2], Console())) == {"ppo"}
    assert marker.exists()


@pytest.mark.parametrize("stage", ["merge", "evaluate"])
def test_what_a_step_would_not_write_over_is_renamed(stage, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    run_plan([Step(stage, tmp_path / "out", [sys.executable, "-c", "pass"], RENAMED)], Console())
    assert (tmp_path / "out-1/mine").read_text() == "kept"


@pytest.mark.slow
def test_the_pipeline_runs_and_goes_on(tiny_base, kochatgpt_files, tmp_path, kochat, monkeypatch):
    """Real recipes, launched by accelerate; then PPO is broken off, and the same command goes on with it."""
    common = {"use_peft": True, "use_cpu": True, "lora_r": 4, "report_to": "none", "logging_steps": 1}
    common |= {"save_strategy": "steps", "save_steps": 1, "seed": 0}
    sft = {"model_name_or_path": tiny_base, "train_files": [kochatgpt_files["sft"]], "max_steps": 2}
    reward = {"model_name_or_path": tiny_base, "train_files": [kochatgpt_files["reward"]], "max_steps": 2}
    ppo = {"sft_model_path": "out/sft", "reward_model_path": "out/reward", "train_files": [kochatgpt_files["ppo"]]}
    ppo |= {"per_device_train_batch_size": 2, "num_mini_batches": 1, "total_episodes": 4, "response_length": 4}
    (tmp_path / "set").mkdir()
    for stage, values in {"sft": sft, "reward": reward, "ppo": ppo}.items():
        values |= common | {"output_dir": f"out/{stage}"}
        if stage == "ppo":
            del values["lora_r"]
        (tmp_path / f"set/{stage}.yaml").write_text(yaml.safe_dump(values))

    monkeypatch.chdir(tmp_path)

    def report_of(method):
        return json.loads((tmp_path / f"out/{method}-report/report.json").read_text(encoding="utf-8"))

    def run(*words):
        code, printed = kochat("run", "set", *words)
        assert code == 0, printed
        return printed

    printed = run("--dry-run")
    assert not (tmp_path / "out").exists()
    assert printed.count("\n$ python") == 5
    run()
    weights = (tmp_path / "out/merged/model.safetensors").read_bytes()
    (tmp_path / "out/ppo/metrics.json").unlink()
    shutil.rmtree(tmp_path / "out/ppo/checkpoint-2")
    before = (tmp_path / "out/sft/metrics.json").stat().st_mtime
    printed = run()
    assert "goes on from checkpoint-1" in printed
    assert (tmp_path / "out/sft/metrics.json").stat().st_mtime == before
    assert json.loads((tmp_path / "out/ppo/metrics.json").read_text())["episode"] == 4
    assert (tmp_path / "out/merged/model.safetensors").read_bytes() == weights
    assert (tmp_path / "out/merged-1/model.safetensors").read_bytes() == weights
    assert (tmp_path / "out/report/report.html-1").is_file()
    assert run().count("done") >= 5

    # Two methods in PPO's place, on what is there.
    for method in ("dpo", "kto"):
        values = common | {"sft_model_path": "out/sft", "output_dir": f"out/{method}", "max_steps": 2}
        values |= {"train_files": [kochatgpt_files["reward"]], "per_device_train_batch_size": 2}
        del values["lora_r"]
        (tmp_path / f"set/{method}.yaml").write_text(yaml.safe_dump(values))
    printed = run("--methods", "dpo", "kto")
    assert (tmp_path / "out/sft/metrics.json").stat().st_mtime == before
    assert {"set, dpo", "set, kto"} <= set(re.findall(r"set, \w+", printed))
    for method in ("dpo", "kto"):
        page = (tmp_path / f"out/{method}-report/report.html").read_text(encoding="utf-8")
        assert f"What {method.upper()} changed" in page
        assert max(row[method]["tokens"] for row in report_of(method)["answers"]) <= 4
