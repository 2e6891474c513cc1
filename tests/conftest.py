"""Shared inputs: a tiny base made on the spot, and real data where it is at hand. What takes long is made once.

Tests run in a process a core (`make test`), each with one thread: more threads than cores only wait for one another.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when the libraries are imported. Each worker has a cache of tokenized rows of its own.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=tempfile.mkdtemp(prefix="kochat-cache-"))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from kochat_trl.cli.main import main
from kochat_trl.models.tokenizer import load_tokenizer
from tests.tiny import PAIRS, ROOT, random_adapter, run_script

import pytest
import torch
from accelerate import PartialState
from filelock import FileLock

pytest.register_assert_rewrite("tests.ppo")  # helpers compare runs
torch.set_num_threads(1)
PartialState(cpu=True)  # the tests run on the CPU, also where there is a GPU

SHARED = ROOT.parent / "shared"


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(
            "no real KoChatGPT files and kogpt2 tokenizer beside this checkout: they have no licence, or another"
        )
    return SHARED


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Chromium, driven by Playwright."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine; it is a browser, which no Python package brings")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that a function fills, for all workers: the first that asks makes it, the others wait for it.

    A name is one fixture's: of two, the one whose tests happen to run first would make the folder of both.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers

    def folder_made_once(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = root / f"once-{name}", root / f"once-{name}.done"
        fixture = sys._getframe(1).f_code
        maker = f"{fixture.co_name} of {fixture.co_filename}"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                fill(folder)
                done.write_text(maker)
            assert done.read_text() == maker, f"{name!r} is made by two fixtures: {maker}, {done.read_text()}"
        return folder

    return folder_made_once


@pytest.fixture(scope="session")
def tiny_base(made_once: Callable[..., Path]) -> str:
    """A tiny GPT-2 laid out as kogpt2 is on the Hub, by the project's own script, hardly trained."""

    def fill(folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text("\n".join(f"{prompt} {good} {bad}" for prompt, good, bad in PAIRS * 20), encoding="utf-8")
        run_script("scripts/make_tiny_base.py", "--text", text, "--output", folder / "base", "--steps", 30)

    return str(made_once("tiny", fill) / "base")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_base: str):
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="session")
def tiny_sft(tiny_base: str, tiny_tokenizer, made_once: Callable[..., Path]) -> str:
    """An SFT output on the tiny base."""
    from kochat_trl.models.loading import load_causal_lm

    return str(made_once("sft", random_adapter(load_causal_lm, tiny_base, tiny_tokenizer, seed=1)))


@pytest.fixture(scope="session")
def tiny_reward(tiny_base: str, tiny_tokenizer, made_once: Callable[..., Path]) -> str:
    """A reward model on the tiny base."""
    from kochat_trl.models.loading import new_reward_model

    return str(made_once("reward", random_adapter(new_reward_model, tiny_base, tiny_tokenizer, seed=0)))


@pytest.fixture(scope="session")
def kochatgpt_files(made_once: Callable[..., Path]) -> dict[str, str]:
    """One small file for each stage, in KoChatGPT's shapes (JSON arrays named .jsonl)."""
    records = {
        "sft": [{"prompt": p, "completion": good, "tokens": 9} for p, good, _ in PAIRS],
        "reward": [
            {"prompt": p, "completion_0": bad, "completion_1": good, "completion_2": "음", "ranking": [1, 0, 2]}
            for p, good, bad in PAIRS
        ],
        "ppo": [{"prompt": p} for p, _, _ in PAIRS],
    }

    def fill(folder: Path) -> None:
        for stage, content in records.items():
            text = "\ufeff" + json.dumps(content, ensure_ascii=False, indent=4)
            (folder / f"kochatgpt_{stage}.jsonl").write_text(text, encoding="utf-8")

    folder = made_once("data", fill)
    return {stage: str(folder / f"kochatgpt_{stage}.jsonl") for stage in records}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a file into the test's folder and return its path."""

    def write_file(name: str, content: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def kochat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run `kochat …` in this process; return its exit code and what it printed."""

    def run_command(*words: object, width: int = 100) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kochat", *map(str, words)])
        monkeypatch.setenv("COLUMNS", str(width))
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run_command


@pytest.fixture
def recipe() -> Callable[..., None]:
    """Run a recipe in this process, as `python recipes/STAGE.py ARGUMENTS` does."""
    return lambda stage, *arguments: run_script(f"recipes/{stage}.py", *arguments)


BLOCKED_SOCKET = '''
"""Stands in a process's path: every connection that leaves this machine is written down and refused."""
import os, socket

def refuse(what):
    with open(os.environ["KOCHAT_NETWORK_LOG"], "a") as log:
        log.write(f"{what}\\n")
    raise OSError(f"no network in tests: {what}")

connect, lookup = socket.socket.connect, socket.getaddrinfo
LOCAL = ("127.0.0.1", "::1", "localhost", socket.gethostname(), None)

def guarded_connect(self, address):
    if isinstance(address, tuple) and address[0] not in LOCAL:
        refuse(address)
    return connect(self, address)

def guarded_lookup(host, *args, **kwargs):
    if host not in LOCAL:
        refuse(host)
    return lookup(host, *args, **kwargs)

socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_lookup
'''


@dataclass
class Finished:
    """A command that ran to its end: its exit code, all it printed, and what it tried to reach."""

    code: int
    text: str
    network: str


@pytest.fixture(scope="session")
def run_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Run `python ARGUMENTS` from the project's root with the network blocked and without HF_HUB_OFFLINE."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCKED_SOCKET)

    def run(*arguments: str, offline: bool = False, cwd: Path = ROOT, timeout: int = 300) -> Finished:
        log = folder / "network.log"
        log.unlink(missing_ok=True)
        variables = {k: v for k, v in os.environ.items() if k not in ("CI", "HF_HUB_OFFLINE")}
        path = os.pathsep.join(map(str, filter(None, (folder, os.environ.get("PYTHONPATH"), ROOT))))
        variables |= {"PYTHONPATH": path, "KOCHAT_NETWORK_LOG": str(log)}
        variables |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        command = [sys.executable, *map(str, arguments)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=cwd, env=variables, timeout=timeout, **output)
        return Finished(done.returncode, done.stdout, log.read_text() if log.exists() else "")

    return run


@pytest.fixture(scope="session")
def launch(run_command: Callable[..., Finished]) -> Callable[..., Finished]:
    """`accelerate launch` a recipe, in one or two CPU processes of one thread each."""

    def launch_recipe(recipe: str, *arguments: str, processes: int = 1, **kwargs) -> Finished:
        config = {1: "configs/accelerate/cpu.yaml", 2: "configs/accelerate/ddp.yaml"}[processes]
        # Port 0 is a free one. accelerate's own, 29500, would be that of every launch at the same moment.
        options = ["--config_file", config, "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
        return run_command("-m", "accelerate.commands.launch", *options, f"recipes/{recipe}.py", *arguments, **kwargs)

    return launch_recipe
