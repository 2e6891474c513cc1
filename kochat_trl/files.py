"""New files and folders that never overwrite what is there, and what to say where they can't be written."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TextIO

from kochat_trl.checkpoints import last_checkpoint
from kochat_trl.errors import UserError

PROGRESS = "progress.json"  # how far a run is; gone when it has finished


@contextmanager
def new_file(path: str | Path) -> Iterator[TextIO]:
    """Open a new UTF-8 text file, which appears under `path` when it is complete; LF line ends as written.

    Raises `UserError` if there is something under that name already.
    """
    target = Path(path)
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = partial.open("x", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(f"{target}: can't be written: {error.strerror}") from None
    try:
        with full_disk_told(target.parent):
            with stream:
                yield stream
            refuse_existing(target)
            partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def name_of_new(stream: TextIO) -> str:
    """The name under which a file will appear that `new_file` opened; of another stream, its own name."""
    return re.sub(r"(^|/)\.([^/]*)\.\d+\.partial$", r"\1\2", str(getattr(stream, "name", "")))


def refuse_existing(path: str | Path) -> None:
    """Raise `UserError` if there is something under `path`: to be called before long work starts."""
    if Path(path).exists():
        raise UserError(f"{path} exists already; choose another name, or remove it first")


def set_aside(folder: Path) -> None:
    """Rename `folder`, if it is there, to the first free `folder-N`: a run starts clean, and nothing is lost."""
    if folder.exists():
        free = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
        folder.rename(free)
        print(f"What was in {folder} is now in {free}.")


def is_unused(folder: Path) -> bool:
    """Whether a run may start in `folder`: there is nothing, or no more than how far another came."""
    own = {PROGRESS, f".{PROGRESS}.partial"}
    return not folder.is_dir() or all(path.name in own for path in folder.iterdir())


def check_output_dir(output_dir: Path) -> None:
    """Raise `UserError` if `output_dir` holds anything but how far a run came that left nothing else."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file; the output goes into a folder of its own")
    if not is_unused(output_dir):
        raise UserError(
            f"{output_dir} is not empty. Choose another output folder; a recipe also takes "
            f"--overwrite_output_dir, which renames the old one, or --resume_from_checkpoint {output_dir}/checkpoint-N"
        )


def replace_file(path: Path, text: str) -> None:
    """Write `text` under `path` in one go: whoever looks finds what was there before, or all of the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# How a full disk is told where it isn't by an OSError: safetensors, and torch's two ways.
_FULL = ("No space left", "os error 28", "unexpected pos", "failed writing file")


def _says_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in _FULL)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: `datasets` wraps what it meets."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def full_disk_told(folder: str | Path) -> Iterator[None]:
    """Tell a full disk as such, by a `UserError` that names `folder` and what can be gone on with."""
    try:
        yield
    except Exception as error:
        if not any(map(_says_full, _causes(error))):
            raise
        checkpoint, _ = last_checkpoint(Path(folder))
        rest = f"; --resume_from_checkpoint {checkpoint} then goes on" if checkpoint else ""
        there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**20
        raise UserError(
            f"{folder}: the disk is full ({free:,.0f} MiB are free now). What was saved before is whole: make room, "
            f"and start again{rest}"
        ) from error
