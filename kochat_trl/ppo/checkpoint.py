"""Stopping a run and going on with it: checkpoints, signals, and the generators of random numbers.

A checkpoint is written under the name `checkpoint-N.unfinished` and renamed when all of it is there, so a run that is
killed at any moment leaves the last good one.
"""

import json
import logging
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from kochat_trl.checkpoints import check_checkpoint, last_checkpoint, seal
from kochat_trl.errors import UserError
from kochat_trl.files import set_aside
from kochat_trl.ppo.objective import RunningMoments
from kochat_trl.ppo.roles import Roles, adapter_parameters

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_callback import ExportableState

FILES = ("weights.safetensors", "optimizer.pt", "ppo.json", "trainer_state.json")
logger = logging.getLogger(__name__)


def find_checkpoint(output_dir: str, given: str | bool) -> Path:
    """The folder `given`, or with True the last checkpoint in `output_dir`; `UserError` if it is none, or not whole."""
    folder, faults = last_checkpoint(Path(output_dir)) if given is True else (Path(str(given)), [])
    for fault in faults:
        logger.warning("%s/%s", output_dir, fault)
    if folder is None:
        raise UserError(f"{output_dir}: no checkpoint of PPO there that is whole")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"{folder}: no checkpoint of PPO there, as it has no {missing[0]}")
    if given is not True:
        check_checkpoint(folder)
    return folder


def save_checkpoint(trainer: Any) -> Path:
    """Write all that the next update of `trainer`, a PPOTrainer, depends on, and return the folder."""
    accelerator, state = trainer.accelerator, trainer.state
    folder = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
    if state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpointed(trainer.roles).items()}
        save_file(weights, str(unfinished / "weights.safetensors"))
        training = {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
        }
        torch.save(training, unfinished / "optimizer.pt")
        ppo = {"kl_coef": trainer.kl_coef, "score_moments": vars(trainer.score_moments), "run": _identity(trainer)}
        (unfinished / "ppo.json").write_text(json.dumps(ppo), encoding="utf-8")
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(unfinished / "trainer_state.json"))
    accelerator.wait_for_everyone()
    trainer._save_rng_state(str(unfinished))  # the global generators: nothing here draws from them, a callback may
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        seal(unfinished)
        set_aside(folder)
        unfinished.rename(folder)
        drop_old_checkpoints(folder, trainer.args.save_total_limit, state.best_model_checkpoint)
    accelerator.wait_for_everyone()
    return folder


def load_checkpoint(trainer: Any, path: Path, state_class: Any) -> None:
    """Put `trainer` where it was when it wrote the checkpoint in `path`. Raises `UserError` if it is of another run."""
    ppo = json.loads((path / "ppo.json").read_text(encoding="utf-8"))
    now = _identity(trainer)
    then = now | ppo["run"]  # an older version's lacks some names
    if changed := [name for name in now if now[name] != then[name]]:
        pairs = ", ".join(f"{name}: {then[name]} then, {now[name]} now" for name in changed)
        raise UserError(f"{path}: is of another run ({pairs}); use the config that it was made with")
    load_weights(trainer.roles, path)
    training = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    trainer.optimizer.load_state_dict(training["optimizer"])
    trainer.lr_scheduler.load_state_dict(training["scheduler"])
    if training["scaler"]:
        trainer.accelerator.scaler.load_state_dict(training["scaler"])
    trainer.kl_coef, trainer.score_moments = ppo["kl_coef"], RunningMoments(**ppo["score_moments"])
    trainer.state = state_class.load_from_json(str(path / "trainer_state.json"))
    trainer.state.is_local_process_zero = trainer.is_local_process_zero()
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    best = Path(trainer.state.best_model_checkpoint or path)
    if not best.is_dir():
        best = path.parent / best.name  # both were moved
        trainer.state.best_model_checkpoint = str(best)
    if trainer.args.load_best_model_at_end and not best.is_dir():
        raise UserError(f"{path}: {best.name}, the best so far, is gone; put it beside this one")
    trainer._load_callback_state()
    trainer._load_rng_state(str(path))


def load_weights(roles: Roles, path: Path) -> None:
    """Give `roles` the weights in the checkpoint `path`; `UserError` if it is of other models."""
    weights, parameters = load_file(path / "weights.safetensors"), checkpointed(roles)
    here, there = ({name: w.shape for name, w in some.items()} for some in (parameters, weights))
    if odd := sorted(name for name in here | there if here.get(name) != there.get(name)):
        raise UserError(f"{path}: is of other models; its first odd weight is {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def checkpointed(roles: Roles) -> dict[str, nn.Parameter]:
    """All weights that are trained, and the adapters and heads of all roles."""
    model = roles.models["policy"]
    kept = {id(p) for adapter in getattr(model, "peft_config", ()) for p in adapter_parameters(model, adapter)}
    return {
        name: parameter
        for name, parameter in roles.named_parameters()
        if parameter.requires_grad or id(parameter) in kept or name.split(".")[1].endswith("_head")
    }


def _identity(trainer: Any) -> dict[str, Any]:
    """What must be the same for a run to go on as if it had never stopped."""
    names = ["seed", "batch_size", "mini_batch_size", "micro_batch_size", "num_ppo_epochs", "response_length"]
    names += ["advantages", "num_generations"]
    return {name: getattr(trainer.args, name) for name in names} | {"prompts": len(trainer.train_dataset)}


def drop_old_checkpoints(newest: Path, keep: int | None, best: str | None = None) -> None:
    """Delete all checkpoints beside `newest` but the last `keep` to be written (save_total_limit); none without it.

    The newest and the best are always kept, and count.
    """
    always = {newest, Path(best or newest)}
    folders = [path for path in newest.parent.glob("checkpoint-*") if path.name[11:].isdigit()]
    folders.sort(key=lambda path: (path in always, path.stat().st_mtime))
    for path in folders[: -max(keep, len(always)) if keep else 0]:
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
