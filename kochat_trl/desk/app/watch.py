"""The runs under a folder: how far each is, its curves, its samples, and what its report doubts. It only reads.

A run tells of itself in files: `progress.json` while it goes on, `metrics.json` when it is done, PPO's `samples.jsonl`,
and the report beside it. Each version of a file is read once, and what is kept of it is what is shown.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from kochat_trl.desk.workflow.page import CURVES, MADE_BY, REWARDS, line_plot, points_of, titles_of
from kochat_trl.errors import UserError
from kochat_trl.files import PROGRESS

import psutil

METRICS = "metrics.json"
SILENT = 300.0  # seconds after which a run on another machine, which can't be asked, is taken for stopped
LARGEST = 1e100  # of a number in a plot: its axes reckon with squares
_SHOWN = {"step"}.union(*CURVES.values())
_DRAWING = Lock()  # matplotlib's settings are one set for all threads


def find_runs(root: Path) -> "dict[str, RunFolder]":
    """The runs under `root`, which may be one itself, by their paths from there. No link to a folder is followed.

    A run is a folder with the `progress.json` of a stage, or with a `metrics.json` that has a history, beside the
    `resolved.yaml` of a stage. One where such a file isn't JSON is listed, and its summary has the `error`; what else
    goes by these names is somebody else's, and is left out, as is what can't be read.
    """
    root = root.resolve()
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not re.match(r"checkpoint-\d", name))
        run = RunFolder(root, Path(folder))
        if not {PROGRESS, METRICS}.isdisjoint(files) and run.told:
            found[run.name] = run
    return found


@dataclass(frozen=True)
class RunFolder:
    """The folder `path` of a run. No file is opened that lies outside `root`, once links are followed."""

    root: Path
    path: Path

    @property
    def name(self) -> str:
        return _plain(self.path.relative_to(self.root).as_posix())

    @property
    def told(self) -> dict[str, Any] | None:
        """What the run told last, and when it `wrote` it; None if this is no run, or is gone.

        A finished run may go on from a checkpoint: its `metrics.json` is the last word unless `progress.json` is newer.
        """
        stage = self._read(self.path / "resolved.yaml", _stage_of)
        files = {METRICS: {"stage": stage and stage[1]}, PROGRESS: {}}
        found = []
        for name, known in files.items():
            if read := self._read(self.path / name, _told):
                wrote, told = read
                error = told["error"] and f"{name} {told['error']}"
                found.append(told | known | {"wrote": wrote, "error": error, "done": name == METRICS})
        ours = [told for told in found if told["error"] or told["stage"] in CURVES]
        return max(ours, key=lambda told: told["wrote"], default=None)

    def summary(self) -> dict[str, Any]:
        """What a list of runs shows: `name`, `stage`, `state`, `step` of `max_steps`, `figures` by title.

        `age` is in seconds, since the run last wrote how far it is. `state` is "running", "stopped" or "finished".
        `report` says whether there is one. `error` is what is wrong with the file that says all this, or None.
        """
        told = self.told or _NOTHING | {"error": "it is gone"}
        history = told["history"]
        step = max((entry["step"] for entry in history if "step" in entry), default=None)
        return {
            "name": self.name,
            "stage": told["stage"],
            "state": _state(told),
            "step": step if told["done"] else told["step"],
            "max_steps": step if told["done"] else told["max_steps"],
            "age": max(0.0, time.time() - told["wrote"]),
            "figures": {title: points_of(history, key)[1][-1] for key, title in _titles(told).items()},
            "report": self._report(told) is not None,
            "error": told["error"],
        }

    def detail(self) -> dict[str, Any]:
        """The summary, and the `curves` that there are; `updates` that have samples, and those of the last of them that
        is whole; the `worries` of the report, each with `sign` and `advice`.
        """
        told = self.told or _NOTHING
        titles = _titles(told).items()
        points = {key: points_of(told["history"], key)[0] for key, _ in titles}
        updates = [*self._updates()]
        found = self._report(told)
        return self.summary() | {
            "curves": [{"key": key, "title": title, "points": len(points[key])} for key, title in titles],
            "samples": self.samples(updates[-1]) if updates else [],
            "updates": updates,
            "worries": found[1] if found else [],
        }

    def samples(self, update: int) -> list[dict[str, Any]]:
        """The samples of one update; none if it isn't there, or not whole."""
        if update not in (updates := self._updates()):
            return []
        start, end, _ = updates[update]
        found = []
        with suppress(OSError), (self.path / "samples.jsonl").open("rb") as stream:
            stream.seek(start)
            for line in stream.read(end - start).splitlines():
                with suppress(ValueError, RecursionError):
                    found.append(_plain(json.loads(line)))
        return found

    def plot(self, key: str) -> str:
        """A curve as SVG, complete in itself; one point alone draws nothing. Raises `UserError` if there is none."""
        told = self.told or _NOTHING
        if key not in (titles := _titles(told)):
            raise UserError(f"{self.name}: no curve {key!r}; there are {', '.join(titles) or 'none'}")
        x, y = points_of(told["history"], key)
        return _drawn(tuple(x), tuple(y))

    def report(self) -> Path | None:
        """The page of the report that names this run: in its folder, or beside it, where `kochat run` puts it."""
        found = self._report(self.told or _NOTHING)
        return found[0] if found else None

    def _report(self, told: dict[str, Any]) -> tuple[Path, list[dict[str, str]]] | None:
        """The page, and its worries about this run. One that is older than what the run told is of an earlier run."""
        beside = self.path.parent
        for folder in (self.path / "report", beside / "report", beside / f"{self.path.name}-report"):
            read = self._read(folder / "report.json", _reported)
            if not read or read[0] < told["wrote"] or not self._inside(folder / "report.html"):
                continue
            runs, worries = read[1]
            for name, output in runs.items():
                if Path(output).absolute().parts[-2:] == self.path.parts[-2:]:
                    its = [worry for worry in worries if worry.get("run") == name]
                    return folder / "report.html", [
                        {key: str(w.get(key, "")) for key in ("sign", "advice")} for w in its
                    ]
        return None

    def _updates(self) -> dict[int, list[int]]:
        """Where the samples of each update stand in the file: first byte, end, number; without a last one not whole."""
        read = self._read(self.path / "samples.jsonl", _spans)
        return read[1] if read else {}

    def _inside(self, file: Path) -> bool:
        return file.is_file() and file.resolve().is_relative_to(self.root)

    def _read(self, file: Path, make: Callable[[bytes], Any]) -> tuple[float, Any] | None:
        """When a file was written, and what `make` makes of it, once for each version; None if that is None.

        So a poll costs a look at each file, and a file of 40 MB a few tenths of a second each time that it has grown.
        """
        with suppress(OSError):
            if self._inside(file):
                found = file.stat()
                version = found.st_mtime_ns, found.st_size, found.st_ino
                if _READ.get((file, make), (None,))[0] != version:
                    _READ[file, make] = version, make(file.read_bytes())
                made = _READ[file, make][1]
                return None if made is None else (found.st_mtime, made)
        return None


_READ: dict[tuple[Path, Callable[[bytes], Any]], tuple[Any, ...]] = {}  # the version, and what was made of it
_NOTHING: dict[str, Any] = {"stage": None, "step": None, "max_steps": None, "host": platform.node(), "pid": -1}
_NOTHING |= {"history": [], "wrote": 0.0, "error": None, "done": False}


def _told(data: bytes) -> dict[str, Any] | None:
    """What metrics.json or progress.json says, and of its history the numbers that are shown; None if it has none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return _NOTHING | {"error": "is not JSON"}
    history = content.get("history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        return None
    shown = [{key: v for key, v in log.items() if _is_shown(key, v)} for log in history if isinstance(log, dict)]
    numbers = {key: content[key] for key in ("step", "max_steps", "pid") if type(content.get(key)) is int}
    words = {key: content[key] for key in ("stage", "host") if isinstance(content.get(key), str)}
    return _NOTHING | _plain({"history": shown} | numbers | words)


def _is_shown(key: str, value: Any) -> bool:
    return (key in _SHOWN or key.startswith(REWARDS)) and type(value) in (int, float) and abs(value) <= LARGEST


def _stage_of(data: bytes) -> str | None:
    """The stage whose settings a resolved.yaml has, by the words that its lines begin with: YAML takes long to read."""
    keys = {line.partition(b":")[0] for line in data.splitlines()}
    return next((stage for stage, key in MADE_BY.items() if key.encode() in keys), None)


def _reported(data: bytes) -> tuple[dict[str, str], list[dict[str, Any]]] | None:
    """The runs that a report names, and its worries."""
    with suppress(ValueError, RecursionError):
        content = json.loads(data)
        if isinstance(content, dict) and isinstance(content.get("runs"), dict):
            runs = {name: output for name, output in content["runs"].items() if isinstance(output, str)}
            worries = content.get("worries")
            return _plain((runs, [w for w in worries if isinstance(w, dict)] if isinstance(worries, list) else []))
    return None


def _spans(data: bytes) -> dict[int, list[int]]:
    """The samples of `ppo/log.py: write_samples` by update: first byte, end, number of lines.

    All updates have as many, so that a last one with fewer than the first is still being written.
    """
    spans: dict[int, list[int]] = {}
    for line in re.finditer(rb'^\{"update": (\d{1,9}),.*\n', data, re.MULTILINE):
        span = spans.setdefault(int(line[1]), [line.start(), 0, 0])
        span[1:] = line.end(), span[2] + 1
    last = next(reversed(spans), None)
    if last is not None and spans[last][2] < next(iter(spans.values()))[2]:
        del spans[last]
    return spans


def _titles(told: dict[str, Any]) -> dict[str, str]:
    """The curves that a run has, and their titles."""
    history = told["history"]
    titles = titles_of(told["stage"], [history]) if told["stage"] in CURVES else {}
    return {key: title for key, title in titles.items() if any(key in entry for entry in history)}


def _state(told: dict[str, Any]) -> str:
    if told["done"]:
        return "finished"
    return "running" if _is_running(told) else "stopped"


def _is_running(told: dict[str, Any]) -> bool:
    """Whether the process that wrote is alive; on another machine, whether it wrote lately."""
    if told["host"] != platform.node():
        return time.time() - told["wrote"] < SILENT
    try:
        process = psutil.Process(told["pid"])
        # One that has started since has only the number of the one that wrote. Its start is known to the second.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < told["wrote"] + 2
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError):
        return False


@lru_cache(maxsize=256)
def _drawn(x: tuple[float, ...], y: tuple[float, ...]) -> str:
    with _DRAWING:
        return line_plot({"": (x, y)})


def _plain(value: Any) -> Any:
    """`value` as JSON that any reader takes: no NaN nor infinity, no halves of characters."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(text, parse_constant=lambda _: None)
