"""New files and folders that never overwrite what is there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TextIO

from kochat_trl.errors import UserError


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
        with stream:
            yield stream
        refuse_existing(target)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


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


def check_output_dir(output_dir: Path) -> None:
    """Raise `UserError` if `output_dir` holds anything."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file; the output goes into a folder of its own")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(
            f"{output_dir} is not empty. Choose another output folder; a recipe also takes "
            f"--overwrite_output_dir, which renames the old one, or --resume_from_checkpoint {output_dir}/checkpoint-N"
        )
