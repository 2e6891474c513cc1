"""Whole checkpoints: a list of digests in each, written last, and checked before a run goes on from it.

`digests.json` has the size in bytes and the BLAKE2b digest of every file of the folder, the version of this format, and
its own digest. A checkpoint without it is another program's, or was cut short: its files can only be looked into.
"""

import hashlib
import json
import logging
import os
import zipfile
from contextlib import suppress
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError

DIGESTS = "digests.json"
SETTINGS = "resolved.yaml"  # with which a stage's checkpoint was made
VERSION = 1
# What a checkpoint without digests must have, each by one of its patterns. Trainers write the first last.
NEEDED = (("trainer_state.json",), ("*optim*",), ("*.safetensors", "*model*.bin", "*model*.pt", "*.distcp"))
logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write the list of a checkpoint's files, all of which are then on the disk, and not on their way to it.

    A file that a list has already, and that is older than that list, isn't read again.
    """
    listed, since, target = dict[str, Any](), 0, folder / DIGESTS
    with suppress(OSError, ValueError, KeyError):
        listed, since = json.loads(target.read_bytes())["files"], target.stat().st_mtime_ns
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != target):
        name, stat = path.relative_to(folder).as_posix(), path.stat()
        if stat.st_mtime_ns < since and name in listed and listed[name][0] == stat.st_size:
            files[name] = listed[name]
        elif path.suffix != ".partial":  # of a file that was being replaced when a run was killed
            with path.open("r+b") as stream:
                files[name] = [stat.st_size, _digest(stream)]
                os.fsync(stream.fileno())
    partial = folder / f".{DIGESTS}.partial"
    with partial.open("wb") as stream:
        stream.write(_list(files))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(target)


def check_checkpoint(folder: Path) -> None:
    """Raise `UserError` if a file of a checkpoint isn't as it was written, and name the last one that is whole.

    One without digests is taken, with a warning, if it has what it must have and that can be read.
    """
    if fault := fault_of(folder):
        last, _ = last_checkpoint(folder.parent)
        rest = "there is no whole one beside it: start anew, in another output_dir"
        if last:
            rest = f"the last whole one is gone on from by --resume_from_checkpoint {last}"
        raise UserError(f"{folder}: {fault}; {rest}")
    if not (folder / DIGESTS).is_file():
        logger.warning("%s has no %s: that its files are as they were written can't be told", folder, DIGESTS)


def last_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint, and what is wrong with each after it.

    One without digests was cut short if there are others with, or if it has no settings: a stage writes them after all
    else, but for the digests.
    """
    found = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    found.sort(key=lambda path: int(path.name[11:]), reverse=True)
    cut = f"has no {DIGESTS}, which is written last"
    faults: dict[Path, str] = {}
    for path in sorted(found, key=lambda path: not (path / DIGESTS).is_file()):  # stable: still the last first
        listed = any((path / name).is_file() for name in (DIGESTS, SETTINGS))
        if fault := fault_of(path) if listed else cut:
            faults[path] = fault
            continue
        after = found[: found.index(path)]
        return path, [f"{each.name}: {faults.get(each, cut)}" for each in after]
    return None, [f"{each.name}: {faults[each]}" for each in found]


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by the file; None if nothing is, or if it has no digests to tell it by."""
    if not (folder / DIGESTS).is_file():
        return _seen_fault(folder)
    text = (folder / DIGESTS).read_bytes()
    try:
        known = json.loads(text)
        version, files = known["version"], known["files"]
    except (ValueError, KeyError, TypeError):
        return f"{DIGESTS} can't be read"
    if version != VERSION:
        return f"{DIGESTS} is of version {version} of the format, and this program knows version {VERSION}"
    if text != _list(files):
        return f"{DIGESTS} isn't as it was written"
    for name, (size, digest) in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (there := (folder / name).stat().st_size) != size:
            return f"{name} has {there:,} bytes, and {size:,} were written"
        with (folder / name).open("rb") as stream:
            if _digest(stream) != digest:
                return f"{name} isn't as it was written"
    return None


def _list(files: Any) -> bytes:
    """The text of `digests.json`: of the same files always the same."""
    text = json.dumps({"version": VERSION, "files": files}, indent=0)
    return f'{text[:-2]},\n"digest": "{hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}"\n}}\n'.encode()


def _digest(stream: BufferedIOBase) -> str:
    return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _seen_fault(folder: Path) -> str | None:
    """What a look at the files of a checkpoint without digests finds: what was cut, not what was changed."""
    for patterns in NEEDED:
        if not any(path for pattern in patterns for path in folder.rglob(pattern)):
            return f"has no {' or '.join(patterns)}"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":  # its length, a header that says where the last tensor ends, tensors
                with path.open("rb") as stream:
                    length = int.from_bytes(stream.read(8), "little")
                    header = json.loads(stream.read(min(length, path.stat().st_size)))
                ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
                if path.stat().st_size != 8 + length + max(ends, default=0):
                    raise ValueError
            elif path.suffix in (".pt", ".pth"):  # an archive, whose table of contents is at its end
                zipfile.ZipFile(path).close()
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return f"{path.relative_to(folder)} can't be read: it was cut short, or is none"
    return None
