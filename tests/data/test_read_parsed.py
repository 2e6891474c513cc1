import json

from kochat_trl.data.readers import read_parsed
from kochat_trl.data.records import BrokenRecordsError, Prompt, parse_prompt

import pytest


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    paths[0].write_text(json.dumps([{"prompt": "가"}, {"prompt": ""}]))
    paths[1].write_text(json.dumps([{"prompt": 1}, {"prompt": "나"}]))
    return list(map(str, paths))


def test_what_was_read_comes_with_its_place_and_the_rest_is_listed(files):
    invalid = []
    parsed = list(read_parsed(files, parse_prompt, invalid, skip_invalid=True))
    assert [record for _, record in parsed] == [Prompt("가"), Prompt("나")]
    assert [(source.file, source.index) for source, _ in parsed] == [(files[0], 0), (files[1], 1)]
    assert [(error.source.file, error.source.index) for error in invalid] == [(files[0], 1), (files[1], 0)]


def test_all_files_are_read_before_their_errors_are_raised(files):
    with pytest.raises(BrokenRecordsError, match=r"^2 of 4 records can't be used"):
        list(read_parsed(files, parse_prompt, []))


def test_a_limit_counts_records_of_all_files_and_what_is_beyond_it_is_not_refused(files):
    assert [record for _, record in read_parsed(files, parse_prompt, [], limit=1)] == [Prompt("가")]
    with pytest.raises(BrokenRecordsError, match=r"^2 of 3 records"):
        list(read_parsed(files, parse_prompt, [], limit=3))
