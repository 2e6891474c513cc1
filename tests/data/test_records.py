"""System messages: where a record has one, and what is no such message."""

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.parse import parse
from kochat_trl.data.records import Dialogue, Prompt, Ranking, RecordError, Source

import pytest

SYSTEM = {"role": "system", "content": "친절하게 답해."}
TURNS = [{"role": "user", "content": "가"}, {"role": "assistant", "content": "나"}]
OF_FIELDS = [
    ("sft", {"prompt": "가", "completion": "나"}),
    ("sft", {"instruction": "가", "output": "나"}),
    ("sft", {"Q": "가", "A": "나"}),
    ("sft", {"messages": TURNS}),
    ("preference", {"prompt": "가", "chosen": "나", "rejected": "다"}),
    ("preference", {"prompt": "가", "completion_0": "나", "completion_1": "다", "ranking": [0, 1]}),
    ("prompt", {"prompt": "가"}),
    ("prompt", {"messages": TURNS}),
    ("kto", {"prompt": "가", "completion": "나", "label": True}),
]


def read(kind, fields):
    """The one record of `kind` that these fields are."""
    (record,) = parse(RawRecord(Source("a.jsonl", 0, 1), fields), kind)
    return record


@pytest.mark.parametrize(("kind", "fields"), OF_FIELDS)
def test_a_record_of_fields_has_its_system_message_under_system(kind, fields):
    record = read(kind, fields | {"system": "친절하게 답해."})
    assert record.system == "친절하게 답해."
    messages = record.messages(0) if isinstance(record, Ranking) else record.messages
    assert list(messages[:2]) == [SYSTEM, TURNS[0]]
    for blank in (None, "", " \n"):
        assert read(kind, fields | {"system": blank}) == read(kind, fields)
    with pytest.raises(RecordError, match=r"field 'system': found \['a'\], expected a non-empty string"):
        read(kind, fields | {"system": ["a"]})


def test_messages_may_begin_with_one():
    assert read("sft", {"messages": [SYSTEM, *TURNS]}) == Dialogue(("가", "나"), "친절하게 답해.")
    assert read("prompt", {"messages": [SYSTEM, *TURNS]}) == Prompt("가", "친절하게 답해.")
    assert read("sft", {"messages": [SYSTEM | {"content": ""}, *TURNS]}) == Dialogue(("가", "나"))
    with pytest.raises(RecordError, match="field 'turn 2': found 'system', expected user"):
        read("sft", {"messages": [*TURNS, SYSTEM, TURNS[1]]})
    with pytest.raises(RecordError, match="found 1 turns"):
        read("sft", {"messages": [SYSTEM, TURNS[0]]})


def test_a_system_message_is_told_once():
    """Beside messages that begin with one it has to be the same."""
    fields = {"messages": [SYSTEM, *TURNS]}
    assert read("sft", fields | {"system": SYSTEM["content"]}) == read("sft", fields)
    with pytest.raises(
        RecordError, match=r"field 'system': found .*, expected the system message that the messages begin"
    ):
        read("sft", fields | {"system": "반말로 답해."})


def test_a_prompt_is_written_as_it_is_read():
    for prompt in (
        Prompt("가"),
        Prompt("가", "나"),
        Prompt("다", None, ("가", "나")),
        Prompt("다", "라", ("가", "나")),
    ):
        assert read("prompt", prompt.fields) == prompt
    assert Prompt("가").fields == {"prompt": "가"}
    assert Prompt("다", "라", ("가", "나")).fields == {
        "prompt": [*TURNS, {"role": "user", "content": "다"}],
        "system": "라",
    }
