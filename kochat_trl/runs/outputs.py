"""What a run leaves behind, and the checks before it starts.

`<output_dir>/` holds the adapter or model (safetensors), the tokenizer with its template, `resolved.yaml` (every
value in force, a `--config` again), `metrics.json`, `environment.json`, a model card, and `data_report.txt`
where records were left out or cut. While the run goes on there is `progress.json`, and after it if it broke off.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kochat_trl.checkpoints import SETTINGS, check_checkpoint, seal
from kochat_trl.errors import UserError
from kochat_trl.files import PROGRESS, check_output_dir, full_disk_told, replace_file, set_aside
from kochat_trl.models.remote import allow_remote_code
from kochat_trl.models.sharding import keep_from_ddp
from kochat_trl.ppo.checkpoint import drop_old_checkpoints
from kochat_trl.rows.rows import DataReport
from kochat_trl.runs.cards import model_card
from kochat_trl.settings.keys import Stage
from kochat_trl.settings.parse import Arguments, changed_setting, parse_arguments

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.logging import RichHandler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

PROJECT = Path(__file__).parents[2]
COUNTS = "counts.json"
# What the trainers of transformers and TRL count over a run.
COUNTED = ["_initial_global_step", "_globalstep_last_logged", "_tr_loss", "_total_loss_scalar", "_total_train_tokens"]
COUNTED += ["_metrics"]
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
logger = logging.getLogger(__name__)


def start_run(stage: Stage) -> Arguments:
    """Parse the command line, set up logging and the seed, and refuse an output folder that is in use.

    Without `--config` it is kogpt2's, whatever the working folder. A checkpoint to go on from must have been made with
    the settings in force.
    """
    default_config = os.path.relpath(PROJECT / f"configs/kogpt2/{stage}.yaml")
    args = parse_arguments(stage, default_config, sys.argv[1:])
    state = PartialState(cpu=args.training.use_cpu)
    width = None if sys.stderr.isatty() else 200  # rich takes a log file for 80 columns wide
    handler = RichHandler(console=Console(stderr=True, width=width), show_time=False, show_path=False, show_level=False)
    level = logging.INFO if state.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    output_dir = Path(args.training.output_dir)
    checkpoint = args.training.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise UserError(f"there is no checkpoint {checkpoint}; give a folder such as {output_dir}/checkpoint-100")
    if checkpoint is not None:
        check_checkpoint(Path(checkpoint))
        _refuse_other_settings(Path(checkpoint), args)
    elif not args.recipe.overwrite_output_dir:
        check_output_dir(output_dir)
    state.wait_for_everyone()  # no process may write before all have looked
    if checkpoint is None and args.recipe.overwrite_output_dir and state.is_main_process:
        set_aside(output_dir)
    state.wait_for_everyone()
    if args.training.trust_remote_code:
        allow_remote_code("trust_remote_code: true")
    set_seed(args.training.seed)
    return args


def _refuse_other_settings(checkpoint: Path, args: Arguments) -> None:
    made_with = checkpoint / SETTINGS
    if not made_with.is_file():
        logger.warning("%s has no %s: that its settings are those in force now can't be told", checkpoint, SETTINGS)
        return
    then, now = yaml.safe_load(made_with.read_text(encoding="utf-8")), args.resolved
    before, processes = len([*checkpoint.glob("rng_state_*.pth")]) or 1, PartialState().num_processes
    if before != processes:
        then, now = _of_processes(then, before), _of_processes(now, processes)
    if key := changed_setting(then, now, args.given):
        raise UserError(
            f"{checkpoint}: was made with {key}: {then[key]}, and {now[key]} is in force now. Go on with "
            "what it was made with, or start anew in another output_dir"
        )


def _of_processes(settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """Settings with the rows of a step in place of the two keys that make them, of so many processes."""
    accumulated, rows = "gradient_accumulation_steps", "per_device_train_batch_size"
    product = settings[rows] * settings[accumulated] * processes
    others = {key: value for key, value in settings.items() if key not in (accumulated, rows)}
    return others | {f"{rows} · {accumulated} · processes": product}


class SealCheckpoints(TrainerCallback):
    """Puts the settings in force into every checkpoint, what its trainer counts, and the digests of all: it is whole.

    The counts are put back where a run goes on from it. transformers and TRL start at 0 there, and the losses and
    tokens of the run would be those of a part of it. Only then are older checkpoints dropped (save_total_limit).
    """

    def __init__(self, trainer: Any, args: Arguments):
        self.trainer, self.resumed = trainer, args.training.resume_from_checkpoint
        self.text = yaml.safe_dump(args.resolved, allow_unicode=True)
        self.keep, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        file = Path(self.resumed or "") / COUNTS
        for name, value in json.loads(file.read_text(encoding="utf-8")).items() if file.is_file() else ():
            now = getattr(self.trainer, name)
            if isinstance(now, torch.Tensor):
                now.fill_(value)
            elif isinstance(now, dict):  # {train or eval: {metric: its values since it was last logged}}
                for mode, metrics in value.items():
                    now[mode].update(metrics)
            else:
                setattr(self.trainer, name, value)

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes its random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            counts = {name: getattr(self.trainer, name) for name in COUNTED if hasattr(self.trainer, name)}
            if counts:
                replace_file(folder / COUNTS, json.dumps(counts, default=float))  # a tensor of one number
            replace_file(folder / SETTINGS, self.text)
            seal(folder)
            drop_old_checkpoints(folder, self.keep, state.best_model_checkpoint)


class ShowProgress(TrainerCallback):
    """Keeps `progress.json`: how far the run is, on which machine and in which process, and its log so far.

    All of it is written at each log: from 500 entries on at every second, from 1000 on at every third and so on, so
    that what a log costs stays the same. A disk that takes no more doesn't stop the run here.
    """

    def __init__(self, stage: Stage):
        self.known = {"stage": stage, "host": platform.node(), "pid": os.getpid()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self._write(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if len(state.log_history) % (1 + len(state.log_history) // 500) == 0:
            self._write(args, state)

    def _write(self, args: Any, state: Any) -> None:
        if state.is_world_process_zero:
            logs = [{key: _finite(value) for key, value in log.items()} for log in state.log_history]
            told = self.known | {"step": state.global_step, "max_steps": state.max_steps, "history": logs}
            with suppress(OSError):
                replace_file(Path(args.output_dir) / PROGRESS, json.dumps(told, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """None for a number that JSON doesn't have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def train(trainer: Any, args: Arguments) -> dict[str, Any]:
    """Train, from a checkpoint if one is given, and evaluate where there is held-out data; returns the metrics."""
    trainer.add_callback(SealCheckpoints(trainer, args))
    trainer.add_callback(ShowProgress(args.stage))
    keep_from_ddp(trainer.model)
    checkpoint = args.training.resume_from_checkpoint
    started = time.perf_counter()
    with full_disk_told(args.training.output_dir):
        done = trainer.train(**({} if checkpoint is None else {"resume_from_checkpoint": checkpoint}))
        if done is None:  # PPO: the update whose policy is kept, and its evaluation
            state = trainer.state
            kept = (args.training.load_best_model_at_end and state.best_global_step) or state.log_history[-1]["step"]
            found = {key: value for log in state.log_history if log["step"] == kept for key, value in log.items()}
            return found | {"train_runtime": time.perf_counter() - started}
        return done.metrics | (trainer.evaluate() if trainer.eval_dataset is not None else {})


def finish_run(
    trainer: Trainer,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: Arguments,
    metrics: dict[str, Any],
    data_report: DataReport,
    next_step: str,
) -> None:
    """Save everything that a run leaves behind (on the first process only), and say where it is."""
    state = PartialState()
    output_dir = Path(args.training.output_dir)
    if state.is_main_process:
        made_in = environment(args)
        lines = str(data_report)
        with full_disk_told(output_dir):
            model.save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
            texts = {SETTINGS: yaml.safe_dump(args.resolved, allow_unicode=True), "environment.json": _json(made_in)}
            texts |= {"README.md": model_card(output_dir, args, metrics, made_in["data_sha256"])}
            texts |= {"data_report.txt": lines} if lines else {}
            texts |= {"metrics.json": _json(metrics | {"history": trainer.state.log_history})}  # last: it says "done"
            for name, text in texts.items():
                replace_file(output_dir / name, text)
            (output_dir / PROGRESS).unlink(missing_ok=True)
        if lines:
            logger.info("The records that were left out or cut are listed in %s/data_report.txt", output_dir)
        shown = {key: round(value, 4) for key, value in metrics.items() if isinstance(value, float)}
        logger.info("%s", shown)
        logger.info("Written to %s. Next: %s", output_dir, next_step)
    state.wait_for_everyone()


def environment(args: Arguments) -> dict[str, Any]:
    """What it takes to run this again: command, versions, commit, hardware, seed and hashes of the data."""
    state = PartialState()
    gpu = state.device.type == "cuda"
    files = [*args.recipe.train_files, *args.recipe.eval_files]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(state.device) if gpu else platform.processor() or "cpu",
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(state.device) if gpu else None,
        "peak_ram_bytes": peak_ram(),
        "world_size": state.num_processes,
        "backend": torch.distributed.get_backend() if state.use_distributed else None,
        "seed": args.training.seed,
        "data_sha256": {file: _sha256(file) for file in files if Path(file).is_file()},  # not of a dataset
    }


def peak_ram() -> int | None:
    """The most memory that this process has held, in bytes; None where there is no /proc to say so."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.is_file() else None


def _sha256(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
