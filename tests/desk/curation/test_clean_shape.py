"""Records mended and in KoChatGPT's shape: rankings without copies, other shapes and names, dialogues."""

from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS
from kochat_trl.errors import UserError
from tests.desk.curation.helpers import RANKED, SFT, Cleaned, clean_names, dialogue, messages, ranking

import pytest

# --- Rankings -------------------------------------------------------------------------------------

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


# --- Shapes ---------------------------------------------------------------------------------------


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
