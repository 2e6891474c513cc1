"""Files → records → tokenized rows."""

import csv
import json

from kochat_trl.data.convert import IGNORED, build_dataset, encode_after, encode_dialogue, encode_prompt, render
from kochat_trl.data.rankings import ranking_pairs
from kochat_trl.data.readers import read_records
from kochat_trl.data.records import Dialogue, Preference, parse_preference, parse_prompt, parse_sft
from kochat_trl.errors import UserError
from kochat_trl.tokenizer import load_tokenizer

import pytest

DIALOGUES = """<<start conversation>>
<사람>: 안녕
<챗봇>: 반가워요.
<사람>: 이름이 뭐야?
<챗봇>: 저는 챗봇이에요.
두 줄로 말해요.
<<start conversation>>
<사람>: 잘 가
<챗봇>: 안녕히 가세요.
"""


def parsed(path, parse):
    return [record for raw in read_records(path) for record in parse(raw)]


def test_array_named_jsonl_and_json_lines_read_alike(write):
    records = [{"prompt": "가", "completion": "나", "tokens": 3}, {"prompt": "다\n라", "completion": "마"}]
    array = write("array.jsonl", "\ufeff" + json.dumps(records, indent=4))  # escaped, with a BOM
    lines = write("lines.jsonl", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n")
    expected = [
        Dialogue(({"role": "user", "content": "가"}, {"role": "assistant", "content": "나"})),
        Dialogue(({"role": "user", "content": "다\n라"}, {"role": "assistant", "content": "마"})),
    ]
    assert parsed(array, parse_sft) == parsed(lines, parse_sft) == expected
    assert [(r.source.index, r.source.line) for r in read_records(array)] == [(0, 2), (1, 7)]
    assert [(r.source.index, r.source.line) for r in read_records(lines)] == [(0, 1), (1, 3)]
    assert list(read_records(write("empty.json", "[ ]"))) == []


def test_dialogues(write):
    first, second = parsed(write("talk.jsonl", DIALOGUES), parse_sft)
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert first.messages[3]["content"] == "저는 챗봇이에요.\n두 줄로 말해요."
    assert second.messages[0]["content"] == "잘 가"


def test_instruction_files(write):
    path = write("a.jsonl", '{"instruction": "요약해", "input": "긴 글", "output": "짧은 글"}')
    assert parsed(path, parse_sft)[0].messages[0]["content"] == "요약해\n\n긴 글"


def test_ranking_is_best_first(write):
    record = {"prompt": "가", "completion_0": "둘째", "completion_1": "셋째", "completion_2": "첫째"}
    path = write("rm.jsonl", json.dumps([record | {"ranking": [2, 0, 1]}], ensure_ascii=False))
    assert parsed(path, parse_preference) == [
        Preference("가", "첫째", "둘째"),
        Preference("가", "첫째", "셋째"),
        Preference("가", "둘째", "셋째"),
    ]
    assert ranking_pairs([1, 2, 0]) == [(1, 2), (1, 0), (2, 0)]


def test_the_real_rankings_prefer_the_answer_that_a_reader_would(shared):
    """In the second record completion 1 is garbage, so it must lose both of its pairs."""
    raw = list(read_records(shared / "data/kochatgpt/kochatgpt_2_RM.excerpt.jsonl"))[1]
    garbage = raw.fields["completion_1"]
    pairs = parse_preference(raw)
    assert [p.rejected == garbage for p in pairs] == [False, True, True]
    assert all(p.chosen != garbage for p in pairs)


BROKEN = [
    (parse_sft, {"prompt": "가"}, "field 'completion': found None, expected a non-empty string"),
    (parse_sft, {"prompt": 3, "completion": "나"}, "field 'prompt': found 3"),
    (parse_sft, {"text": "가"}, r"found \['text'\], expected prompt \+ completion or instruction"),
    (parse_sft, "가", "found '가', expected a JSON object"),
    (parse_sft, {"turns": 3}, r"found \['turns'\], expected prompt"),
    (parse_sft, {"instruction": " ", "output": "나"}, "field 'instruction': found ' '"),
    (parse_prompt, {"prompt": ""}, "field 'prompt': found ''"),
    (parse_prompt, {"question": "가"}, "field 'prompt'"),
    (parse_preference, {"prompt": "가", "chosen": "나"}, "field 'rejected': found None"),
    (parse_preference, {"prompt": "가", "chosen": "나", "rejected": "나"}, "a text that differs from 'chosen'"),
    (parse_preference, {"prompt": "가", "completion_0": "나"}, "expected prompt . chosen"),
    *[
        (
            parse_preference,
            {"prompt": "가", "completion_0": "나", "completion_1": "다", "ranking": ranking},
            "field 'ranking': found .* expected the indices 0 to 1, each once, best first",
        )
        for ranking in ([0], [0, 0], [1, 2], "01", [True, False], [0, 1, 2], None)
    ],
    (
        parse_preference,
        {"prompt": "가", "completion_0": "나", "completion_1": "나", "ranking": [0, 1]},
        "field 'completion_1': found '나', expected a text that no other completion has",
    ),
]


@pytest.mark.parametrize(("parse", "record", "message"), BROKEN)
def test_broken_record_says_where_and_what(write, parse, record, message):
    good = {"prompt": "가", "completion": "나", "chosen": "다", "rejected": "라"}
    path = write("data.jsonl", json.dumps([good, record], ensure_ascii=False, indent=1))
    line = path + r", line 8 \(record 1\): "
    with pytest.raises(UserError, match=line + ".*" + message):
        parsed(path, parse)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "가"},\n {"prompt" "나"}]', r"line 2 \(record 1\): broken JSON"),
        ('[{"prompt": "가"}\n\n {"prompt": "나"}]', "line 3: found .* expected ',' or '\\]' after record 0"),
        ('[{"prompt": "가"}', "expected ',' or '\\]' after record 0"),
        ('[{"prompt": "가"}]\n[1]', "after the end of the JSON array"),
        ('{"prompt": "가"}\n{"prompt": }', r"line 2 \(record 1\): broken JSON"),
        ("prompt,completion", "line 1: found 'prompt,completion', expected a JSON array"),
        ("", "expected a JSON array"),
        ("<<start conversation>>\n안녕", "line 2: found '안녕', expected '<사람>:' or '<챗봇>:'"),
    ],
)
def test_broken_file_says_where_and_what(write, content, message):
    with pytest.raises(UserError, match=message):
        parsed(write("data.jsonl", content), parse_prompt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<<start conversation>>\n<사람>: 안녕", "found '1 turns', expected an even number"),
        ("<<start conversation>>\n<챗봇>: 안녕\n<사람>: 응", "turn 0': found '<챗봇>', expected <사람>"),
        ("<<start conversation>>\n<사람>:\n<챗봇>: 응", "turn 0': found '', expected a non-empty text"),
        ("<<start conversation>>", "found '0 turns'"),
    ],
)
def test_broken_dialogue(write, content, message):
    with pytest.raises(UserError, match=message):
        parsed(write("data.jsonl", content), parse_sft)


def test_missing_and_non_utf8_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl: can't be read: No such file"):
        list(read_records("nowhere.jsonl"))
    (tmp_path / "euc.jsonl").write_bytes("[{'prompt': '안녕'}]".encode("euc-kr"))
    with pytest.raises(UserError, match="not UTF-8 at byte 13"):
        list(read_records(tmp_path / "euc.jsonl"))


def test_broken_records_are_refused_or_listed(write, tiny_tokenizer):
    records = [{"prompt": "가나다"}] + [{"prompt": ""}] * 7
    path = write("ppo.jsonl", json.dumps(records))
    with pytest.raises(
        UserError, match=r"7 records can't be used:\n(.*\n){5}  ... and 2 more\n.*invalid_records: skip"
    ):
        build_dataset([path], "ppo", tiny_tokenizer)
    dataset, left_out = build_dataset([path], "ppo", tiny_tokenizer, skip_invalid=True)
    assert (len(dataset), len(left_out)) == (1, 7)
    with pytest.raises(UserError, match="no ppo record in"):
        build_dataset([write("b.jsonl", '[{"prompt": ""}]')], "ppo", tiny_tokenizer, skip_invalid=True)


def test_a_row_that_is_too_long_is_refused_and_not_cut(write, tiny_tokenizer):
    path = write("sft.jsonl", json.dumps([{"prompt": "가", "completion": "나 " * 50}]))
    with pytest.raises(UserError, match="tokens', expected at most 40 tokens"):
        build_dataset([path], "sft", tiny_tokenizer, max_length=40)


def test_ids_do_not_fuse_across_the_boundary(shared):
    """kogpt2 has a token for ':(': tokenizing the whole text would change the prompt's last token."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    prompt = encode_prompt(tokenizer, "뭐라고 썼어?")
    turns = ({"role": "user", "content": "뭐라고 썼어?"}, {"role": "assistant", "content": "(웃음) 그냥요."})
    assert tokenizer.encode(render(tokenizer, turns))[: len(prompt)] != prompt
    ids, labels = encode_dialogue(tokenizer, turns)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.convert_ids_to_tokens(ids[len(prompt) :])[0] == "("  # and not "▁(", a new word
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    # A tokenizer that fuses `text` with everything is refused rather than trained on.
    with pytest.raises(UserError, match="fuses"):
        encode_after(_FusesEverything(), "", "가")


class _FusesEverything:
    def encode(self, text, add_special_tokens):
        return [len(text) or 99]


def test_every_real_record(shared):
    """On all real data: a prompt is a prefix of prompt + completion, and loss is on what the assistant says."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    data = shared / "data"
    sft = [*data.glob("mygpt/*instruction*"), *data.glob("kochatgpt/*SFT*")]
    dialogues = [record for path in sft for record in parsed(path, parse_sft)]
    preferences = [
        record
        for path in [*data.glob("mygpt/*rm*"), *data.glob("kochatgpt/*RM*")]
        for raw in read_records(path)
        if raw.fields.get("chosen") is None or raw.fields["chosen"] != raw.fields["rejected"]
        for record in parse_preference(raw)
    ]
    assert (len(dialogues), len(preferences)) == (1041, 583)
    with open(data / "chatbot/ChatbotData.csv", encoding="utf-8", newline="") as file:
        pairs = [(row["Q"], row["A"]) for row in csv.DictReader(file)]
    assert len(pairs) == 11_823
    dialogues += [Dialogue(({"role": "user", "content": q}, {"role": "assistant", "content": a})) for q, a in pairs]
    for p in preferences:
        for completion in (p.chosen, p.rejected):
            turns = ({"role": "user", "content": p.prompt}, {"role": "assistant", "content": completion})
            dialogues.append(Dialogue(turns))
    for dialogue in dialogues:
        ids, labels = encode_dialogue(tokenizer, dialogue.messages)
        assert len(ids) == len(labels)
        # The prompt of each assistant turn, as inference would encode it, is a prefix.
        first = encode_prompt(tokenizer, dialogue.messages[0]["content"])
        assert ids[: len(first)] == first
        # Each span of labels is one assistant turn and its </s>.
        spans, span = [], []
        for label in [*labels, IGNORED]:
            if label != IGNORED:
                span.append(label)
            elif span:
                spans.append(span)
                span = []
        answers = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        assert len(spans) == len(answers)
        for tokens, answer in zip(spans, answers, strict=True):
            assert tokens[-1] == tokenizer.eos_token_id
            assert tokens[:-1] == encode_after(tokenizer, render(tokenizer, dialogue.messages[:1], True), answer)


def test_labels_agree_with_trl_s_assistant_mask(shared):
    """TRL's own way, the template's generation block, marks the same tokens of every real dialogue."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    records = parsed(shared / "data/kochatgpt/kochatgpt_1_SFT_conversation.jsonl", parse_sft)
    assert len(records) == 439
    for record in records:
        ids, labels = encode_dialogue(tokenizer, record.messages)
        theirs = tokenizer.apply_chat_template(
            list(record.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == theirs["input_ids"]
        assert [int(label != IGNORED) for label in labels] == theirs["assistant_masks"]
