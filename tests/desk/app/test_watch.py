"""Runs are found, told apart by state and stage, and shown, whatever else stands in their folders."""

import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from kochat_trl.desk.app.watch import SILENT, RunFolder, find_runs
from kochat_trl.desk.workflow.page import CURVES
from kochat_trl.errors import UserError
from kochat_trl.settings.parse import resolve_arguments
from tests.tiny import ROOT

import pytest
import yaml

NASTY = "</text><script>alert(1)</script>\0\u202e가"
LOGS = [{"step": step, "objective/scores": step / 2, "objective/kl": 0.1, "lr": 1.0} for step in (1, 2, 3)]


@pytest.fixture
def outputs(tmp_path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def put(file: Path, content: object, age: float = 0) -> Path:
    """Write a file, `age` seconds ago; what isn't text as JSON, as runs do."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    os.utime(file, (time.time() - age,) * 2)
    return file


def going(run: Path, age: float = 0, **told: object) -> Path:
    """A run that this process trains, unless it is told otherwise."""
    known = {"stage": "ppo", "step": 3, "max_steps": 9, "host": platform.node(), "pid": os.getpid(), "history": LOGS}
    return put(run / "progress.json", known | told, age)


def finished(run: Path, stage: str = "ppo", history: object = LOGS, age: float = 0) -> Path:
    put(run / "resolved.yaml", yaml.safe_dump(SETTINGS[stage]))
    return put(run / "metrics.json", {"train_runtime": 1.0, "history": history}, age)


SETTINGS = {stage: resolve_arguments(stage, str(ROOT / f"configs/tiny/{stage}.yaml"), []) for stage in CURVES}


def the(outputs: Path) -> RunFolder:
    (run,) = find_runs(outputs).values()
    return run


# --- Which runs there are


def test_runs_of_any_depth_by_their_paths(outputs, monkeypatch):
    finished(outputs / "demo/ppo")
    going(outputs / "실험/seed0/ppo")
    going(outputs / "ppo/checkpoint-5")
    put(outputs / "demo/ppo/value/adapter_config.json", {})
    monkeypatch.chdir(outputs.parent)
    assert {name: run.name for name, run in find_runs(Path("outputs")).items()} == {
        name: name for name in ("demo/ppo", "실험/seed0/ppo")
    }
    assert list(find_runs(outputs / "demo/ppo")) == ["."]
    assert find_runs(outputs / "not there") == {}


@pytest.mark.parametrize("stage", CURVES)
def test_a_finished_runs_stage_is_told_by_its_settings(outputs, stage):
    finished(
        outputs / "run", stage, [{"step": 40, "loss": 2.0}, {"step": 50, "loss": 1.5}, {"step": 50, "eval_loss": 1}]
    )
    summary = the(outputs).summary()
    assert (summary["stage"], summary["state"], summary["step"], summary["max_steps"]) == (stage, "finished", 50, 50)
    assert summary["figures"].get(CURVES[stage].get("loss")) == (None if stage == "ppo" else 1.5)


def test_what_is_somebody_elses_is_left_out(outputs):
    put(outputs / "a/metrics.json", {"accuracy": 1})
    put(outputs / "b/metrics.json", {"history": LOGS})  # of no stage
    put(outputs / "c/progress.json", [1, 2])
    put(outputs / "d/progress.json", {"stage": "bake", "history": []})
    put(outputs / "e/progress.json", {"stage": ["ppo"], "history": LOGS})
    (outputs / "f/metrics.json").mkdir(parents=True)
    os.mkfifo(outputs / "f/progress.json")  # whoever opens it waits for ever
    assert find_runs(outputs) == {}


@pytest.mark.parametrize("broken", ["", '{"stage": "ppo", "hist', "[" * 100_000, '{"history": ' + "9" * 5000, "\udcff"])
def test_a_broken_file_is_told_and_breaks_no_other_run(outputs, broken):
    finished(outputs / "whole")
    put(outputs / "broken/progress.json", broken)
    runs = find_runs(outputs)
    assert runs["whole"].summary()["error"] is None
    summary = runs["broken"].summary()
    assert (summary["error"], summary["state"]) == ("progress.json is not JSON", "stopped")
    detail = runs["broken"].detail()
    assert (detail["curves"], detail["samples"], detail["figures"]) == ([], [], {})


def test_a_run_that_is_gone_is_told(outputs):
    going(outputs / "run")
    run = the(outputs)
    (outputs / "run").rename(outputs.parent / "elsewhere")
    assert run.detail()["error"] == "it is gone"
    assert run.report() is None


def test_nothing_outside_is_opened(outputs):
    """Neither by a link to a folder, nor by one to a file; the folder itself may be one."""
    elsewhere = outputs.parent / "elsewhere"
    finished(elsewhere / "ppo")
    put(elsewhere / "samples.jsonl", samples(1))
    put(elsewhere / "report.json", {"runs": {"ppo": "in/ppo"}})
    put(elsewhere / "report.html", "")
    (outputs / "link").symlink_to(elsewhere)
    (outputs / "out").mkdir()
    for name in ("metrics.json", "resolved.yaml"):
        (outputs / "out" / name).symlink_to(elsewhere / "ppo" / name)
    finished(outputs / "in/ppo", age=9)
    (outputs / "in/ppo/samples.jsonl").symlink_to(elsewhere / "samples.jsonl")
    (outputs / "in/report").symlink_to(elsewhere)
    (outputs.parent / "alias").symlink_to(outputs)
    runs = find_runs(outputs.parent / "alias")
    assert list(runs) == ["in/ppo"]
    detail = runs["in/ppo"].detail()
    assert (detail["samples"], detail["updates"], detail["report"]) == ([], [], False)
    (outputs / "in/ppo/samples.jsonl").unlink()
    (outputs / "in/ppo/samples.jsonl").symlink_to(put(outputs / "kept.jsonl", samples(1)))
    assert runs["in/ppo"].detail()["updates"] == [1]


# --- Its state


def test_a_run_is_running_until_its_process_is_killed(outputs):
    """Nobody need have asked after it since."""
    file = going(outputs / "run")
    program = (
        "import json, os, pathlib, sys, time; file = pathlib.Path(sys.argv[1]); told = json.loads(file.read_text())"
    )
    program += "; file.write_text(json.dumps(told | {'pid': os.getpid()})); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, file], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert the(outputs).summary()["state"] == "running"
        process.kill()
        deadline = time.monotonic() + 60
        while the(outputs).summary()["state"] == "running":
            assert time.monotonic() < deadline
        assert process.returncode is None
    assert the(outputs).summary()["state"] == "stopped"


def test_another_process_with_the_number_of_one_that_ended_is_not_the_run(outputs):
    """This one began after the run had written."""
    going(outputs / "run", age=10**6)
    summary = the(outputs).summary()
    assert summary["state"] == "stopped"
    assert summary["age"] == pytest.approx(10**6, abs=60)


@pytest.mark.parametrize("pid", [None, "1", -1, 0.5, True, 10**30])
def test_a_process_that_cannot_be_is_not_running(outputs, pid):
    going(outputs / "run", pid=pid)
    assert the(outputs).summary()["state"] == "stopped"


def test_a_run_on_another_machine_is_running_if_it_wrote_lately(outputs):
    going(outputs / "run", host="elsewhere", pid=1, age=SILENT - 60)
    assert the(outputs).summary()["state"] == "running"
    going(outputs / "run", host="elsewhere", pid=1, age=SILENT + 1)
    assert the(outputs).summary()["state"] == "stopped"


def test_a_finished_run_that_goes_on_is_running(outputs):
    finished(outputs / "run", "sft", age=60)
    assert the(outputs).summary()["state"] == "finished"
    going(outputs / "run", stage="sft", step=5)
    summary = the(outputs).summary()
    assert (summary["state"], summary["step"], summary["max_steps"]) == ("running", 5, 9)
    finished(outputs / "run", "sft", age=-1)  # and was killed before it took its progress.json away
    assert the(outputs).summary()["state"] == "finished"


# --- What it shows


def test_figures_and_curves_grow_with_the_run(outputs):
    going(outputs / "run", history=LOGS[:1], age=5)
    assert the(outputs).summary()["figures"] == {"PPO score": 0.5, "PPO KL from SFT, nats a response": 0.1}
    going(outputs / "run", history=[*LOGS, {"step": 4, "objective/scores": None, "rewards/polite/mean": 0.25}])
    detail = the(outputs).detail()
    assert detail["figures"]["PPO score"] == 1.5
    points = {curve["key"]: (curve["title"], curve["points"]) for curve in detail["curves"]}
    assert points == {
        "objective/scores": ("PPO score", 3),
        "objective/kl": ("PPO KL from SFT, nats a response", 3),
        "rewards/polite/mean": ("PPO rewards/polite", 1),
    }


def tags(svg: str) -> set[str]:
    return {element.tag for element in ET.fromstring(svg).iter()}


def test_a_curve_is_an_image_by_itself(outputs):
    going(outputs / "run")
    svg = the(outputs).plot("objective/scores")
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox")
    assert svg.count("stroke: #4a90d9") == 1
    assert "#888888" in svg
    assert the(outputs).plot("objective/kl") != svg
    with pytest.raises(UserError, match=r"run: no curve 'lr'; there are objective/scores, objective/kl"):
        the(outputs).plot("lr")


def test_a_point_that_is_no_number_is_left_out(outputs):
    odd = ['{"a": NaN}', "1e999", "-Infinity", "null", '"9"', "true", "[1]", "1" + "0" * 400, "9e200"]
    logs = [f'{{"step": {i}, "objective/scores": {value}}}' for i, value in enumerate(["1", *odd, "2"])]
    text = f'{{"stage": "ppo", "history": [{", ".join(logs)}, 5, null]}}'
    put(outputs / "run/progress.json", text)
    detail = the(outputs).detail()
    assert [curve["points"] for curve in detail["curves"]] == [2]
    json.dumps(detail, allow_nan=False)
    tags(the(outputs).plot("objective/scores"))


@pytest.mark.parametrize("name", [NASTY.replace("/", "∕").replace("\0", ""), "$\\frac{", "_"])
def test_no_name_nor_key_is_more_than_text(outputs, name):
    going(outputs / "tame")
    key = f"rewards/{name}/{NASTY}\ud800/mean"
    going(outputs / name, history=[log | {key: 0.5} for log in LOGS], host=NASTY)
    put(outputs / name / "samples.jsonl", samples(1, prompt=NASTY, response="\ud800"))
    runs = find_runs(outputs)
    detail = runs[name].detail()
    assert detail["name"] == name
    told = json.dumps(detail, ensure_ascii=False).encode("utf-8")  # as a server sends it
    assert json.loads(told)["samples"][0]["prompt"] == NASTY
    assert len(detail["curves"]) == 3
    plain = tags(runs["tame"].plot("objective/kl"))
    for curve in detail["curves"]:
        svg = runs[name].plot(curve["key"])
        assert tags(svg) == plain
        assert "script" not in svg


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a name is text")
def test_a_folder_whose_name_is_no_text_has_a_name(outputs):
    going(outputs / os.fsdecode(b"run\xff"))
    assert list(find_runs(outputs)) == ["run?"]
    assert the(outputs).summary()["name"] == "run?"


# --- Samples


def samples(*updates: int, **fields: object) -> str:
    """Two samples of each update, as PPO writes them."""
    known = {"prompt": "물음\n", "response": "답", "ended": True, "score": 1.5, "kl": 0.0}
    rows = [{"update": update} | known | fields for update in updates for _ in range(2)]
    return "".join(json.dumps(row, ensure_ascii="\ud800" in fields.values()) + "\n" for row in rows)


def test_samples_are_those_of_the_last_update_that_is_whole(outputs):
    going(outputs / "run")
    file = put(outputs / "run/samples.jsonl", samples(1, 2))
    run = the(outputs)
    assert run.samples(1) == [json.loads(line) for line in samples(1).splitlines()]
    third = samples(3).splitlines(keepends=True)
    for more in (third[0][:20], third[0], third[0] + third[1][:-1]):
        file.write_text(samples(1, 2) + more, encoding="utf-8")
        detail = run.detail()
        assert (detail["updates"], {row["update"] for row in detail["samples"]}) == ([1, 2], {2})
        assert run.samples(3) == []
    file.write_text(samples(1, 2, 3), encoding="utf-8")
    assert (run.detail()["updates"], len(run.detail()["samples"])) == ([1, 2, 3], 2)
    file.write_text(samples(1), encoding="utf-8")  # a run that goes on drops what it makes again
    assert (run.detail()["updates"], run.samples(2)) == ([1], [])


def test_samples_that_are_none_are_left_out(outputs):
    going(outputs / "run")
    torn = '{"update": 1, "score": NaN}\n{"update": 1, "prom\nnull\n\n{"a": 1}\n{"update": "2"}\n'
    put(outputs / "run/samples.jsonl", torn)
    assert the(outputs).detail()["samples"] == [{"update": 1, "score": None}]


# --- The report


WORRIES = [{"run": run, "sign": f"{run}: {NASTY}", "advice": "Read."} for run in ("ppo", "dpo")]


@pytest.mark.parametrize("place", ["demo/report", "demo/dpo-report", "demo/dpo/report"])
def test_the_report_that_names_a_run_goes_with_it(outputs, place):
    finished(outputs / "demo/dpo", "dpo", age=9)
    finished(outputs / "demo/sft", "sft", age=9)
    put(outputs / place / "report.json", {"runs": {"ppo": "x/demo/ppo", "dpo": "x/demo/dpo"}, "worries": WORRIES})
    runs = find_runs(outputs)
    assert runs["demo/dpo"].summary()["report"] is False  # its page is written last
    page = put(outputs / place / "report.html", "<p>")
    assert runs["demo/dpo"].report() == page
    detail = runs["demo/dpo"].detail()
    assert detail["worries"] == [{"sign": f"dpo: {NASTY}", "advice": "Read."}]
    assert (runs["demo/sft"].report(), runs["demo/sft"].detail()["worries"]) == (None, [])
    finished(outputs / "demo/dpo", "dpo", age=-9)  # run again since
    assert runs["demo/dpo"].report() is None


@pytest.mark.parametrize(
    "report", ["[]", "{", '{"runs": ["ppo"]}', '{"runs": {"ppo": 1}}', '{"runs": {"ppo": "\\u0000"}}']
)
def test_a_report_that_is_none_is_left_out(outputs, report):
    finished(outputs / "ppo", age=9)
    put(outputs / "report/report.html", "")
    put(outputs / "report/report.json", report)
    assert the(outputs).report() is None
    put(outputs / "report/report.json", '{"runs": {"ppo": "outputs/ppo"}, "worries": [1, {"run": "ppo"}]}')
    assert the(outputs).detail()["worries"] == [{"sign": "", "advice": ""}]
