"""Ctrl-C in `kochat run`: nothing is left running when it returns, behind a launcher neither."""

import fcntl
import os
import signal
import sys
import threading
import time

from kochat_trl.desk.workflow.pipeline import Step, run_plan
from kochat_trl.errors import UserError

import pytest
from rich.console import Console

# As accelerate's: it ends at a signal, and leaves its child to itself.
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
RECIPE = """
import fcntl, pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])

def save(number, frame):
    with open(folder / "signals", "a") as file:
        file.write(f"{number}\\n")
    if seconds:
        time.sleep(seconds)
        (folder / "saved").write_text("")
        raise SystemExit

signal.signal(signal.SIGINT, save), signal.signal(signal.SIGTERM, save)
lock = open(folder / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
(folder / "lock").rename(folder / "started")
time.sleep(60)
"""


@pytest.fixture
def heard():
    """Signals raise KeyboardInterrupt, so that a failure ends no test run; a shell's background job ignores Ctrl-C."""
    before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path, heard):
    """Run a plan whose recipe takes so many seconds to end, 0 for never, and send this process signals meanwhile."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "recipe.py").write_text(RECIPE)

    def start_plan(seconds, *numbers):
        def send():
            while not (tmp_path / "started").exists():
                time.sleep(0.05)
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

        sender = threading.Thread(target=send)
        sender.start()
        command = [sys.executable, tmp_path / "launcher.py", tmp_path / "recipe.py", tmp_path, str(seconds)]
        try:
            run_plan([Step("ppo", tmp_path, list(map(str, command)), "new")], Console())
        finally:
            sender.join()

    return start_plan


def is_running(folder):
    """Whether the recipe holds its lock: a process id says less, as one that has ended keeps it for a while."""
    with open(folder / "started") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_launcher_left_behind_is_waited_for(number, start, tmp_path, capfd):
    with pytest.raises(UserError, match="ppo was stopped"):
        start(2, number)
    assert (tmp_path / "saved").exists()
    assert not is_running(tmp_path)
    assert (tmp_path / "signals").read_text() == f"{number:d}\n"  # once: a recipe obeys a second one at once
    assert "PPO finishes its update and saves" in capfd.readouterr().out
    assert signal.getsignal(number) == signal.default_int_handler


def test_a_second_signal_kills_the_group(start, tmp_path):
    with pytest.raises(UserError, match="ppo was stopped"):
        start(0, signal.SIGINT, signal.SIGINT)
    assert not (tmp_path / "saved").exists()
    assert not is_running(tmp_path)


def test_a_signal_that_was_ignored_stays_so(start, tmp_path):
    """As under nohup, or in the background of a shell: what was started so is not stopped by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pytest.raises(UserError, match="ppo was stopped"):
        start(2, signal.SIGINT, signal.SIGTERM)
    assert (tmp_path / "signals").read_text() == f"{signal.SIGTERM:d}\n"
