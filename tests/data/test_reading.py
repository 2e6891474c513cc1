"""Records of several files, where they came from, and what becomes of those that can't be read."""

import json

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.reading import read_as, read_parsed
from kochat_trl.data.records import BrokenRecordsError, Dialogue, Prompt, Ranking
from kochat_trl.errors import UserError

import pytest


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    paths[0].write_text(json.dumps([{"prompt": "가"}, {"prompt": ""}]))
    paths[1].write_text(json.dumps([{"prompt": 1}, {"prompt": "나"}]))
    return list(map(str, paths))


def test_what_was_read_comes_with_its_place_and_the_rest_is_listed(files):
    invalid = []
    parsed = list(read_as("prompt", files, invalid, skip_invalid=True))
    assert [record for _, record in parsed] == [Prompt("가"), Prompt("나")]
    assert [(source.file, source.index) for source, _ in parsed] == [(files[0], 0), (files[1], 1)]
    assert [(error.source.file, error.source.index) for error in invalid] == [(files[0], 1), (files[1], 0)]


def test_all_files_are_read_before_their_errors_are_raised(files):
    with pytest.raises(BrokenRecordsError, match=r"^2 of 4 records can't be used"):
        list(read_as("prompt", files, []))


def test_a_limit_counts_records_of_all_files_and_what_is_beyond_it_is_not_refused(files):
    assert [record for _, record in read_as("prompt", files, [], limit=1)] == [Prompt("가")]
    with pytest.raises(BrokenRecordsError, match=r"^2 of 3 records"):
        list(read_as("prompt", files, [], limit=3))


def test_a_limit_counts_records_and_not_what_is_made_of_them(files, write):
    instances = [{"input": "1", "output": "하나"}, {"input": "2", "output": "둘"}]
    path = write("seeds.jsonl", json.dumps([{"instruction": "세어 줘.", "instances": instances}]))
    found = list(read_as("sft", [path, files[0]], [], limit=1))
    assert [record for _, record in found] == [Dialogue(("세어 줘.\n\n1", "하나")), Dialogue(("세어 줘.\n\n2", "둘"))]
    assert {source.index for source, _ in found} == {0}
    made = read_parsed(lambda raw: [*raw.fields, *raw.fields], [files[0]], [])
    assert [name for _, name in made] == ["prompt"] * 4


def test_files_are_read_as_the_options_say(write):
    one = write("one.json", '[{"prompt": "가", "completion_0": "나", "completion_1": "다", "ranking": [1, 0]}]')
    other = write("other.json", '[{"물어본 것": "가", "chosen": "나", "rejected": "다"}]')
    options = ReadingOptions(ranking_order="rank_of", columns={"물어본 것": "prompt"})
    found = [record for _, record in read_as("preference", [one, other], [], options=options)]
    assert found == [
        Ranking("가", ("나", "다"), ((1,), (0,)), ranking=[1, 0]),
        Ranking("가", ("나", "다"), ((0,), (1,))),
    ]


def test_a_column_that_no_file_has_is_refused(files):
    for limit in (None, 9):
        options = ReadingOptions(columns={"promt": "prompt"})
        with pytest.raises(UserError, match=r"no column 'promt'. Did you mean 'prompt'\? There are: prompt"):
            list(read_as("prompt", files, [], options=options, skip_invalid=True, limit=limit))
    options = ReadingOptions(columns={"later": "ignore"})
    assert len(list(read_as("prompt", files, [], options=options, limit=1))) == 1  # it may be beyond the limit


def test_labelled_answers_to_one_prompt_are_compared(write):
    """Across files, the system message told apart; what has nothing to compare it with is listed."""
    records = [
        {"prompt": "가", "completion": "좋음", "label": True},
        {"prompt": "나", "completion": "홀로", "label": True},
        {"prompt": "가", "completion": "나쁨", "label": False, "system": "S"},
    ]
    rest = [
        {"prompt": "가", "completion": "나쁨", "label": "false"},
        {"prompt": "가", "completion": "둘 다", "label": True},
        {"prompt": "가", "completion": "둘 다", "label": 0},
    ]
    files = [write("one.json", json.dumps(records)), write("other.json", json.dumps(rest))]
    invalid = []
    ((source, ranking),) = read_as("preference", files, invalid)
    assert (source.file, source.index) == (files[0], 0)
    assert ranking == Ranking("가", ("좋음", "나쁨"), ((0,), (1,)))
    places = [(files.index(error.source.file), error.source.index) for error in invalid]
    assert sorted(places) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert {error.fault for error in invalid} == {"unpaired"}
    expected = {
        "an answer labelled false to the same prompt, to compare it with",
        "an answer labelled true to the same prompt, to compare it with",
        "the label that the same answer has elsewhere",
    }
    assert {error.expected for error in invalid} == expected
