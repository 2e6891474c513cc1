"""A bad file → a good one and a list of what was done; by hand, on anything, and on the real files."""

import io
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from kochat_trl.data.rankings import ranking_tiers
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, read_records
from kochat_trl.data.records import RecordError, parse
from kochat_trl.data.text import has_hangul
from kochat_trl.desk.curation.clean import Summary, clean_file, print_summary
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS, texts
from kochat_trl.errors import UserError
from kochat_trl.rows.encode import conversation, encode_dialogues, encode_prompts

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from rich.console import Console

NFD = unicodedata.normalize("NFD", "한국")
DEFAULT = [fault.name for fault in FAULTS.values() if fault.default]
ERRORS = ["broken", "empty", "equal"]
TAKES_TOKENIZER = {"unknown_token", "round_trip", "overlong"}
ALL = [name for name in FAULTS if name not in TAKES_TOKENIZER]

SFT = {"prompt": "질문", "completion": "답"}
RANKED = {"prompt": "질문", "completion_0": "하나", "completion_1": "둘", "completion_2": "셋", "ranking": [2, 0, 1]}


class Cleaned:
    """The result of one `clean_file`: the bytes and the records of the output, the lines of the report."""

    def __init__(self, folder: Path, file: str | Path, **kwargs):
        self.folder, self.output = folder, folder / "clean.json"
        self.summary: Summary = clean_file(file, self.output, report=folder / "report.jsonl", **kwargs)
        self.bytes = self.output.read_bytes()
        self.records = [raw.fields for raw in read_records(self.output)]
        self.report = [json.loads(line) for line in (folder / "report.jsonl").read_text("utf-8").splitlines()]
        self.faults = [(line["index"], line["action"], line["faults"]) for line in self.report]

    def again(self, **kwargs) -> "Cleaned":
        (self.folder / "again").mkdir()
        return Cleaned(self.folder / "again", self.output, **kwargs)


@pytest.fixture
def clean(tmp_path: Path) -> Callable[..., Cleaned]:
    """Clean a file with these contents: records, which make a JSON array, or text."""

    def clean_contents(contents: str | list, **kwargs) -> Cleaned:
        path = tmp_path / "dirty"
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
        return Cleaned(tmp_path, path, **kwargs)

    return clean_contents


# --- Faults of a text ---------------------------------------------------------------------------

MENDED = [
    ("swallowed", "\"수도는?\", 'completion': '서울입니다.", "수도는?"),
    ("swallowed", "수도는?', 'completion': \"서울\", 'token': 7}", "수도는?"),
    ("swallowed", "서울입니다.\", 'tokens': 193}", "서울입니다."),
    ("escape", r"첫째.\n\n둘째. \'셋\' \"넷\" 가\xa0나\u200b", "첫째.\n\n둘째. '셋' \"넷\" 가 나"),
    ("escape", r"가\r\n나\\n다\\'라", "가\n나\n다'라"),
    ("escape", r"Yes.\n\nit is", "Yes.\n\nit is"),
    ("control", "가\r\n나\r다\u2028라\u2029마\x85바\v사\f아", "가\n나\n다\n라\n마\n바\n사\n아"),
    ("control", "가\0나\x1b다\x7f라\x9f마", "가나다라마"),
    ("zero_width", "\ufeff가\u200b나\u200d다\u00ad\u202e라\u3164", "가나다라"),
    ("zero_width", "\u200d👩\u200d가", "👩가"),
    ("no_break_space", "가\u00a0나\u202f다\u2007라", "가 나 다 라"),
    ("not_nfc", NFD, "한국"),
    ("special_token", "<s> 가</s>나<|im_start|>다<pad>", "가나다"),
    ("special_token", "가<</s>s>나<|r_0|>", "가나"),
    ("stray_quote", "'저는 모릅니다.", "저는 모릅니다."),
    ("stray_quote", ' " 저는 모릅니다.', "저는 모릅니다."),
    ("stray_quote", "\"'저는 모릅니다.", "저는 모릅니다."),
    ("stray_quote", "'저는 ('강남')을 몰라요.", "저는 ('강남')을 몰라요."),
    ("stray_quote", "'저는 '강남'과 ('서초')를 몰라요. Don't ask.", "저는 '강남'과 ('서초')를 몰라요. Don't ask."),
]


@pytest.mark.parametrize(("fault", "text", "mended"), MENDED)
def test_a_text_is_mended(clean, fault, text, mended):
    """By its own fix alone, and it is what the fault is told by."""
    assert FAULTS[fault].mend(text) == mended
    cleaned = clean([SFT, {"prompt": "물음", "completion": text, "tokens": 9}], fixes=[fault])
    assert cleaned.records == [SFT, {"prompt": "물음", "completion": mended, "tokens": 9}]
    changed = {"index": 1, "line": 1, "action": "changed", "faults": [fault]}
    assert cleaned.report == [changed | {"before": {"completion": text}, "after": {"completion": mended}}]
    assert cleaned.summary.faults == {fault: 1}


MEANT = [
    "'아이브'는 누구?",
    '"After LIKE"는 "LOVE DIVE"의 몇 배?',
    "'Don't Cha'는 몇 위?",
    "'80년대 노래 추천해줘",
    "'가'는 '나라는 뜻이야?",  # closed, and another that isn't
    '"가"',
    r"\nabla f와 \nu는 뭐야?",
    "'가 나 '는 무슨 뜻?",
    r"C:\n번째 사진",
    r"파이썬의 '\n'은 뭐야? `\n`은?",
    r'print("안녕\n")은 뭘 출력해?',
    "print('가\\n나')\nprint('It\\'s')",  # lines of code
    '{"prompt": "가", "completion": "나"} 같은 파일은 어떻게 읽어?',
    "👩\u200d❤\ufe0f\u200d👩 🐈\u200d⬛ 🙂\u200d↔\ufe0f",
    "می\u200cخواهم는 무슨 뜻?",
    "ㅋㅋㅋ ㅠㅠ ㆍ 가\tᄒᆞᆫ글 \u115fᅡ",
    "줄\n바꿈",
    "a <b> 1 < 2 <|> <strong>가</strong>",
    "　전각 공백　",
    " 앞뒤 공백 ",
]


@pytest.mark.parametrize("text", MEANT)
def test_a_text_that_is_meant_stays_as_it_is(clean, text):
    assert [fault.name for fault in TEXT_FAULTS if fault.mend(text) != text] == []
    cleaned = clean([{"prompt": text, "completion": text}])
    assert cleaned.records == [{"prompt": text, "completion": text}]
    assert cleaned.report == []


def test_hangul():
    assert all(map(has_hangul, ["abc 가", "ㅋ", "ㅏ", "\u1112", "\ua960", "\ud7b0"]))
    assert not any(map(has_hangul, ["", "abc 漢字 かな", "\u3164\u115f\u1160\uffa0"]))  # fillers


def test_mends_bring_out_one_another(clean):
    """An escaped quote shows a swallowed record, a quote before it is left open; jamo meet where a token was."""
    before = {"prompt": r"'수도는?\', \'completion\': \'서울", "completion": f"{NFD[:1]}<\0/s>{NFD[1:]}"}
    cleaned = clean([before])
    assert cleaned.records == [{"prompt": "수도는?", "completion": "한국"}]
    faults = ["escape", "swallowed", "control", "not_nfc", "special_token"]
    assert cleaned.faults == [(0, "changed", faults)]
    assert cleaned.again().bytes == cleaned.bytes


def test_what_cant_be_seen_is_escaped_in_the_report(clean, tmp_path):
    clean([{"prompt": "한국\u200b의\u00a0\u2028\U000e0001수도 🙂"}])
    line = (tmp_path / "report.jsonl").read_text("utf-8")
    assert r'"before": {"prompt": "한국\u200b의\u00a0\u2028\udb40\udc01수도 🙂"}' in line


def test_only_the_chosen_fixes_are_applied(clean):
    text = "'저는\u00a0몰라요</s>"
    assert clean([{"prompt": text}], fixes=["no_break_space"]).records == [{"prompt": "'저는 몰라요</s>"}]


def test_the_default_fixes(clean):
    records = [RANKED, RANKED, RANKED | {"prompt": "물음", "ranking": [0, [1, 2]]}]
    cleaned = clean(records)
    assert cleaned.records == [records[0], records[2]]
    assert cleaned.faults == [(1, "dropped", ["duplicate"])]


# --- Records that recipes refuse ----------------------------------------------------------------

REFUSED = [
    ("broken", {"prompt": "가"}, "field 'completion'"),
    ("broken", {"prompt": "가", "completion": 3}, "found 3"),
    ("broken", ["가"], "expected a JSON object"),
    ("broken", {"prompt": "가", "completion": "\ud800"}, "half characters"),
    ("empty", {"prompt": "", "completion": "나"}, "field 'prompt': found ''"),
]


@pytest.mark.parametrize(("fault", "record", "message"), REFUSED)
def test_a_record_that_recipes_refuse_is_dropped(clean, fault, record, message):
    cleaned = clean([SFT, record, SFT | {"prompt": "물음"}], fixes=[fault], kind="sft")
    assert cleaned.records == [SFT, SFT | {"prompt": "물음"}]
    [line] = cleaned.report
    assert message in line.pop("error")
    before = record if isinstance(record, dict) else {"(whole record)": record}
    assert line == {"index": 1, "line": 1, "action": "dropped", "faults": [fault], "before": before}


@pytest.mark.parametrize(("fault", "record", "message"), REFUSED)
def test_without_its_fix_the_file_is_refused(clean, tmp_path, fault, record, message):
    with pytest.raises(UserError, match=rf"1 of 2 records can't be rewritten(.|\n)*{message}(.|\n)*too: {fault}"):
        clean([SFT, record], fixes=sorted(set(DEFAULT) - {fault}), kind="sft")
    assert [path.name for path in tmp_path.iterdir()] == ["dirty"]


def test_a_broken_line_is_dropped_and_shown(clean):
    cleaned = clean(f"{json.dumps(SFT)}\n{{broken\n")
    assert cleaned.records == [SFT]
    assert cleaned.report[0]["before"] == {"(whole record)": cleaned.report[0]["before"]["(whole record)"]}
    assert "broken JSON" in cleaned.report[0]["before"]["(whole record)"]
    assert cleaned.report[0]["line"] == 2


def test_a_text_that_mending_leaves_empty(clean):
    cleaned = clean([{"prompt": "<s></s>\u200b"}, {"prompt": "', 'completion': '나"}, {"prompt": "\u00a0"}])
    assert cleaned.records == []
    assert cleaned.bytes == b"[]\n"
    faults = [["zero_width", "special_token", "empty"], ["swallowed", "empty"], ["no_break_space", "empty"]]
    assert [line["faults"] for line in cleaned.report] == faults
    assert cleaned.again().bytes == b"[]\n"


# --- Rankings -----------------------------------------------------------------------------------


def ranking(*completions: str, prompt: str = "질문", **fields) -> dict:
    return {"prompt": prompt} | {f"completion_{i}": text for i, text in enumerate(completions)} | fields


EQUAL = [
    (["가", "나", "가"], [0, 1, 2], ["가", "나"], [0, 1]),
    (["가", "나", "가"], [2, 1, 0], ["나", "가"], [1, 0]),
    (["가", "나", "가", "다"], [1, 2, 0, 3], ["나", "가", "다"], [0, 1, 2]),
    (["가", "나", "가"], [1, [0, 2]], ["가", "나"], [1, 0]),
    (["가", "나", "가", "다"], [3, 1, 0], ["가", "나", "다"], [2, 1, 0]),  # completion 2 is unranked
    (["가", "나", "다", "다"], [0, 1], ["가", "나", "다"], [0, 1]),
    (["가", "나", "'가"], [2, 1, 0], ["나", "가"], [1, 0]),  # after mending
]


@pytest.mark.parametrize(("completions", "order", "left", "new_order"), EQUAL)
def test_the_best_copy_of_a_completion_is_kept(clean, completions, order, left, new_order):
    cleaned = clean([ranking(*completions, ranking=order, label="x")])
    assert cleaned.records == [ranking(*left, ranking=new_order, label="x")]
    assert cleaned.faults[0][2][-1] == "equal"
    assert cleaned.again().bytes == cleaned.bytes


def test_the_report_of_a_ranking_has_the_fields_that_changed(clean):
    cleaned = clean([ranking("가", "나", "나", "다", ranking=[0, 1, 2, 3])])
    assert cleaned.report[0]["before"] == {"completion_2": "나", "completion_3": "다", "ranking": [0, 1, 2, 3]}
    assert cleaned.report[0]["after"] == {"completion_2": "다", "ranking": [0, 1, 2]}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "질문", "chosen": "가", "rejected": "가"},
        {"prompt": "질문", "chosen": "가", "rejected": "'가"},
        {"prompt": "질문", "chosen": "가", "rejected": "가", "ranking": [0, 1]},
        ranking("가", "가", ranking=[0, 1]),
        ranking("가", "가", "나", ranking=[[0, 1]]),
        ranking("가", "가", "나", ranking=[0, 1]),
        ranking("가", "나", "가", ranking=[[0, 1], 2]),
    ],
)
def test_a_ranking_of_too_few_without_copies_is_dropped(clean, record):
    cleaned = clean([RANKED, record])
    assert cleaned.records == [RANKED]
    assert cleaned.report[0]["faults"][-1] == "equal"
    assert cleaned.report[0]["before"] == record


def test_equal_completions_without_the_fix_are_refused(clean):
    with pytest.raises(UserError, match=r"2 of 2 records(.|\n)*too: equal"):
        clean(
            [ranking("가", "나", "가", ranking=[0, 1, 2]), {"prompt": "가", "chosen": "나", "rejected": "나"}], fixes=[]
        )


def test_a_rank_of_file_becomes_best_first(clean):
    """`rank_of` [2, 0, 1] says that completion 1 is the best and 0 the worst."""
    records = [
        RANKED,
        RANKED | {"prompt": "물음", "ranking": [1, 0, 1]},
        RANKED | {"prompt": "뭐", "ranking": [0, None, 1]},
    ]
    cleaned = clean(records, order="rank_of")
    assert [record["ranking"] for record in cleaned.records] == [[1, 2, 0], [1, [0, 2]], [0, 2]]
    assert cleaned.report == []  # a change of notation, not of what it says
    assert cleaned.again().bytes == cleaned.bytes


def test_a_ranking_that_is_none_in_the_order_it_is_read_with_is_broken(clean):
    """[0, 1] of three completions would do as best_first."""
    cleaned = clean([RANKED, RANKED | {"ranking": [0, 1]}], order="rank_of")
    assert cleaned.faults == [(1, "dropped", ["broken"])]


def test_ties(clean):
    tied = [
        RANKED | {"prompt": prompt, "ranking": r}
        for prompt, r in [("가", [[0, 1], 2]), ("나", [[0, 1, 2]]), ("다", [])]
    ]
    single = RANKED | {"prompt": "라", "ranking": [[1], 0]}
    cleaned = clean([*tied, single])
    assert [record["ranking"] for record in cleaned.records] == [[[0, 1], 2], [[0, 1, 2]], [], [1, 0]]
    assert cleaned.report == []
    again = cleaned.again(fixes=["tied"])
    assert [record["prompt"] for record in again.records] == ["라"]
    assert again.faults == [(i, "dropped", ["tied"]) for i in range(3)]


def test_three_cycles(clean):
    """Only whole rankings without ties have two readings."""
    orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [[2, 0], 1], [2, 0]]
    records = [RANKED | {"prompt": str(order), "ranking": order} for order in orders]
    cleaned = clean(records, fixes=["three_cycle"])
    assert [record["ranking"] for record in cleaned.records] == [orders[i] for i in (0, 3, 4, 5)]


def test_contradictions(clean):
    """Of three records two can't both be right: both go, at whatever place the pair stands in them."""
    records = [
        {"prompt": "질문", "chosen": "가", "rejected": "나"},
        ranking("다", "나", "가", ranking=[1, 0, 2]),
        {"prompt": "질문", "chosen": "가", "rejected": "다라"},
        {"prompt": "물음", "chosen": "나", "rejected": "가"},
        {"prompt": "탓", "chosen": "나", "rejected": "나 "},  # alike but for a space: no contradiction
        {"prompt": "탓", "chosen": "나 ", "rejected": "나"},
        ranking("마", "바", "마 ", prompt="홀로", ranking=[0, 1, 2]),  # with itself alone
    ]
    cleaned = clean(records, fixes=["contradiction"])
    assert cleaned.faults == [(i, "dropped", ["contradiction"]) for i in (0, 1)]
    assert clean_names(cleaned) == ["질문", "물음", "탓", "탓", "홀로"]


def clean_names(cleaned: Cleaned) -> list[str]:
    return [record["prompt"] for record in cleaned.records]


# --- Repeats, and what other files have ---------------------------------------------------------


def test_repeats(clean, tmp_path):
    records = [
        {"prompt": "가 나", "completion": "답"},
        {"prompt": "가 나", "completion": "답", "tokens": 3},
        {"prompt": "'가 나", "completion": "답"},  # the same once it is mended
        {"prompt": "가  나", "completion": "답"},
        {"prompt": "가 나", "completion": "다른 답"},
        {"instruction": "가 나", "output": "답"},
    ]
    found = {}
    for fix in ("duplicate", "near_duplicate", "repeated_prompt"):
        (tmp_path / fix).mkdir()
        path = tmp_path / fix / "dirty"
        path.write_text(json.dumps(records), encoding="utf-8")
        cleaned = Cleaned(tmp_path / fix, path, fixes=["stray_quote", fix])
        found[fix] = [index for index, action, _ in cleaned.faults if action == "dropped"]
    assert found == {"duplicate": [1, 2, 5], "near_duplicate": [1, 2, 3, 5], "repeated_prompt": [1, 2, 3, 4, 5]}


def test_rankings_of_the_same_completions_in_another_order_are_no_duplicates(clean):
    records = [RANKED, RANKED | {"ranking": [0, 2, 1]}]
    assert clean(records).records == records


def test_a_contradiction_goes_before_a_prompt_is_repeated(clean):
    """Otherwise the first of the two would stay because the second is gone."""
    records = [{"prompt": "질문", "chosen": a, "rejected": b} for a, b in (("가", "나"), ("나", "가"), ("다", "라"))]
    cleaned = clean(records, fixes=["contradiction", "repeated_prompt"])
    assert cleaned.records == [ranking("다", "라", ranking=[0, 1])]


def test_the_first_of_two_that_may_stay_is_kept(clean):
    """A record that goes for a fault of its own doesn't take its near duplicate with it."""
    cleaned = clean([{"prompt": "가 ㋿\ufffd"}, {"prompt": "나 1"}, {"prompt": "나 \u2460"}])
    assert clean_names(cleaned) == ["나 1"]
    assert cleaned.faults == [(0, "dropped", ["replacement"]), (2, "dropped", ["near_duplicate"])]


def test_overlap(clean, write):
    held_out = write("held.jsonl", '{"prompt": "물음\\u00a0하나", "completion": "x"}\n{"prompt": ""}\n')
    talk = write("talk.txt", f"{DIALOGUE_START}\n<사람>: '안녕\n<챗봇>: 네\n")
    prompts = ["물음  하나", "안녕", "남는 것"]
    cleaned = clean([{"prompt": prompt} for prompt in prompts], fixes=["stray_quote"], against=[held_out, talk])
    assert clean_names(cleaned) == ["남는 것"]
    assert cleaned.summary.faults == {"overlap": 2}


def test_no_hangul(clean):
    """An answer without it; a record for its prompt alone is judged by the prompt."""
    records = [{"prompt": "in English", "completion": "답"}, {"prompt": "질문", "completion": "I do not know."}]
    assert clean_names(clean(records, fixes=["no_hangul"])) == ["in English"]


def test_no_hangul_in_prompts_and_in_rankings(clean, tmp_path, write):
    cleaned = clean([{"prompt": "Hello"}, {"prompt": "안녕", "completion": "Hi"}], kind="prompt", fixes=["no_hangul"])
    assert clean_names(cleaned) == ["안녕"]
    (tmp_path / "rm").mkdir()
    path = write("rm/dirty", json.dumps([RANKED, RANKED | {"prompt": "물음", "completion_1": "garbage"}]))
    assert clean_names(Cleaned(tmp_path / "rm", path, fixes=["no_hangul"])) == ["질문"]


# --- Shapes -------------------------------------------------------------------------------------


def test_alpaca_and_chatbot_fields_become_kochatgpts(clean):
    records = [
        {"id": 7, "instruction": "요약해", "input": "긴 글", "output": "짧은 글"},
        {"output": "답", "input": " ", "instruction": "질문"},
        {"instruction": "물음", "input": None, "output": "답"},
        {"Q": "뭐?", "A": "그거", "label": 0},
        {"instruction": "나", "Q": "다", "A": "라"},  # the answer tells which of the two is its prompt
        {"prompt": "가", "instruction": "나", "output": "다"},  # has a prompt that isn't its prompt
    ]
    cleaned = clean(records)
    assert cleaned.records == [
        {"id": 7, "prompt": "요약해\n\n긴 글", "completion": "짧은 글"},
        {"completion": "답", "prompt": "질문"},
        {"prompt": "물음", "completion": "답"},
        {"prompt": "뭐?", "completion": "그거", "label": 0},
        {"instruction": "나", "prompt": "다", "completion": "라"},
        records[5],
    ]
    assert [list(record) for record in cleaned.records[:2]] == [
        ["id", "prompt", "completion"],
        ["completion", "prompt"],
    ]
    assert cleaned.report == []


def test_a_mended_instruction_is_reported_under_its_new_name(clean):
    cleaned = clean([{"instruction": "'요약해", "input": "'긴 글", "output": "짧은 글"}])
    assert cleaned.report[0]["before"] == {"prompt": "'요약해\n\n'긴 글"}
    assert cleaned.report[0]["after"] == {"prompt": "요약해\n\n긴 글"}


def test_a_fault_that_only_the_joined_prompt_has(clean):
    cleaned = clean([{"instruction": '말해",', "input": '"completion": 서울', "output": "답"}])
    assert cleaned.records == [{"prompt": "말해", "completion": "답"}]
    assert cleaned.again().bytes == cleaned.bytes


def test_prompts_alone_keep_their_other_fields(clean):
    records = [{"instruction": "질문", "output": "", "id": 1}, {"Q": "물음"}, {"prompt": "뭐", "completion": 3}]
    cleaned = clean(records, kind="prompt")
    expected = [{"prompt": "질문", "completion": "", "id": 1}, {"prompt": "물음"}, records[2]]
    assert cleaned.records == expected


def test_pairs_become_rankings(clean):
    records = [
        {"id": 1, "rejected": "나쁜 답", "prompt": "질문", "chosen": "좋은 답"},
        ranking("가", "나", chosen="다", rejected="라"),  # has completions that aren't what it is read by
        {"prompt": "'물음", "chosen": "좋은 답", "rejected": "나쁜 답"} | messages("'뭐"),
    ]
    cleaned = clean(records)
    pair = {"id": 1, "completion_1": "나쁜 답", "prompt": "질문", "completion_0": "좋은 답", "ranking": [0, 1]}
    talk = (
        {"prompt": "물음", "completion_0": "좋은 답", "completion_1": "나쁜 답"} | messages("뭐") | {"ranking": [0, 1]}
    )
    assert cleaned.records == [pair, records[1], talk]
    assert list(cleaned.records[0]) == list(pair)


def test_the_layout_of_the_array_is_kochatgpts(clean):
    expected = '[\n    {\n        "prompt": "질문",\n        "completion": "답"\n    }\n]\n'
    assert clean([SFT]).bytes.decode() == expected


def test_text_and_csv_become_arrays(clean, tmp_path, write):
    cleaned = clean("첫째 줄\r\n\n 셋째 줄 \n")
    assert cleaned.records == [{"prompt": "첫째 줄"}, {"prompt": " 셋째 줄 "}]
    assert [(line["line"], line["faults"]) for line in cleaned.report] == [(2, ["empty"])]
    (tmp_path / "csv").mkdir()
    path = write("csv/dirty", '\ufeffQ,A,label\r\n"가, ""나""",답,0\r\n하나,둘\r\n')
    cleaned = Cleaned(tmp_path / "csv", path)
    assert cleaned.records == [{"prompt": '가, "나"', "completion": "답", "label": "0"}]
    assert cleaned.report[0]["before"] == {"(whole record)": "2 cells"}


def dialogue(*turns: str) -> str:
    return "\n".join([DIALOGUE_START, *(f"{SPEAKERS[i % 2]}: {text}" for i, text in enumerate(turns))]) + "\n"


def test_dialogues_stay_dialogues(clean):
    kept = dialogue("안녕", "네,\n 안녕하세요.", "잘 가", "네")
    cleaned = clean(kept + dialogue("'안녕", "<s>반가워요") + dialogue("안녕") + kept)
    assert cleaned.bytes.decode() == kept + dialogue("안녕", "반가워요")
    assert cleaned.faults == [
        (1, "changed", ["stray_quote", "special_token"]),
        (2, "dropped", ["broken"]),
        (3, "dropped", ["duplicate"]),
    ]
    assert cleaned.report[0]["before"] == {"turn 0": "'안녕", "turn 1": "<s>반가워요"}
    assert cleaned.report[1]["before"] == {"turn 0": "안녕"}


def test_a_turn_is_mended_as_it_is_read(clean):
    """A file of dialogues doesn't hold blanks at the ends of a turn, and what they hid is mended at once."""
    cleaned = clean(dialogue(r"\n'가\n", "나"))
    assert cleaned.bytes.decode() == dialogue("가", "나")
    assert cleaned.again().bytes == cleaned.bytes


@pytest.mark.parametrize("marker", [*(f"{speaker}:" for speaker in SPEAKERS), DIALOGUE_START])
def test_a_turn_that_mending_would_split_is_broken(clean, marker):
    cleaned = clean(
        dialogue("안녕", "네") + dialogue("뭐", f"네\n\u200b{marker} 그래") + dialogue(rf"뭐\n\n {marker}", "네")
    )
    assert cleaned.bytes.decode() == dialogue("안녕", "네")
    assert cleaned.faults == [(1, "dropped", ["zero_width", "broken"]), (2, "dropped", ["escape", "broken"])]
    assert cleaned.report[0]["before"] == {"turn 0": "뭐", "turn 1": f"네\n\u200b{marker} 그래"}


def messages(*contents: str, **fields) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]} | fields


def test_messages_become_dialogues(clean):
    cleaned = clean([messages("안녕", "네", "잘 가", "'네"), messages("뭐", "그거"), {"messages": "broken"}])
    assert cleaned.bytes.decode() == dialogue("안녕", "네", "잘 가", "네") + dialogue("뭐", "그거")
    assert cleaned.report[0]["before"] == messages("안녕", "네", "잘 가", "'네")
    assert cleaned.report[0]["after"] == messages("안녕", "네", "잘 가", "네")
    assert cleaned.again().bytes == cleaned.bytes


NOT_DIALOGUES = [
    messages("안녕", "네", "잘 가", "네", id=3),
    messages("안녕", "네", "잘 가", " 네"),
    messages("안녕 \n", "네", "잘 가", "네"),
    messages("안녕\r\n하세요", "네", "잘 가", "네"),
    messages("안녕\n<사람>: 뭐", "네", "잘 가", "네"),
    {"messages": [message | {"name": "가"} for message in messages("안녕", "네", "잘 가", "네")["messages"]]},
]


@pytest.mark.parametrize("record", NOT_DIALOGUES)
def test_messages_that_dialogues_dont_hold_stay_messages(clean, record):
    cleaned = clean([record], fixes=[])
    assert cleaned.records == [record]
    assert cleaned.again(fixes=[]).bytes == cleaned.bytes


def test_one_exchange_among_other_records_becomes_a_prompt_and_its_completion(clean):
    records = [NOT_DIALOGUES[0], messages("뭐", "그거", id=1), messages("뭐야", "그거", Q="다")]
    cleaned = clean(records)
    assert cleaned.records == [records[0], {"prompt": "뭐", "completion": "그거", "id": 1}, records[2]]
    assert cleaned.again().bytes == cleaned.bytes


def test_the_shape_is_that_of_what_is_left(clean):
    cleaned = clean([messages("안녕", "네", "잘 가", "네"), {"prompt": "가", "completion": ""}])
    assert cleaned.bytes.decode() == dialogue("안녕", "네", "잘 가", "네")


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["clean.json", "report.jsonl"])
def test_nothing_is_overwritten(clean, write, tmp_path, taken):
    write(taken, "mine")
    with pytest.raises(UserError, match=f"{taken} exists already"):
        clean("{broken")  # which isn't even read
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dirty", taken])


def test_the_file_is_not_edited_in_place(tmp_path, write):
    file = write("a.json", json.dumps([SFT]))
    for output, report in ((file, "r"), (tmp_path / "x" / ".." / "a.json", "r"), ("o", file), ("o", "./o")):
        with pytest.raises(UserError, match="need a name each"):
            clean_file(file, output, report=report)


def test_if_the_output_cant_be_written_there_is_no_report(clean, tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("disk full")

    monkeypatch.setattr("kochat_trl.desk.curation.clean.write_records", fail)
    with pytest.raises(UserError, match="disk full"):
        clean([{"prompt": ""}, {"prompt": "가"}])
    assert [path.name for path in tmp_path.iterdir()] == ["dirty"]


def test_names_of_fixes(clean):
    with pytest.raises(
        UserError, match=r"no fix 'swalowed'. Did you mean 'swallowed'\? The fixes are: broken, empty, "
    ):
        clean([SFT], fixes=["swalowed"])


def test_fixes_that_need_something(clean):
    for fixes, options, flag in (
        (["unknown_token"], {}, "'unknown_token' needs --tokenizer"),
        (["round_trip"], {}, "'round_trip' needs --tokenizer"),
        (["overlong"], {"max_length": 9}, "'overlong' needs --tokenizer"),
        (["overlong"], {"tokenizer": object()}, "'overlong' needs --max-length"),
        (["overlap"], {}, "'overlap' needs --against"),
    ):
        with pytest.raises(UserError, match=flag):
            clean("{broken", fixes=fixes, **options)


def test_the_kind_of_a_file(clean, write, tmp_path):
    prompt = {"prompt": "뭐"}
    assert clean([SFT, prompt, SFT | {"prompt": "물음"}]).faults == [(1, "dropped", ["broken"])]
    for records, message in (
        ([SFT, prompt], r"different kinds \(1 sft, 1 prompt\)"),
        ([SFT, prompt, prompt], r"different kinds \(2 prompt, 1 sft\)"),
        ([SFT, SFT, RANKED], r"different kinds \(2 sft, 1 preference\)"),
        ([{"text": "가"}], "no record has fields that tell"),
    ):
        with pytest.raises(UserError, match=f"{message}.*--kind"):
            clean_file(write("mixed.json", json.dumps(records)), tmp_path / "o", report=tmp_path / "r")
    (tmp_path / "told").mkdir()
    cleaned = Cleaned(tmp_path / "told", write("told.json", json.dumps([SFT, prompt, prompt])), kind="prompt")
    assert clean_names(cleaned) == ["질문", "뭐"]


def test_cleaning_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets', 'rich'}"
    code = f"import sys, kochat_trl.desk.curation.clean; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_summary(clean):
    cleaned = clean([SFT, SFT, {"prompt": "'가", "completion": "나"}, {"prompt": "", "completion": "'나"}])
    assert cleaned.summary.faults == {"empty": 1, "stray_quote": 2, "duplicate": 1}
    assert list(cleaned.summary.faults) == ["empty", "stray_quote", "duplicate"]  # as in FAULTS
    shown = io.StringIO()
    print_summary(cleaned.summary, Console(file=shown, width=400))
    assert "stray_quote │ 2" in shown.getvalue()
    assert "/dirty: 4 records read, 2 written, 1 of them changed; 2 dropped." in shown.getvalue()


# --- With a tokenizer ---------------------------------------------------------------------------


def test_unknown_tokens_and_round_trips(clean, tiny_tokenizer):
    """Its NFKC makes `？` a `?`, and it has no token for `漢`; both are in no other text that it was trained on."""
    prompts = ["몰라</s>", "대한민국의 수도는?", "대한민국의 수도는？", "漢", " 몰라"]
    records = [{"prompt": prompt, "completion": "몰라"} for prompt in prompts]
    cleaned = clean(records, fixes=["unknown_token"], tokenizer=tiny_tokenizer)
    assert cleaned.faults == [(3, "dropped", ["unknown_token"])]
    again = cleaned.again(fixes=["round_trip"], tokenizer=tiny_tokenizer)
    assert again.faults == [(2, "dropped", ["round_trip"]), (3, "dropped", ["round_trip"])]
    assert clean_names(again) == prompts[:2]


def test_a_half_character_that_recipes_dont_read_is_no_error(clean, tiny_tokenizer):
    records = [{"prompt": "몰라", "completion": "\ud800"}]
    cleaned = clean(records, kind="prompt", fixes=["round_trip"], tokenizer=tiny_tokenizer)
    assert cleaned.summary.dropped == 1


def test_overlong(clean, tmp_path, write, tiny_tokenizer):
    """A record is as long as the longest row that it gives, template and end of sequence included."""
    short, long = "몰라", "몰라 몰라 몰라 몰라"
    files = {
        "prompt": [{"prompt": short}, {"prompt": long}],
        "sft": [{"prompt": short, "completion": short}, {"prompt": short, "completion": long}],
        "talk": [messages(short, short), messages(short, short, short, short)],
        "preference": [
            ranking(short, "반가", long, ranking=[1, 0]),  # the long one is not ranked, so it gives no row
            ranking(short, long, ranking=[0, 1]),
        ],
    }
    prompt_length = len(encode_prompts(tiny_tokenizer, [short])[0])
    length = len(encode_dialogues(tiny_tokenizer, [conversation(short, short)])[0][0])
    for name, records in files.items():
        path = write(f"{name}/dirty", json.dumps(records))
        options = {"tokenizer": tiny_tokenizer, "max_length": prompt_length if name == "prompt" else length}
        cleaned = Cleaned(tmp_path / name, path, fixes=["overlong"], **options)
        assert cleaned.faults == [(1, "dropped", ["overlong"])], name
        (tmp_path / name / "less").mkdir()
        options["max_length"] -= 1
        assert Cleaned(tmp_path / name / "less", path, fixes=["overlong"], **options).summary.written == 0, name


def test_all_fixes_at_once(clean, write, tiny_tokenizer):
    options = {"tokenizer": tiny_tokenizer, "max_length": 20, "against": [write("held", json.dumps([SFT]))]}
    records = [SFT, {"prompt": "'반가워요", "completion": "저도</s> 반가워요."}, {"prompt": "漢", "completion": "몰라"}]
    records += [{"prompt": "반가", "completion": "몰라 " * 20}, {"prompt": "반가", "completion": "저도  반가워요."}]
    cleaned = clean(records, fixes=FAULTS, **options)
    assert cleaned.faults == [
        (0, "dropped", ["overlap"]),
        (1, "changed", ["stray_quote", "special_token"]),
        (2, "dropped", ["unknown_token", "round_trip"]),
        (3, "dropped", ["overlong"]),
    ]
    assert cleaned.again(fixes=FAULTS, **options).bytes == cleaned.bytes


# --- On anything --------------------------------------------------------------------------------

PIECES = [
    *("'", '"', "\\", r"\n", r"\xa0", r"\'", "', 'completion': '", '", "tokens":', "{", ",", "80", "a", " ", "\t"),
    *("</s>", "<s>", "<", "/s>", "<unk>", "<|im_end|>", "<|", "|>", "\0", "\r", "\n", "\r\n", "\x85", "\v", "\x1c"),
    *("\u200b", "\u200d", "\u3164", "\ufeff", "\u00a0", "\u3000", "\u2028", "\ufffd", "👩", "가", "나", "다", "ㅋ"),
    *(NFD, NFD[0], NFD[1], "\u0301", "\u0958", "\uf9d1", "①", "1", DIALOGUE_START, "\n<사람>:", "<챗봇>: "),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
FEW = st.sampled_from(["가", "나", "'가", "가\u200b", "나 ", "①", "a"])  # that meet one another often
WORDS = FEW | TEXTS
ODD = st.none() | st.integers(0, 3) | st.just("\ud800") | st.just([])
EXTRA = st.fixed_dictionaries({}, optional={"tokens": st.integers(), "label": WORDS, "input": WORDS, "Q": WORDS})


def fields(names: dict[str, st.SearchStrategy]) -> st.SearchStrategy[dict]:
    """Records with these fields in any order, and now and then with one too few or of the wrong type."""
    whole = st.builds(lambda own, extra: own | extra, st.fixed_dictionaries(names), EXTRA)
    odd = st.fixed_dictionaries({}, optional={name: values | ODD for name, values in names.items()})
    return st.one_of(whole, whole, whole, odd).flatmap(lambda r: st.permutations(list(r.items())).map(dict))


MESSAGES = st.lists(WORDS, min_size=1, max_size=4).map(lambda turns: messages(*turns)["messages"])
SFT_RECORDS = (
    fields({"prompt": WORDS, "completion": WORDS})
    | fields({"instruction": WORDS, "input": WORDS | st.none(), "output": WORDS})
    | fields({"Q": WORDS, "A": WORDS})
    | fields({"messages": MESSAGES})
)
RANKINGS = st.lists(st.integers(0, 3) | st.none() | st.lists(st.integers(0, 3), max_size=2), max_size=4)
RANKINGS |= st.permutations([0, 1, 2]) | st.permutations([0, 1])
COMPLETIONS = {f"completion_{i}": WORDS for i in range(4)}
PREFERENCE_RECORDS = fields({"prompt": WORDS, "chosen": WORDS, "rejected": WORDS}) | st.integers(2, 4).flatmap(
    lambda count: fields({"prompt": WORDS, **dict(list(COMPLETIONS.items())[:count]), "ranking": RANKINGS})
)
PROMPT_RECORDS = fields({"prompt": WORDS}) | fields({"instruction": WORDS, "input": WORDS}) | fields({"Q": WORDS})
RECORDS = {"sft": SFT_RECORDS, "preference": PREFERENCE_RECORDS, "prompt": PROMPT_RECORDS | SFT_RECORDS}


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str]:
    """The kind and the text of a file; of three in four records, another is a copy."""
    kind = draw(st.sampled_from(sorted(RECORDS)))
    if kind != "preference" and draw(st.integers(0, 3)) == 0:
        talks = draw(st.lists(st.lists(WORDS.map(str.strip), min_size=2, max_size=4), min_size=1, max_size=4))
        return kind, "".join(dialogue(*turns) for turns in talks)
    shape = MESSAGES.map(lambda content: {"messages": content}) if draw(st.integers(0, 5)) == 0 else RECORDS[kind]
    records = draw(st.lists(shape, max_size=4))
    records += draw(st.lists(st.sampled_from(records), max_size=2)) if records else []
    if draw(st.booleans()):
        return kind, "\n".join(map(json.dumps, records)) + "\nnull\n{broken"
    return kind, json.dumps(records)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
@pytest.mark.parametrize("fault", [fault.name for fault in TEXT_FAULTS])
def test_a_mended_text_has_the_fault_no_more(fault, text):
    mend = FAULTS[fault].mend
    assert mend(mend(text)) == mend(text)


@pytest.mark.parametrize("names", [DEFAULT, ALL, ERRORS, [*ERRORS, "near_duplicate", "contradiction", "swallowed"]])
@pytest.mark.parametrize("order", ["best_first", "rank_of"])
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(file=files(), tell_kind=st.booleans())
def test_whatever_is_cleaned(tmp_path_factory, names, order, file, tell_kind):
    """Cleaning again changes nothing, no record is lost or invented, and what isn't reported is as it was."""
    kind, text = file
    folder = tmp_path_factory.mktemp("any")
    (folder / "dirty").write_text(text, encoding="utf-8")
    (folder / "held").write_text('[{"prompt": "나"}]', encoding="utf-8")
    options = {"fixes": names, "against": [folder / "held"] if "overlap" in names else [], "kind": kind}
    try:
        options["kind"] = kind if tell_kind else None
        cleaned = Cleaned(folder, folder / "dirty", order=order, **options)
    except UserError as error:
        if "--kind" not in str(error) and f"expected '{DIALOGUE_START}' alone" not in str(error):
            raise
        reject()  # a file that mixes kinds, or whose dialogues can't be read

    again = cleaned.again(**options)
    assert again.bytes == cleaned.bytes
    assert again.report == []

    raws, summary = list(read_records(folder / "dirty")), cleaned.summary
    dropped = {line["index"] for line in cleaned.report if line["action"] == "dropped"}
    changes = {line["index"]: line for line in cleaned.report if line["action"] == "changed"}
    assert (summary.read, summary.dropped, summary.changed) == (len(raws), len(dropped), len(changes))
    left = [raw for raw in raws if raw.source.index not in dropped]
    written = list(read_records(cleaned.output))
    assert len(left) == len(written) == summary.written
    for old, new in zip(left, written, strict=True):
        change = changes.get(old.source.index)
        if change is None and tell_kind:
            assert parsed(old, kind, order) == parsed(new, kind)
        if change is not None:
            assert change["before"] != change["after"]
            if isinstance(new.fields, dict) and old.fields.keys() >= new.fields.keys():  # none of them renamed
                kept = {name: value for name, value in old.fields.items() if name not in change["before"]}
                assert without_ranking(kept | change["after"]) == without_ranking(new.fields)


def without_ranking(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if name != "ranking"}


def parsed(raw, kind, order="best_first"):
    """What recipes read in a record; of one that they refuse for its ties, the texts and the ranking."""
    try:
        return parse(raw, kind, order)
    except RecordError as error:
        if error.fault != "tied":
            raise
    count = sum(name.startswith("completion_") for name in raw.fields)
    return texts(raw), ranking_tiers(raw.fields["ranking"], count, order)


# --- On the real files --------------------------------------------------------------------------


def test_a_field_of_a_message_is_not_lost(tmp_path):
    turns = [{"role": "user", "content": "안녕", "name": "철수"}, {"role": "assistant", "content": "네, 안녕하세요."}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    clean_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", report=tmp_path / "report.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == [{"messages": turns}]


def test_the_real_prompts(clean, shared, tmp_path):
    """Mended, they are those of the seed file that they were made from, where nothing is escaped or swallowed."""
    folder = shared / "data/kochatgpt"
    (tmp_path / "seed").mkdir()
    prompts = Cleaned(tmp_path, folder / "kochatgpt_3_PPO.jsonl")
    seeds = Cleaned(tmp_path / "seed", folder / "kochatgpt_seed_data.txt")
    assert prompts.summary.faults == {"empty": 3, "swallowed": 25, "escape": 20, "duplicate": 52}
    assert seeds.summary.faults == {"empty": 3, "no_break_space": 19, "duplicate": 52}
    assert [index for index, action, faults in prompts.faults if faults == ["empty"]] == [6330, 6699, 7405]
    for cleaned, changed in ((prompts, 45), (seeds, 19)):
        summary = cleaned.summary
        assert (summary.read, summary.written, summary.changed, summary.dropped) == (12_000, 11_945, changed, 55)
    lost_its_first_letter = {"urn me loose를 부른 가수는 누구인가요?", "turn me loose를 부른 가수는 누구인가요?"}
    assert set(clean_names(prompts)) ^ set(clean_names(seeds)) == lost_its_first_letter
    assert prompts.again().bytes == prompts.bytes


def test_the_real_answers_and_rankings(shared, tmp_path, clean):
    (tmp_path / "rm").mkdir()
    answers = Cleaned(tmp_path, shared / "data/kochatgpt/kochatgpt_1_SFT.excerpt.jsonl")
    assert answers.summary.faults == {"stray_quote": 4}
    for line, record in zip(answers.report, answers.records, strict=True):
        assert line["before"] == {"completion": "'" + record["completion"]}
    rankings = Cleaned(tmp_path / "rm", shared / "data/kochatgpt/kochatgpt_2_RM.excerpt.jsonl")
    [line] = rankings.report
    assert line["faults"] == ["escape"]
    assert line["after"]["completion_1"] == line["before"]["completion_1"].replace(r"\n", "\n").replace(r"\'", "'")
    assert [record["ranking"] for record in rankings.records] == [[2, 1, 0], [2, 0, 1], [1, 2, 0], [1, 0, 2]]


def test_real_files_without_faults_come_out_as_they_are(shared, tmp_path):
    """But for the shape, and for two rankings whose completions are the same."""
    kinds = {"chatbot/ChatbotData.csv": ("sft", 73), "kochatgpt/kochatgpt_1_SFT_conversation.jsonl": ("sft", 0)}
    kinds |= {"mygpt/ive_train_rm.jsonl": ("preference", 2), "mygpt/ive_instruction_train.jsonl": ("sft", 0)}
    for name, (kind, dropped) in kinds.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        cleaned = Cleaned(folder, shared / "data" / name)
        assert (cleaned.summary.changed, cleaned.summary.dropped) == (0, dropped)
        gone = {line["index"] for line in cleaned.report}
        old = [parse(raw, kind) for raw in read_records(shared / "data" / name) if raw.source.index not in gone]
        assert [parse(raw, kind) for raw in read_records(cleaned.output)] == old
