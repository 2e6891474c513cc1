import json
from collections.abc import Callable
from pathlib import Path

from kochat_trl.desk.curation.audit import check_files
from tests.desk.curation.helpers import Cleaned, lines

import pytest


@pytest.fixture
def clean(tmp_path: Path) -> Callable[..., Cleaned]:
    """Clean a file with these contents: records, which make a JSON array, or text."""

    def clean_contents(contents: str | list, **kwargs) -> Cleaned:
        path = tmp_path / "dirty"
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
        return Cleaned(tmp_path, path, **kwargs)

    return clean_contents


@pytest.fixture
def check(write):
    """Audit records, written as JSON lines."""
    return lambda records, **kwargs: check_files([write("data.jsonl", lines(records))], **kwargs).files[0]
