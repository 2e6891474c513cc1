"""System messages in what is found in data, mended, made and shown."""

import json

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.records import Dialogue, Prompt, Source, conversation
from kochat_trl.desk.curation.build import answers_in, gather_answers, rank_answers, read_prompts
from kochat_trl.desk.curation.convert import template_tokenizer, text_rows
from kochat_trl.desk.curation.texts import ANSWERS, PROMPTS, SYSTEMS, texts, with_texts
from kochat_trl.errors import UserError
from kochat_trl.models.template import render
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.settings.keys import DataArguments
from tests.desk.curation.helpers import RANKED, SFT, Cleaned, found, lines, messages
from tests.tiny import parsed

import pytest

POLITE = {"system": "존댓말로 답해."}
TALK = messages("가", "나", "다", "라")
SPOKEN = {"messages": [{"role": "system", "content": "존댓말로 답해."}, *TALK["messages"]]}


def raw(fields):
    return RawRecord(Source("a.jsonl", 0, 1), fields)


def test_its_text_is_a_system_message_wherever_it_stands():
    spoken = texts(raw(SPOKEN))
    assert list(spoken) == [("messages", i, "content") for i in range(5)]
    assert [role for role, _ in spoken.values()] == [SYSTEMS, PROMPTS, ANSWERS, PROMPTS, ANSWERS]
    assert [text for _, text in spoken.values()] == ["존댓말로 답해.", *"가나다라"]
    assert texts(raw(SFT | POLITE)) == {
        ("prompt",): (PROMPTS, "질문"),
        ("completion",): (ANSWERS, "답"),
        ("system",): (SYSTEMS, "존댓말로 답해."),
    }
    assert texts(raw({"text": "<sys> S <usr> U <bot> A"})) == {
        ("text", "#", 1): (SYSTEMS, "S"),
        ("text", "#", 3): (PROMPTS, "U"),
        ("text", "#", 5): (ANSWERS, "A"),
    }
    changed = with_texts(SPOKEN, {("messages", 0, "content"): "S", ("messages", 1, "content"): "U"})
    assert [message["content"] for message in changed["messages"]] == ["S", "U", "나", "다", "라"]
    assert [message["role"] for message in changed["messages"]] == [message["role"] for message in SPOKEN["messages"]]
    assert SPOKEN["messages"][0]["content"] == "존댓말로 답해."
    assert "system" not in changed
    assert with_texts(SFT | POLITE, {("system",): "S"}) == SFT | {"system": "S"}
    assert with_texts({"text": " <usr> U <bot>A"}, {("text", "#", 1): "V"}) == {"text": " <usr> V <bot>A"}
    assert texts(raw({"messages": []})) == {}


def test_it_is_no_answer_and_no_prompt(check):
    file = check([SFT | {"system": "Be polite."}, {"messages": [SPOKEN["messages"][0], *TALK["messages"]]}])
    assert file.hangul == {"prompts": 1, "answers": 1, "system messages": 0.5}
    assert file.lengths["system messages, characters"].max == 10
    assert file.lengths["prompts, characters"].max == 2
    assert file.turns == {"2": 1, "4": 1}
    assert found(file) == {}
    assert found(check([SFT | {"system": "'존댓말"}])) == {("warning", "stray_quote"): [0]}
    assert found(check([SFT | {"system": 3}])) == {("error", "broken"): [0]}


def test_what_repeats_has_the_same_one(check, clean):
    other = {"system": "반말로 답해."}
    assert found(check([SFT, SFT | POLITE, SFT | other, SFT | POLITE])) == {
        ("warning", "duplicate"): [3],
        ("warning", "repeated_prompt"): [1, 2, 3],
    }
    near = {"system": "존댓말로  답해."}
    assert clean([SFT | POLITE, SFT | near, SFT | other]).faults == [(1, "dropped", ["near_duplicate"])]


def test_what_is_better_under_one_may_be_worse_under_another(check):
    turned = RANKED | {"ranking": [1, 0, 2]}
    assert ("warning", "contradiction") in found(check([RANKED | POLITE, turned | POLITE]))
    assert ("warning", "contradiction") not in found(check([RANKED | POLITE, turned]))


@pytest.mark.parametrize("fields", [{"prompt": "가"}, SFT, RANKED, TALK, SPOKEN])
def test_a_row_is_as_long_as_its_messages(check, tiny_tokenizer, fields):
    fields = fields if fields is SPOKEN else fields | POLITE
    (length,) = [check([fields], tokenizer=tiny_tokenizer).lengths["with template, tokens"]]
    if fields.keys() == {"prompt", "system"}:
        ids = encode_prompt(tiny_tokenizer, conversation("가", system="존댓말로 답해."))
    elif fields is SPOKEN or "messages" in fields:
        ids, _ = encode_dialogue(tiny_tokenizer, conversation(*"가나다라", system="존댓말로 답해."))
    else:
        answers = ("하나", "둘", "셋") if "ranking" in fields else ("답",)
        rows = [conversation("질문", answer, system="존댓말로 답해.") for answer in answers]
        ids = max((encode_dialogue(tiny_tokenizer, row)[0] for row in rows), key=len)
    assert length.max == len(ids)


# --- Cleaning


@pytest.mark.parametrize(
    "record",
    [
        SFT | POLITE,
        {"instruction": "질문", "input": "", "output": "답"} | POLITE,
        {"prompt": "가", "chosen": "나", "rejected": "다"} | POLITE,
        SPOKEN,
        {"messages": SPOKEN["messages"][:3]},
        TALK | POLITE,
        messages("가", "나") | POLITE,
        {"text": "<sys> 존댓말로 답해. <usr> 가 <bot> 나"},
    ],
)
def test_it_is_mended_and_survives(clean, record):
    (place,) = [place for place, (role, _) in texts(raw(record)).items() if role == SYSTEMS]
    cleaned = clean([with_texts(record, {place: "'존댓말로 답해."}), record | {"id": 1}], fixes=["stray_quote"])
    assert cleaned.records == [record, record | {"id": 1}]
    assert cleaned.faults == [(0, "changed", ["stray_quote"])]
    assert cleaned.again().summary.dropped == 1  # they are the same now


def test_a_tied_ranking_under_one_is_no_copy_of_one_without(clean):
    tied = RANKED | {"ranking": [0, [1, 2]]}
    cleaned: Cleaned = clean([tied, tied | POLITE, tied | POLITE], fixes=["duplicate"])
    assert cleaned.faults == [(2, "dropped", ["duplicate"])]


# --- Converting and showing


def test_converted_text_is_that_of_the_template(tiny_tokenizer):
    for record in (Dialogue(("가", "나"), "다"), Prompt("가", "다"), Dialogue(tuple("가나라마"), "다")):
        for tokenizer in (tiny_tokenizer, template_tokenizer()):
            (row,) = text_rows(record, 0, DataArguments(), tokenizer)
            expected = render(tokenizer, record.messages, prompt=isinstance(record, Prompt))
            assert "".join(row.values()) == expected
            assert expected.startswith("다\n\n### Instruction")


def test_converted_text_ends_where_an_answer_does(tiny_tokenizer, monkeypatch):
    """A newline after the end is the next turn's, as in the recipes' rows."""
    own = tiny_tokenizer.chat_template
    (row,) = text_rows(Dialogue(("가", "나")), 0, DataArguments(), tiny_tokenizer)
    assert row["completion"] == "나</s>"
    other = own.replace("message['content'] + eos_token", "message['content'] + '<mask>\\n'")
    assert own != other
    monkeypatch.setattr(tiny_tokenizer, "chat_template", other)
    (row,) = text_rows(Dialogue(("가", "나")), 0, DataArguments(), tiny_tokenizer)
    assert row["completion"] == "나<mask>"
    (row,) = text_rows(Dialogue(("가", "나", "다", "라")), 0, DataArguments(), tiny_tokenizer)
    assert row["text"].endswith("나<mask>\n### Instruction(명령어):\n다\n\n### Response(응답):라<mask>")


def test_without_template_it_is_trls_conversational_form(kochat, write, tmp_path):
    pair = {"prompt": "가", "chosen": "나", "rejected": "다"}
    head = [{"role": "system", "content": "존댓말로 답해."}, {"role": "user", "content": "가"}]
    one, two = ([{"role": "assistant", "content": text}] for text in "나다")
    cases = {
        "sft": ([{"prompt": "가", "completion": "나"} | POLITE, SPOKEN], [{"prompt": head, "completion": one}, SPOKEN]),
        "preference": ([pair | POLITE, pair], [{"prompt": head, "chosen": one, "rejected": two, "group": 0}]),
        "prompt": ([{"prompt": "가"} | POLITE, {"prompt": "가"}], [{"prompt": head}, {"prompt": "가"}]),
    }
    cases["preference"][1].append(pair | {"group": 1})
    for kind, (records, expected) in cases.items():
        out = tmp_path / f"{kind}.out"
        path = write(f"{kind}.jsonl", lines(records))
        code, printed = kochat("data", "convert", path, "--to", kind, "--no-template", "--output", out)
        assert code == 0, printed
        assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == expected


def test_it_is_shown(kochat, write, tiny_base):
    for fields in ({"prompt": "가"}, SFT, RANKED):
        path = write("a.jsonl", lines([fields | POLITE]))
        for options in ((), ("--tokenizer", tiny_base)):
            code, printed = kochat("data", "show", path, *options)
            assert code == 0, printed
            assert "존댓말로 답해.\n\n### Instruction" in printed


# --- Making data


def test_prompts_keep_it(kochat, write, tmp_path):
    path = write("a.jsonl", lines([SFT, SFT | POLITE, SPOKEN]))
    expected = [Prompt("질문"), Prompt("질문", "존댓말로 답해."), Prompt("가", "존댓말로 답해.")]
    assert read_prompts(path) == (expected, [])
    code, printed = kochat("data", "prompts", path, "--output", tmp_path / "prompts.json")
    assert code == 0, printed
    assert parsed(tmp_path / "prompts.json", "prompt") == expected
    records, _ = rank_answers(expected, [["가"] * 3, ["나"] * 3], seed=0)
    assert [record.get("system") for record in records] == [None, *["존댓말로 답해."] * 2]


def test_an_answer_under_the_same_one_goes_first(write):
    bare, polite, rude = Prompt("질문"), Prompt("질문", "존댓말로 답해."), Prompt("질문", "반말로 답해.")
    path = write("a.jsonl", lines([SFT | POLITE | {"completion": "예"}, SFT | {"completion": "응"}]))
    assert answers_in(path, [polite, bare, rude]) == ["예", "응", "응"]
    only = write("b.jsonl", lines([SFT | POLITE, {"prompt": "가", "completion": ""} | POLITE]))
    assert answers_in(only, [polite, Prompt("가", "존댓말로 답해.")]) == ["답", ""]
    with pytest.raises(UserError, match=r"no answer to 2 of 3 prompts, such as \['질문', '가'\]"):
        answers_in(only, [polite, rude, Prompt("가")])


def test_it_reaches_a_model_that_answers(tiny_base, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "kochat_trl.desk.answers.generate.encode_prompts", lambda _, prompts: seen.extend(prompts) or [[5]] * 2
    )
    gather_answers(tiny_base, [Prompt("가"), Prompt("가", "존댓말로 답해.")], 2, 0.0, 0)
    assert seen == [conversation("가"), conversation("가", system="존댓말로 답해.")]
