"""Faults of records, counted and located; and what is counted is what would be dropped."""

import json

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.records import conversation
from kochat_trl.desk.curation.audit import KEPT, check_files
from kochat_trl.desk.curation.clean import clean_file
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS
from kochat_trl.errors import UserError
from kochat_trl.models.tokenizer import CHAT_TEMPLATE
from kochat_trl.rows.encode import encode_dialogue
from tests.desk.curation.helpers import found, lines, ranked

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# --- Each fault -----------------------------------------------------------------------------------

TEXTS = {
    "swallowed": "무엇?', 'completion': '답",
    "escape": "첫째\\n둘째",
    "control": "가\x07나",
    "zero_width": "가\u200b나",
    "no_break_space": "가\u00a0나",
    "not_nfc": "\u1100\u1161",
    "special_token": "가</s>",
    "stray_quote": "'가나다",
    "replacement": "가\ufffd",
    "no_hangul": "I do not know.",
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_fault_of_a_text(check, fault):
    bad = TEXTS[fault]
    answers = [{"prompt": "하나", "completion": "둘"}, {"prompt": "셋", "completion": bad}]
    assert found(check(answers)) == {("warning", fault): [1]}
    assert found(check([{"prompt": "하나"}, {"prompt": bad}])) == {("warning", fault): [1]}
    turns = [{"role": "user", "content": "가"}, {"role": "assistant", "content": bad}]
    once = {("warning", fault): [0]}  # both answers of the record have it
    assert found(check([{"messages": [*turns, *turns]}])) == once


def test_hangul_is_asked_of_what_the_file_is_for(check):
    record = [{"prompt": "What?", "completion": "답"}]
    assert found(check(record)) == {}
    assert found(check(record, kind="prompt")) == {("warning", "no_hangul"): [0]}
    assert check([{"prompt": "가", "chosen": "나", "rejected": "no"}]).hangul == {"prompts": 1, "answers": 0.5}


def test_errors_say_what_is_wrong(write):
    records = [
        ranked([0, 1], "가", "나"),
        ranked([0, 1], "가", "가", prompt="둘"),
        ranked([0, 1], "가", " ", prompt="셋"),
        ranked([0, 2], "가", "나", prompt="넷"),
        ranked([[0, 1]], "가", "나", prompt="다섯"),
        ranked([[0, 1], 2], "가", "나", "다", prompt="여섯"),
    ]
    file = check_files([write("rm.jsonl", lines(records) + '{"prompt": \n')]).files[0]
    assert found(file) == {
        ("error", "broken"): [3, 6],
        ("error", "empty"): [2],
        ("error", "equal"): [1],
        ("error", "tied"): [4],
        ("warning", "tied"): [5],
    }
    assert (file.records, file.usable, file.errors, file.warnings) == (7, 2, 5, 1)
    assert file.findings[0].messages[0].startswith("line 4 (record 3): field 'ranking': found [0, 2], expected indices")
    assert "broken JSON" in file.findings[0].messages[1]
    assert file.count("tied") == 2
    assert file.findings[4].messages == []


def test_repeats(check):
    records = [
        {"prompt": "가 나", "completion": "답"},
        {"completion": "답", "prompt": "가 나"},  # the same, in another order
        {"prompt": "가  나", "completion": "답"},  # nearly
        {"prompt": "가 나", "completion": "다른 답"},  # the prompt only
        {"prompt": "", "completion": "답"},
        {"prompt": "", "completion": "답"},  # of no use, so it repeats nothing
        {"prompt": "다", "completion": "답"},
    ]
    assert found(check(records)) == {
        ("error", "empty"): [4, 5],
        ("warning", "duplicate"): [1],
        ("warning", "near_duplicate"): [2],
        ("warning", "repeated_prompt"): [1, 2, 3],
    }
    twice = [ranked([0, 1], "가", "나"), ranked([1, 0], "가", "나"), ranked([1, 0], "가", "나")]
    assert found(check(twice))["warning", "duplicate"] == [2]  # another ranking makes another record
    twice = [ranked([0, 1], "가", "나"), ranked([1, 0], "가 ", "나"), ranked([1, 0], "가", "나")]
    assert found(check(twice))["warning", "near_duplicate"] == [2]
    twice = [{"prompt": prompt} for prompt in ("가 나", "가  나", "가  나")]
    assert found(check(twice))["warning", "duplicate"] == [2]


def test_contradictions_across_shapes(check):
    records = [
        ranked([0, 1, 2], "좋음", "보통", "나쁨"),
        {"prompt": "질문", "chosen": "좋음", "rejected": "나쁨"},  # agrees
        {"prompt": "질문", "chosen": "나쁨 ", "rejected": "좋음"},
        {"prompt": "다른 질문", "chosen": "나쁨", "rejected": "좋음"},
        ranked([[0, 1], 2], "나쁨", "없음", "보통"),
    ]
    assert found(check(records)) == {
        ("warning", "repeated_prompt"): [1, 2, 4],
        ("warning", "contradiction"): [0, 1, 2, 4],  # both sides: either may be wrong
        ("warning", "tied"): [4],
    }
    alike = [ranked([0, 1], "가", "가 "), ranked([1, 0], "가", "가 ")]
    assert check(alike).count("contradiction") == 0


def test_three_cycles(check):
    rankings = [[0, 1, 2], [1, 2, 0], [2, 1, 0], [2, 0, 1], [1, 0, 2], [0, 2, 1]]
    file = check([ranked(r, "가", "나", "다", prompt=f"질문 {r}") for r in rankings])
    assert found(file) == {("warning", "three_cycle"): [1, 3]}
    assert file.reading.rankings == {str(ranking): 1 for ranking in rankings}
    # Of four completions; some aren't ranked, or tied.
    rankings = [[1, 0, 3, 2], [1, 2, 3, 0], [1, 2, 0], [1, [2, 3], 0]]
    file = check([ranked(r, "가", "나", "다", "라", prompt=f"질문 {r}") for r in rankings])
    assert found(file) == {("warning", "three_cycle"): [1], ("warning", "tied"): [3]}
    assert [finding.fault for finding in file.findings] == ["tied", "three_cycle"]  # as `FAULTS` has them
    assert check([{"prompt": "가", "chosen": "나", "rejected": "다"}]).reading is None


def test_rankings_are_read_in_the_given_order(check):
    records = [ranked([0, 1, 1], "가", "나", "다"), ranked([2, 0, None], "가", "나", "다", prompt="둘")]
    assert found(check(records)) == {("error", "broken"): [0, 1]}
    assert found(check(records, options=ReadingOptions(ranking_order="rank_of"))) == {("warning", "tied"): [0]}
    turned = [ranked([1, 2, 0], "가", "나", "다"), {"prompt": "질문", "chosen": "나", "rejected": "다"}]
    assert check(turned).count("contradiction") == 0
    assert check(turned, options=ReadingOptions(ranking_order="rank_of")).count("contradiction") == 2


def test_the_first_records_and_all_of_the_count(check):
    file = check([{"prompt": "가"}, *[{"prompt": ""}] * 30])
    assert file.count("empty") == 30
    assert file.findings[0].records == list(range(1, KEPT + 1))
    assert len(file.findings[0].messages) == KEPT
    assert (file.errors, file.warnings) == (30, 0)


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def characters():
    """A tokenizer of single characters after NFKC, as kogpt2's does it; it doesn't know all of Hangul."""
    known = sorted(set(CHAT_TEMPLATE) | set("저도 반가워요.안녕로마숫자다IV"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **tokens)


def test_tokens(check, characters):
    records = [
        {"prompt": "반가워요", "completion": "저도 반가워요."},
        {"prompt": "반가워", "completion": "저도 반가워요." * 3},
        {"prompt": "Ⅳ", "completion": "로마 숫자다"},
        {"prompt": "안녕", "completion": "뷁"},
    ]
    template = len("### Instruction(명령어):\n\n\n### Response(응답):") + 1  # and </s>
    file = check(records, tokenizer=characters, max_length=template + 23)
    assert found(file) == {
        ("warning", "unknown_token"): [3],
        ("warning", "round_trip"): [2, 3],
        ("warning", "overlong"): [1],
    }
    assert {name: (each.count, each.max) for name, each in file.lengths.items()} == {
        "prompts, characters": (4, 4),
        "answers, characters": (4, 24),
        "prompts, tokens": (4, 4),
        "answers, tokens": (4, 24),
        "with template, tokens": (4, template + 27),
    }
    assert file.lengths["with template, tokens"].mean == template + (12 + 27 + 8 + 3) / 4  # Ⅳ is two
    assert check(records, tokenizer=characters, max_length=template + 27).count("overlong") == 0

    file = check(records, kind="prompt", tokenizer=characters, max_length=template + 2)
    assert file.lengths["with template, tokens"].max == template - 1 + 4
    assert found(file)["warning", "overlong"] == [0]
    assert check(records, tokenizer=characters).count("overlong") == 0


def test_many_texts_are_tokenized_in_batches(check, characters, monkeypatch):
    monkeypatch.setattr("kochat_trl.desk.curation.finders.BATCH", 3)
    records = [{"prompt": "반" * n, "completion": "뷁" if n == 6 else "가"} for n in range(1, 9)]
    file = check(records, tokenizer=characters)
    assert (file.lengths["prompts, tokens"].count, file.lengths["prompts, tokens"].mean) == (8, 4.5)
    assert found(file)["warning", "unknown_token"] == [5]


def test_the_longest_row_of_a_record_counts(check, characters):
    """Completion 1 isn't ranked, and makes no row."""
    record = ranked([2, 0], "반가워요.", "반가워요." * 9, "안녕", prompt="저")
    lengths = check([record], tokenizer=characters).lengths["with template, tokens"]
    (ids, _) = encode_dialogue(characters, conversation("저", "반가워요."))
    assert (lengths.count, lengths.max) == (1, len(ids))


def test_half_characters_are_an_error_and_no_crash(write, characters):
    path = write("half.jsonl", '{"prompt": "가", "completion": "\\ud83d"}\n{"prompt": "나", "completion": "다"}')
    report = check_files([path], tokenizer=characters)
    assert found(report.files[0])["error", "broken"] == [0]
    assert "\\ud83d" in json.dumps(report.to_json())


def test_a_length_takes_a_tokenizer(write):
    with pytest.raises(UserError, match="takes a tokenizer"):
        check_files([write("a.jsonl", lines([{"prompt": "가"}]))], max_length=10)


# --- The audit and the cleaning of a file ---------------------------------------------------------

FOUND = [name for name, fault in FAULTS.items() if fault.level == "warning" and fault not in TEXT_FAULTS]
COMPLETIONS = {f"completion_{i}": text for i, text in enumerate(("좋음", "보통", "나쁨"))}
FILES = {
    "sft": [
        {"prompt": "가 나", "completion": "답"},
        {"prompt": "가 나", "completion": "답", "tokens": 3},  # a field that recipes don't read
        {"instruction": "가 나", "output": "답"},  # other names
        {"prompt": "가  나", "completion": "답"},
        {"prompt": "나", "completion": "Yes\ufffd"},
        {"prompt": "What?", "completion": "漢"},
        {"prompt": "", "completion": "No"},  # of no use: nothing else is found
        {"prompt": "", "completion": "No"},
        {"prompt": "몰라", "completion": "몰라 " * 20},
    ],
    "preference": [
        {"prompt": "질문", **COMPLETIONS, "ranking": [0, 1, 2]},
        {"prompt": "질문", "chosen": "나쁨 ", "rejected": "좋음"},
        {"prompt": "물음", **COMPLETIONS, "ranking": [1, 2, 0]},
        {"prompt": "물음", **COMPLETIONS, "ranking": [[0, 1], 2]},
        {"prompt": "뭐", **COMPLETIONS, "completion_1": "ok", "ranking": [2, 0]},
        {"prompt": "뭐", **COMPLETIONS, "completion_1": "ok", "ranking": [2, 0]},
        {"prompt": "몰라", "chosen": "몰라", "rejected": "반가 " * 20},
    ],
    "prompt": [{"instruction": "Translate this.", "input": "안녕"}, {"prompt": "Hi", "completion": "안녕"}],
}
NOT_IN = {
    "sft": {"contradiction", "tied", "three_cycle"},
    "preference": {"replacement", "near_duplicate"},
    "prompt": set(FOUND) - {"no_hangul", "overlap", "unknown_token", "round_trip"},
}


@pytest.mark.parametrize("kind", FILES)
def test_the_audit_counts_what_clean_drops(kind, write, tmp_path, tiny_tokenizer):
    file = write("dirty.json", json.dumps(FILES[kind]))
    other = write("other.json", json.dumps([{"prompt": "몰라"}, {"prompt": "Hi"}]))
    report = check_files([file, other], tokenizer=tiny_tokenizer, max_length=30).files[0]
    counted = {finding.fault: finding.records for finding in report.findings if finding.level == "warning"}
    dropped = {}
    for fault in FOUND:
        options = {"tokenizer": tiny_tokenizer} if fault in ("unknown_token", "round_trip", "overlong") else {}
        options |= {"max_length": 30} if fault == "overlong" else {}
        options |= {"against": [other]} if fault == "overlap" else {}
        folder = tmp_path / fault
        fixes = ["broken", "empty", "equal", fault, *(["duplicate"] if fault == "near_duplicate" else [])]
        clean_file(file, folder / "out", report=folder / "report", fixes=fixes, kind=kind, **options)
        lines = map(json.loads, (folder / "report").read_text(encoding="utf-8").splitlines())
        dropped[fault] = [line["index"] for line in lines if fault in line["faults"]]
    assert {fault: records for fault, records in dropped.items() if records} == counted
    assert counted.keys() == set(FOUND) - NOT_IN[kind]
