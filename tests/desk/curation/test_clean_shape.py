"""Records mended in the shape that they have: rankings without copies, every shape, every format of a file."""

import json

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, read_records
from kochat_trl.data.records import Source
from kochat_trl.data.shapes import SHAPES, tagged_spans
from kochat_trl.desk.curation.clean import clean_file
from kochat_trl.desk.curation.texts import texts, with_texts
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
    cleaned = clean([ranking(*completions, ranking=order, tokens=9)])
    assert cleaned.records == [ranking(*left, ranking=new_order, tokens=9)]
    assert cleaned.faults[0][2][-1] == "equal"
    assert cleaned.again().bytes == cleaned.bytes


def test_the_report_of_a_ranking_has_the_fields_that_changed(clean):
    cleaned = clean([ranking("가", "나", "나", "다", ranking=[0, 1, 2, 3])])
    assert cleaned.report[0]["before"] == {"completion_2": "나", "completion_3": "다", "ranking": [0, 1, 2, 3]}
    assert cleaned.report[0]["after"] == {"completion_2": "다", "ranking": [0, 1, 2]}


def test_the_report_of_a_ranking_has_a_null_that_is_gone(clean):
    [line] = clean([score("가", "나", "가", rank=[2, 1, None])]).report
    assert line["before"] == {"responses[2].text": "가", "responses[2].rank": None}
    assert line["after"] == {}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "질문", "chosen": "가", "rejected": "가"},
        {"prompt": "질문", "chosen": "가", "rejected": "'가"},
        {"prompt": "질문", "chosen": {"content": "가"}, "rejected": {"content": "가"}},
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


def score(*texts, **scores):
    """Answers that are objects, with something beside each text."""
    ((name, values),) = scores.items()
    return {"prompt": "질문", "responses": [{"text": t, name: value} for t, value in zip(texts, values, strict=True)]}


# Of the answers 가, 나, 가, 다 the third is a copy: what it leaves in each notation.
NOTATIONS = [
    (ranking("가", "나", "가", "다", ranking="3,1,0,2"), ranking("가", "나", "다", ranking="2,1,0")),
    (ranking("가", "나", "가", "다", ranking="[3 > 1 > 0 > 2]"), ranking("가", "나", "다", ranking="[2 > 1 > 0]")),
    (ranking("가", "나", "가", "다", ranking=["3", "1", "0", "2"]), ranking("가", "나", "다", ranking=["2", "1", "0"])),
    (ranking("가", "나", "가", "다", ranking=[4, 2, 1, 3]), ranking("가", "나", "다", ranking=[3, 2, 1])),
    (ranking("가", "나", "가", "다", ranking="4 2 3 1"), ranking("나", "가", "다", ranking="3 1 2")),
    (
        {"prompt": "질문", "responses": ["가", "나", "가", "다"], "ranking": [3, [0, 1], 2]},
        {"prompt": "질문", "responses": ["가", "나", "다"], "ranking": [2, [0, 1]]},
    ),
    (
        {"prompt": "질문", "completions": ["가", "나", "가", "다"], "scores": [1, 2.5, 0, None]},
        {"prompt": "질문", "completions": ["가", "나", "다"], "scores": [1, 2.5, None]},
    ),
    (score("가", "나", "가", "다", score=[1, 2, 0, 3]), score("가", "나", "다", score=[1, 2, 3])),
    (score("가", "나", "가", "다", rank=[3, 2, 4, 1]), score("가", "나", "다", rank=[3, 2, 1])),
    (
        {"prompt": "질문", "responses": ["가", "나", "가", "다"], "ranks": [4, 2, 3, 1]},
        {"prompt": "질문", "responses": ["나", "가", "다"], "ranks": [2, 3, 1]},
    ),
    (
        {"질문": "뭐", "답변1": "가", "score1": 3, "답변2": "나", "score2": 2, "답변3": "가", "score3": 4},
        {"질문": "뭐", "답변1": "나", "score1": 2, "답변2": "가", "score2": 4},
    ),
    (
        {"prompt": "질문", "response_a": "가", "response_b": "가", "response_c": "나"},
        {"prompt": "질문", "response_a": "가", "response_b": "나"},
    ),
    ({"instruction": "질문", "outputs": ["가", "가"]}, {"instruction": "질문", "outputs": ["가"]}),
    (
        {
            "prompt": [{"role": "user", "content": "질문"}],
            "completions": [[{"role": "assistant", "content": text}] for text in ("가", "가", "나")],
            "scores": [3, 2, 1],
        },
        {
            "prompt": [{"role": "user", "content": "질문"}],
            "completions": [[{"role": "assistant", "content": text}] for text in ("가", "나")],
            "scores": [3, 1],
        },
    ),
]


@pytest.mark.parametrize(("record", "left"), NOTATIONS)
def test_a_copy_is_removed_in_the_notation_of_the_file(clean, record, left):
    cleaned = clean([record])
    assert cleaned.records == [left]
    assert [*cleaned.records[0]] == [name for name in record if name in left]
    assert cleaned.faults == [(0, "changed", ["equal"])]
    assert cleaned.again().bytes == cleaned.bytes


RANK_OF = ReadingOptions(ranking_order="rank_of")


def test_a_rank_of_file_stays_one(clean):
    """`rank_of` [2, 0, 1] says that completion 1 is the best and 0 the worst."""
    records = [
        RANKED,
        RANKED | {"prompt": "물음", "ranking": [1, 0, 1]},
        RANKED | {"prompt": "뭐", "ranking": [0, None, 1]},
        RANKED | {"prompt": "왜", "ranking": "3,1,2"},
    ]
    cleaned = clean(records, options=RANK_OF)
    assert (cleaned.records, cleaned.report) == (records, [])


@pytest.mark.parametrize(
    ("order", "left", "new_order"),
    [
        ([2, 0, 1], ["나", "가"], [0, 1]),  # the second copy stands higher
        ([1, 0, 2], ["가", "나"], [1, 0]),
        ([None, 5, 3], ["나", "가"], [5, 3]),
        ("3,1,2", ["나", "가"], "1,2"),
        (["2", "1", "3"], ["가", "나"], ["2", "1"]),
    ],
)
def test_a_copy_in_a_rank_of_file(clean, order, left, new_order):
    cleaned = clean([ranking("가", "나", "가", ranking=order)], options=RANK_OF)
    assert cleaned.records == [ranking(*left, ranking=new_order)]
    assert cleaned.again(options=RANK_OF).bytes == cleaned.bytes


def test_a_ranking_that_is_none_in_the_order_it_is_read_with_is_broken(clean):
    """[0, 1] of three completions would do as best_first."""
    cleaned = clean([RANKED, RANKED | {"ranking": [0, 1]}], options=RANK_OF)
    assert cleaned.faults == [(1, "dropped", ["broken"])]


def test_ties(clean):
    """A ranking without any pair is one that recipes refuse, so it goes whatever was chosen."""
    tied = [
        RANKED | {"prompt": prompt, "ranking": r}
        for prompt, r in [("가", [[0, 1], 2]), ("나", [[0, 1, 2]]), ("다", []), ("마", [1])]
    ]
    single = RANKED | {"prompt": "라", "ranking": [[1], 0]}
    for fixes in (None, []):
        cleaned = clean([*tied, single], fixes=fixes)
        assert cleaned.records == [tied[0], single]
        assert cleaned.faults == [(i, "dropped", ["tied"]) for i in (1, 2, 3)]
        for name in ("clean.json", "report.jsonl"):
            (cleaned.folder / name).unlink()
    cleaned = clean([*tied, single], fixes=["tied"])
    assert cleaned.records == [single]
    assert cleaned.faults == [(i, "dropped", ["tied"]) for i in range(4)]


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


def raw(fields):
    return RawRecord(Source("a.jsonl", 0, 1), fields)


DIRT = {"special_token": lambda text: f"{text}</s>", "stray_quote": lambda text: f"'{text}"}


@pytest.mark.parametrize("fault", DIRT)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_record_of_any_shape_keeps_it(clean, shape, fault):
    """Each of its texts is mended by itself, and nothing else of it is touched."""
    known = texts(raw(shape.example))
    assert known
    records = [with_texts(shape.example, {place: DIRT[fault](text)}) for place, (_, text) in known.items()]
    records.append(with_texts(shape.example, {place: DIRT[fault](text) for place, (_, text) in known.items()}))
    cleaned = clean(records, fixes=[fault])
    assert cleaned.records == [shape.example] * len(records)
    assert list(map(list, cleaned.records)) == [list(shape.example)] * len(records)
    assert cleaned.faults == [(i, "changed", [fault]) for i in range(len(records))]
    assert clean_texts(cleaned, -1) == sorted(text for _, text in known.values())


def clean_texts(cleaned, i):
    """The texts that the report has of a record after it was mended, out of a dialogue in one text, too."""
    said = []
    for text in cleaned.report[i]["after"].values():
        spans = tagged_spans(text)
        said += [text[start:end].strip() for _, start, end in spans] if spans else [text]
    return sorted(said)


def test_names_notations_and_other_fields_stay(clean):
    records = [
        {"id": 7, "instruction": "요약해", "input": "긴 글", "output": "짧은 글"},
        {"output": "답", "input": " ", "instruction": "질문"},
        {"instruction": "물음", "input": None, "output": "답"},
        {"Q": "뭐?", "A": "그거", "label": 0},
        {"prompt": "다시", "response": [{"type": "text", "text": "네"}]},
        {"text": "<usr> 왜 <bot>  그냥 "},
        messages("안녕", "네", "잘 가", " 네 \n", id=3),
        {"messages": [message | {"id": "가"} for message in messages("왜", "네")["messages"]]},
        {"question": "뭐라고?", "history": [["가", "나"]], "answer": "네"},
        {"prompt": "가", "messages": messages("가", "나")["messages"]},
    ]
    cleaned = clean(records)
    assert cleaned.records == records
    assert list(map(list, cleaned.records)) == list(map(list, records))
    assert cleaned.report == []


def test_an_instruction_and_its_input_are_mended_each(clean):
    cleaned = clean([{"instruction": "'요약해", "input": "'긴 글", "output": "짧은 글"}])
    assert cleaned.records == [{"instruction": "요약해", "input": "긴 글", "output": "짧은 글"}]
    assert cleaned.report[0]["before"] == {"instruction": "'요약해", "input": "'긴 글"}
    assert cleaned.report[0]["after"] == {"instruction": "요약해", "input": "긴 글"}


def test_a_report_names_leaves(clean):
    cleaned = clean([messages("안녕", "'네"), {"instruction": "뭐", "instances": [{"input": "", "output": "'답"}]}])
    assert [line["before"] for line in cleaned.report] == [
        {"messages[1].content": "'네"},
        {"instances[0].output": "'답"},
    ]
    assert [line["after"] for line in cleaned.report] == [{"messages[1].content": "네"}, {"instances[0].output": "답"}]


def test_what_is_said_twice_is_mended_twice(clean):
    talk = messages("'뭐", "그거")
    cleaned = clean([{"prompt": "'뭐"} | talk, {"prompt": "뭐", "response": "'네"} | messages("뭐", "'네")])
    assert cleaned.records == [
        {"prompt": "뭐"} | messages("뭐", "그거"),
        {"prompt": "뭐", "response": "네"} | messages("뭐", "네"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<usr> 뭐 <b</s>ot> 네 <bot> 그래",
        r"Human: 뭐\n\nAssistant: 네",
        "Human: 뭐\nAssistant: 네\\n\\nHuman: 왜\\n\\nAssistant: 그래",
        "Human: 뭐\nAssistant: 네\n\u200bHuman: 왜\n\u200bAssistant: 그래",
    ],
)
def test_a_tag_that_mending_brings_out_is_broken(clean, text):
    """It would make another turn of what was said in one."""
    cleaned = clean([{"text": text}, {"text": "<usr> 뭐 <bot> 네"}])
    assert cleaned.records == [{"text": "<usr> 뭐 <bot> 네"}]
    assert cleaned.faults[0][1:] == ("dropped", [cleaned.faults[0][2][0], "broken"])
    assert "expected no tag of a speaker that mending brings out" in cleaned.report[0]["error"]


def test_an_answer_beside_a_prompt_is_one_text_whatever_tags_it_has(clean):
    answer = "Human: 'hey\nAssistant: 'ho"
    record = {"prompt": "뭐라고 썼어?", "completion": answer}
    assert clean([record]).records == [record]


def test_prompts_alone_keep_their_other_fields(clean):
    records = [{"instruction": "질문", "output": "", "id": 1}, {"Q": "물음"}, {"prompt": "뭐", "completion": 3}]
    cleaned = clean(records, kind="prompt")
    assert (cleaned.records, cleaned.report) == (records, [])


def test_what_is_left_is_read_with_the_options_that_it_was_read_with(tmp_path):
    """By these one record with a list of objects is no object that holds records."""
    dirty, out = tmp_path / "dirty.jsonl", tmp_path / "out.jsonl"
    record = {"고객": "뭐?", "상담사": "네.", "자료": [{"a": 1}]}
    dirty.write_text(f"{json.dumps(record)}\n" * 2, encoding="utf-8")
    options = ReadingOptions(columns={"고객": "prompt", "상담사": "completion", "자료": "ignore"})
    clean_file(dirty, out, report=tmp_path / "report", fixes=["duplicate"], options=options)
    assert [raw.fields for raw in read_records(out, options)] == [record]


@pytest.mark.parametrize(("text", "name"), [("질문\n뭐?\n", "out.txt"), ("질문,답\n뭐?,네\n", "out.tsv")])
def test_a_table_is_not_written_under_a_name_that_says_something_else(tmp_path, text, name):
    dirty = tmp_path / "dirty.csv"
    dirty.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a table of that name would be taken for something else; name it \.csv"):
        clean_file(dirty, tmp_path / name, report=tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["dirty.csv"]
    for name in ("out.csv", "out"):
        clean_file(dirty, tmp_path / name, report=tmp_path / f"{name}.report")
        assert (tmp_path / name).read_text(encoding="utf-8") == text


UNCLEAR = [
    {"prompt": "가", "completion": "나", "비고": "글"},  # nothing reads it
    {"prompt": "가", "instruction": "나", "output": "다"},  # two are the prompt
    {"instruction": "가", "Q": "나", "A": "다"},
    ranking("가", "나", chosen="다", rejected="라"),  # out of place
    {"prompt": "물음", "chosen": "좋은 답", "rejected": "나쁜 답"} | messages("다른 물음"),
    {"messages": [message | {"name": "철수"} for message in messages("안녕", "네")["messages"]]},
]


@pytest.mark.parametrize("record", UNCLEAR)
def test_a_field_that_cant_be_told_is_refused_and_not_dropped(clean, record, tmp_path):
    good = RANKED if "chosen" in record else SFT
    kind = "preference" if "chosen" in record else "sft"
    with pytest.raises(UserError, match=r"1 of 2 records can't be rewritten(.|\n)*line 1 \(record 1\)(.|\n)*unclear"):
        clean([good, record], kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["dirty"]
    cleaned = clean([good, record], kind=kind, fixes=["unclear"])
    assert cleaned.records == [good]
    assert cleaned.faults == [(1, "dropped", ["unclear"])]


def test_it_may_be_told_what_a_field_is(clean):
    options = ReadingOptions(columns={"물어본 것": "prompt", "답한 것": "completion", "비고": "ignore"})
    record = {"물어본 것": "'뭐", "답한 것": "그거", "비고": "'글"}
    cleaned = clean([record], options=options)
    assert cleaned.records == [record | {"물어본 것": "뭐"}]


# --- Files ----------------------------------------------------------------------------------------


def test_the_layout_of_the_array_is_kochatgpts(clean):
    expected = '[\n    {\n        "prompt": "질문",\n        "completion": "답"\n    }\n]\n'
    assert clean([SFT]).bytes.decode() == expected


def test_files_keep_their_format(clean, tmp_path, write):
    cleaned = clean("첫째 줄\r\n\n 셋째 '줄' </s>\n")
    assert cleaned.bytes.decode() == "첫째 줄\n셋째 '줄'\n"
    assert [(line["line"], line["faults"]) for line in cleaned.report] == [(2, ["empty"]), (3, ["special_token"])]
    files = {
        "csv": ('\ufeffQ,A,label\r\n"가, ""나""",답</s>,0\r\n하나,둘\r\n', 'Q,A,label\n"가, ""나""",답,0\n'),
        "tsv": ("질문\t답변\n'뭐\t그거\n", "질문\t답변\n뭐\t그거\n"),
        "lines": ('{"Q": "\'뭐", "A": "그거"}\n\n{broken\n', '{"Q": "뭐", "A": "그거"}\n'),
        "object": (
            '{"version": "1", "data": [{"Q": "뭐</s>", "A": "그거"}]}',
            '{\n    "version": "1",\n    "data": [\n        {\n            "Q": "뭐",\n'
            '            "A": "그거"\n        }\n    ]\n}\n',
        ),
    }
    for name, (dirty, expected) in files.items():
        cleaned = Cleaned(tmp_path / name, write(f"{name}/dirty", dirty))
        assert cleaned.bytes.decode() == expected
        assert cleaned.again().bytes == cleaned.bytes
        if name == "csv":
            assert cleaned.report[1]["before"] == {"(whole record)": "2 cells"}


def test_dialogues_stay_dialogues(clean):
    kept = dialogue("안녕", "네,\n 안녕하세요.", "잘 가", "네")
    cleaned = clean(kept + dialogue("'안녕", "<s>반가워요") + dialogue("안녕") + kept)
    assert cleaned.bytes.decode() == kept + dialogue("안녕", "반가워요")
    assert cleaned.faults == [
        (1, "changed", ["stray_quote", "special_token"]),
        (2, "dropped", ["broken"]),
        (3, "dropped", ["duplicate"]),
    ]
    assert cleaned.report[0]["before"] == {"messages[0].content": "'안녕", "messages[1].content": "<s>반가워요"}
    assert cleaned.report[1]["before"] == {"messages": [{"role": "<사람>", "content": "안녕"}]}


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
    turns = zip(SPEAKERS, ("뭐", f"네\n\u200b{marker} 그래"), strict=True)
    assert cleaned.report[0]["before"] == {"messages": [{"role": name, "content": text} for name, text in turns]}


@pytest.mark.parametrize("lines", [False, True])
def test_messages_stay_messages(clean, lines):
    """Even where a file of KoChatGPT's dialogues would hold them."""
    records = [messages("안녕", "네", "잘 가", "'네"), messages("뭐", "그거"), {"messages": "broken"}]
    as_lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    cleaned = clean(as_lines if lines else records)
    assert cleaned.records == [messages("안녕", "네", "잘 가", "네"), messages("뭐", "그거")]
    assert cleaned.report[0]["before"] == {"messages[3].content": "'네"}
    assert cleaned.report[0]["after"] == {"messages[3].content": "네"}
    assert cleaned.bytes.startswith(b"{" if lines else b"[")
    assert cleaned.again().bytes == cleaned.bytes


def test_what_is_left_of_a_mixed_file_keeps_its_format(clean):
    talk = messages("안녕", "네", "잘 가", "네")
    cleaned = clean([talk, {"prompt": "가", "completion": ""}, {"prompt": "뭐", "completion": "그거", "id": 1}])
    assert cleaned.records == [talk, {"prompt": "뭐", "completion": "그거", "id": 1}]
    assert cleaned.bytes.startswith(b"[\n    {\n")
