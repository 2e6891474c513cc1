"""System messages: where a record has one, and what is no such message."""

from kochat_trl.data.records import (
    Dialogue,
    Prompt,
    Ranking,
    RawRecord,
    RecordError,
    Source,
    parse_preference,
    parse_prompt,
    parse_sft,
)

import pytest

SYSTEM = {"role": "system", "content": "친절하게 답해."}
TURNS = [{"role": "user", "content": "가"}, {"role": "assistant", "content": "나"}]
OF_FIELDS = [
    (parse_sft, {"prompt": "가", "completion": "나"}),
    (parse_sft, {"instruction": "가", "output": "나"}),
    (parse_sft, {"Q": "가", "A": "나"}),
    (parse_sft, {"messages": TURNS}),
    (parse_preference, {"prompt": "가", "chosen": "나", "rejected": "다"}),
    (parse_preference, {"prompt": "가", "completion_0": "나", "completion_1": "다", "ranking": [0, 1]}),
    (parse_prompt, {"prompt": "가"}),
    (parse_prompt, {"messages": TURNS}),
]


def raw(fields):
    return RawRecord(Source("a.jsonl", 0, 1), fields)


@pytest.mark.parametrize(("parse", "fields"), OF_FIELDS)
def test_a_record_of_fields_has_its_system_message_under_system(parse, fields):
    record = parse(raw(fields | {"system": "친절하게 답해."}))
    assert record.system == "친절하게 답해."
    messages = record.messages(0) if isinstance(record, Ranking) else record.messages
    assert list(messages[:2]) == [SYSTEM, TURNS[0]]
    for blank in (None, "", " \n"):
        assert parse(raw(fields | {"system": blank})) == parse(raw(fields))
    with pytest.raises(RecordError, match=r"field 'system': found \['a'\], expected a non-empty string"):
        parse(raw(fields | {"system": ["a"]}))


def test_messages_may_begin_with_one():
    assert parse_sft(raw({"messages": [SYSTEM, *TURNS]})) == Dialogue(("가", "나"), "친절하게 답해.")
    assert parse_prompt(raw({"messages": [SYSTEM, *TURNS]})) == Prompt("가", "친절하게 답해.")
    assert parse_sft(raw({"messages": [SYSTEM | {"content": ""}, *TURNS]})) == Dialogue(("가", "나"))
    with pytest.raises(RecordError, match="field 'turn 2': found 'system', expected user"):
        parse_sft(raw({"messages": [*TURNS, SYSTEM, TURNS[1]]}))
    with pytest.raises(RecordError, match="found 1 turns"):
        parse_sft(raw({"messages": [SYSTEM, TURNS[0]]}))


def test_a_prompt_is_written_as_it_is_read():
    for prompt in (Prompt("가"), Prompt("가", "나")):
        assert parse_prompt(raw(prompt.fields)) == prompt
    assert Prompt("가").fields == {"prompt": "가"}
