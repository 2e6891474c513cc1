"""The faults of a text: what each is told by, and what mending makes of it."""

from kochat_trl.data.text import has_hangul
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS
from tests.desk.curation.helpers import NFD, RANKED, SFT, TEXTS

import pytest
from hypothesis import given, settings

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


# --- On anything ----------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=TEXTS)
@pytest.mark.parametrize("fault", [fault.name for fault in TEXT_FAULTS])
def test_a_mended_text_has_the_fault_no_more(fault, text):
    mend = FAULTS[fault].mend
    assert mend(mend(text)) == mend(text)
