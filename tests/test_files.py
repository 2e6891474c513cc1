"""What can't be written is told, and what is replaced is replaced whole."""

import errno
import os
from pathlib import Path

from kochat_trl.checkpoints import last_checkpoint, seal
from kochat_trl.errors import UserError
from kochat_trl.files import PROGRESS, check_output_dir, full_disk_told, is_unused, new_file, replace_file

import pytest
import torch
from safetensors import SafetensorError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="only Linux has /dev/full, which takes a write as a full disk does"
)


def write_text(path: Path) -> None:
    path.write_text("가" * 100_000, encoding="utf-8")


def write_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(1_000_000)}, path)


def write_safetensors(path: Path) -> None:
    """It renames what it has written, so it is no use on /dev/full; the words are those it has on a full tmpfs."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "write",
    [pytest.param(write_text, marks=needs_full), pytest.param(write_torch, marks=needs_full), write_safetensors],
)
def test_a_full_disk_is_told_with_the_folder(tmp_path, write):
    (tmp_path / "file").symlink_to(FULL)
    with (
        pytest.raises(UserError, match=rf"{tmp_path}: the disk is full .*What was saved before is whole"),
        full_disk_told(tmp_path),
    ):
        write(tmp_path / "file")
    for step, whole in ((2, True), (9, False), (10, True)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            seal(tmp_path / f"checkpoint-{step}")
    assert last_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-10"
    with (
        pytest.raises(UserError, match=r"--resume_from_checkpoint \S*/checkpoint-10 then goes on"),
        full_disk_told(tmp_path),
    ):
        write(tmp_path / "file")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), full_disk_told(tmp_path):
        raise RuntimeError("of another kind")
    with pytest.raises(FileNotFoundError), full_disk_told(tmp_path):
        (tmp_path / "not there").read_text()


def fail_as_datasets_does():
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise RuntimeError("an error occurred while generating the dataset") from error


def test_a_full_disk_is_told_also_where_a_library_wraps_it(tmp_path):
    """Also of a folder that isn't there yet."""
    with pytest.raises(UserError, match="the disk is full"), full_disk_told(tmp_path / "not/there"):
        fail_as_datasets_does()


def test_a_new_file_whose_place_is_taken_is_refused(tmp_path):
    (tmp_path / f".a.{os.getpid()}.partial").touch()
    with pytest.raises(UserError, match="can't be written"), new_file(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()


@needs_full
def test_a_new_file_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    opened = Path.open

    def on_a_full_disk(path, mode, **settings):
        opened(path, mode).close()
        return opened(Path(FULL), "w", **settings)

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(UserError, match=f"{tmp_path}: the disk is full"), new_file(tmp_path / "a") as stream:
        stream.write("가" * 10_000)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    replace_file(path, "old")
    replace_file(path, "새것")
    assert path.read_text(encoding="utf-8") == "새것"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, "third")
    assert path.read_text(encoding="utf-8") == "새것"


def test_how_far_a_run_came_that_left_nothing_else_is_in_nobodys_way(tmp_path):
    assert is_unused(tmp_path / "not there")
    for name in (PROGRESS, f".{PROGRESS}.partial"):  # the second is of a run that was killed while it wrote
        (tmp_path / name).touch()
        assert is_unused(tmp_path)
        check_output_dir(tmp_path)
    (tmp_path / "samples.jsonl").touch()
    assert not is_unused(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        check_output_dir(tmp_path)
