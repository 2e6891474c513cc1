"""Stopping a run and going on with it: signals, the random generators, and which folder is a whole checkpoint.

A checkpoint is written under the name `checkpoint-N.unfinished` and renamed when all of it is there, so a run that is
killed at any moment leaves the last good one.
"""

import logging
import random
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from kochat_trl.errors import UserError

import numpy as np
import torch
from transformers.trainer_utils import get_last_checkpoint

FILES = ("weights.safetensors", "optimizer.pt", "ppo.json", "trainer_state.json")
logger = logging.getLogger(__name__)


def find_checkpoint(output_dir: str, given: str | bool) -> Path:
    """The folder `given`, or with True the last checkpoint in `output_dir`; `UserError` if it is none, or not whole."""
    folder = get_last_checkpoint(output_dir) if given is True and Path(output_dir).is_dir() else str(given)
    if folder is None or not all((Path(folder) / name).is_file() for name in FILES):
        raise UserError(f"{output_dir if folder in (None, 'True') else folder}: no checkpoint of PPO there")
    return Path(folder)


def drop_old_checkpoints(newest: Path, keep: int | None) -> None:
    """Delete all checkpoints beside `newest` but the last `keep` to be written (save_total_limit); none without it."""
    folders = [path for path in newest.parent.glob("checkpoint-*") if path.name[11:].isdigit()]
    folders.sort(key=lambda path: (path == newest, path.stat().st_mtime))
    for path in folders[: -keep if keep else 0]:
        shutil.rmtree(path)


class CaughtSignals:
    """Notes the first SIGTERM or Ctrl-C instead of dying of it; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "CaughtSignals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        logger.warning("%s: finishing this update, then saving a checkpoint", signal.Signals(number).name)
        self.__exit__()

    def obey(self) -> None:
        raise SystemExit(128 + (self.number or signal.SIGTERM))


def random_state() -> dict[str, Any]:
    """The global generators of this process. Nothing here draws from them; a callback may."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
