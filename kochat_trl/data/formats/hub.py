"""Datasets on the Hub, and folders that are laid out as these are → records; `datasets` reads them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kochat_trl.data.formats.beginning import Located
from kochat_trl.data.formats.columnar import without_nulls
from kochat_trl.data.formats.lines import PACKED_SUFFIXES
from kochat_trl.errors import UserError

# No name on the Hub ends so.
DATA_SUFFIXES = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".xlsx", ".xls", ".zip"}
DATA_SUFFIXES |= PACKED_SUFFIXES
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def is_dataset(name: str) -> bool:
    """Whether `name` is a folder, or a dataset on the Hub: `owner/name`, with `/subset`, with `:split`."""
    if os.path.exists(name):
        return os.path.isdir(name)
    place = _without_split(name)
    if os.path.isdir(place) or _subset_of_folder(place):
        return True
    return _ON_HUB.fullmatch(name) is not None and _is_no_file(name)


def read_dataset(name: str) -> Iterator[Located]:
    """The rows of a dataset as a stream, without what is null inside a column.

    `name` is `owner/name` on the Hub, or a folder; with `/subset` for a config that its README.md declares, and with
    `:split` for another split than `train`. Raises `UserError` if it can't be loaded.
    """
    from datasets import load_dataset  # takes seconds to import, and most data is in files
    from datasets.exceptions import DatasetsError

    place = name if os.path.isdir(name) else _without_split(name)
    split = name[len(place) + 1 :] or "train"
    subset = None
    if _subset_of_folder(place) or (not os.path.isdir(place) and place.count("/") == 2):
        place, _, subset = place.rpartition("/")
    try:
        for row in load_dataset(place, subset, split=split, streaming=True):
            yield None, {name: without_nulls(value) for name, value in row.items()}  # `datasets` fills them in
    except (DatasetsError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        reason = str(cause).partition("\nExample")[0].replace("\n", " ") if "Config name" in str(cause) else ""
        reason = f"{reason}, as {place}/SUBSET" if reason else str(cause).partition("\n")[0] or type(cause).__name__
        found = "" if os.path.isdir(place) else "there is no such file, and "
        raise UserError(f"{name}: {found}`datasets` can't load it: {reason}") from None


def _without_split(name: str) -> str:
    place, colon, split = name.rpartition(":")
    return place if colon and re.fullmatch(r"[\w.-]+", split) else name


def _subset_of_folder(place: str) -> bool:
    """Whether `place` is FOLDER/subset, where FOLDER's README.md declares subsets: this one, or others."""
    folder, _, subset = place.rstrip("/").rpartition("/")
    declared = _declared(Path(folder or "/")) if subset else set()
    return subset in declared or (bool(declared) and not os.path.exists(place) and _is_no_file(place))


def _is_no_file(name: str) -> bool:
    return Path(name).suffix not in DATA_SUFFIXES


def _declared(folder: Path) -> set[str]:
    """The names of the configs in the head of a folder's README.md; none if there is no such file."""
    import yaml

    try:
        head = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
        configs = yaml.safe_load(head)["configs"]
        return {config["config_name"] for config in configs}
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return set()
