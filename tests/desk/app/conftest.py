"""The page as `kochat app` serves it: a process of its own, as it is used."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tiny import ROOT

import pytest


class Served:
    """`kochat app …`, at `url`, until it is killed."""

    def __init__(self, folder: Path, *words: object):
        command = [sys.executable, "-m", "kochat_trl.cli.main", "app", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.log = folder / "app.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        lines = iter(self.process.stdout.readline, "")
        said = next((line for line in lines if line.startswith("http://")), None)
        assert said, self.log.read_text()
        self.url = said.split()[0]

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start `kochat app` with these words, in the test's folder."""
    started: list[Served] = []

    def start(*words: object) -> Served:
        started.append(Served(tmp_path, *words))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.kill()
