"""What people's records are read as, what is refused, and that no text is left out without a word."""

import re
from contextlib import suppress
from itertools import combinations

from kochat_trl.data.layout import Layout, RawRecord
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.parse import kind_of, parse
from kochat_trl.data.records import Dialogue, Labelled, Prompt, Ranking, RecordError, Source
from kochat_trl.data.shapes import NAMES, ROLES, SHAPES, shape_of_roles
from kochat_trl.desk.curation.finders import contents_of
from kochat_trl.desk.curation.texts import mended, texts, with_texts
from kochat_trl.errors import UserError
from tests.data.foreign import BOT, FOREIGN, THREE, TURNS, USER, openai, sharegpt, unaccounted

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

FIXED = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def raw(fields, **options):
    return RawRecord(Source("a.jsonl", 0, 1), fields, Layout(ReadingOptions(**options)))


def raws(foreign):
    layout = Layout(foreign.options)
    return [RawRecord(Source("a.jsonl", i, i + 1), fields, layout) for i, fields in enumerate(foreign.records)]


# --- Read as meant --------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_records_that_people_have(foreign):
    assert [record for one in raws(foreign) for record in parse(one, foreign.kind)] == foreign.expected
    assert not any(unaccounted(one, parse(one, foreign.kind)) for one in raws(foreign))
    assert {kind_of(one) for one in raws(foreign)} == {foreign.kind}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_prompts_of_any_of_these(foreign):
    """What is asked; of a dialogue that is answered to its end, the first question."""
    asked = []
    for record in foreign.expected:
        if isinstance(record, Dialogue):
            whole = "history" not in foreign.records[0] and len(record.texts) > 2
            first = whole and ("conversations" in str(foreign.records) or "messages" in str(foreign.records))
            whole = whole and "text" in foreign.records[0]
            texts = record.texts[:1] if (first or whole) and "response" not in foreign.records[0] else record.texts[:-1]
            asked.append(Prompt(texts[-1], record.system, texts[:-1]))
        else:
            asked.append(record if isinstance(record, Prompt) else record.asked)
    assert list(dict.fromkeys(p for one in raws(foreign) for p in parse(one, "prompt"))) == list(dict.fromkeys(asked))


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_every_text_that_is_read_is_found_and_put_back(foreign):
    for one in raws(foreign):
        found = texts(one, repeated=True)
        whole = " ".join(text for _, text in found.values())
        for record in parse(one, foreign.kind):
            for text in (*contents_of(record), record.system or ""):
                assert all(piece in whole for piece in text.split("\n\n"))
        new = {place: f"{text.rstrip()}!" for place, (_, text) in found.items() if text.strip()}
        assert with_texts(one.fields, {}) == one.fields
        other = mended(one, new)
        assert {place: text for place, (_, text) in texts(other, repeated=True).items() if text.strip()} == new
        for old, read in zip(parse(one, foreign.kind), parse(other, foreign.kind), strict=True):
            assert len(contents_of(read)) == len(contents_of(old))
            assert all(text.endswith("!") for text in contents_of(read))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_examples_of_the_table(shape):
    one = raw(dict(shape.example))
    assert one.layout.plan(one.fields).shape == shape
    assert kind_of(one) == shape.kind
    assert parse(one, shape.kind)


def test_no_two_rows_claim_the_same():
    assert len(ROLES) == sum(len(names.split()) for names in NAMES.values())  # no name twice
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    roles = sorted({role for shape in SHAPES for role in f"{shape.needs} {shape.may}".split()})
    assert set(roles) <= NAMES.keys()
    for size in range(1, 7):
        for some in map(set, combinations(roles, size)):
            fits = [s for s in SHAPES if set(s.needs.split()) <= some <= set(f"{s.needs} {s.may}".split())]
            assert len(fits) <= 1, (some, fits)
            assert shape_of_roles(frozenset(some)) == (fits[0] if fits else None)


def test_pairs_as_kto_and_labels_as_sft():
    pair = {"prompt": USER, "chosen": BOT, "rejected": "왜?"}
    assert parse(raw(pair), "kto") == [Labelled(USER, BOT, True), Labelled(USER, "왜?", False)]
    ranking = raw(THREE | {"ranking": [2, [0, 1]]})
    assert [record.label for record in parse(ranking, "kto")] == [True, False, False]
    for label in (True, False):
        fields = {"prompt": USER, "completion": BOT, "label": label}
        assert parse(raw(fields, labels="true_only"), "sft") == [Dialogue((USER, BOT))] * label
        with pytest.raises(RecordError, match=r"field 'label': found \w+, expected .*`labels: true_only`"):
            parse(raw(fields), "sft")


@pytest.mark.parametrize("label", ["true", "True", 1, "1", 1.0, False, 0, "0", "false"])
def test_labels_in_all_their_spellings(label):
    (record,) = parse(raw({"prompt": USER, "completion": BOT, "label": label}), "kto")
    assert record.label is (str(label).lower() in ("true", "1", "1.0"))


@pytest.mark.parametrize(
    ("ranking", "tiers"),
    [
        ("2,0,1", ((2,), (0,), (1,))),
        ("2 > 0 > 1", ((2,), (0,), (1,))),
        ("[2, 0, 1]", ((2,), (0,), (1,))),
        (["3", "1", "2"], ((2,), (0,), (1,))),
        ([3, [1, 2]], ((2,), (0, 1))),
        ([2, 1], ((2,), (1,))),  # some of them, from 0
    ],
)
def test_rankings_in_all_their_notations(ranking, tiers):
    assert parse(raw(THREE | {"ranking": ranking}), "preference")[0].tiers == tiers


def test_a_file_counts_from_0_or_from_1(caplog):
    layout = Layout()
    caplog.set_level("INFO")
    given = [RawRecord(Source("a", i, None), THREE | {"ranking": r}, layout) for i, r in enumerate([[3, 1, 2], [2, 1]])]
    assert parse(given[0], "preference")[0].ranking == [2, 0, 1]
    assert "rankings count from 1" in caplog.text
    with pytest.raises(
        RecordError, match=r"field 'ranking': found \[2, 1\], expected numbers from 1, as in a, record 0"
    ):
        parse(given[1], "preference")


# --- Refused, with the line that helps ------------------------------------------------------------

REFUSED = {
    "a column that nothing reads": (
        {"prompt": USER, "completion": BOT, "comment": "좋다"},
        r"field 'comment': found '좋다', expected a field that is known: .* with `columns: \{comment: ROLE\}`",
    ),
    "a slip of the pen": (
        {"prompt": USER, "complettion": BOT},
        r"field 'complettion': found .* with `columns: \{complettion: completion\}` \(`--map complettion=completion`\)",
    ),
    "two prompts": (
        {"prompt": USER, "question": "뭐?", "answer": BOT},
        r"field 'question': .* 'prompt' and 'question' could both be it: .* out, `columns: \{question: ignore\}`",
    ),
    "a history that ends with a question": (
        {"instruction": USER, "output": BOT, "history": openai(USER)},
        "field 'history': found 1 turns, expected messages that end with an answer",
    ),
    "a text column of several": ({"document": "좋다", "label": 1}, "field 'document'"),
    "a label that is none": (
        {"prompt": USER, "completion": BOT, "label": 2},
        r"found 2, expected true or false; if it is something else, leave it out: `columns: \{label: ignore\}`",
    ),
    "text that is no dialogue": ({"text": "그냥 글"}, "expected a dialogue such as <usr> … <bot> …"),
    "a whole text that says more": (
        {"instruction": USER, "output": BOT, "text": "다른 말"},
        "expected what the other fields say",
    ),
    "a whole text without the input": (
        {"instruction": USER, "input": "글", "output": BOT, "text": f"### {USER}\n### {BOT}"},
        "expected what the other fields say",
    ),
    "messages that say something else": (
        {"prompt": USER, "chosen": BOT, "rejected": "왜?", "messages": openai(USER, "뭐?")},
        r"field 'messages': found .*, expected what the other fields say; leave it out",
    ),
    "more in a message": (
        {"messages": [{"role": "user", "content": USER, "thinking": "음"}, {"role": "assistant", "content": BOT}]},
        r"field 'messages\[\].thinking': found '음', expected a message of its speaker and its content alone",
    ),
    "more in an answer": (
        {"prompt": USER, "responses": [{"text": "가", "score": 1, "why": "좋다"}, {"text": "나", "score": 2}]},
        r"field 'responses\[\].why': found text",
    ),
    "a tool's turn": (
        {"messages": [{"role": "user", "content": USER}, {"role": "tool", "content": "3"}]},
        "field 'turn 1': found 'tool', expected assistant",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "a.png"}]}]},
        r"field 'turn 0': found \{'type': 'image_url'.*, expected parts of text",
    ),
    "an answer first": ({"conversations": sharegpt(BOT, USER, speakers=("gpt", "human"))}, "expected user"),
    "a ranking without a place": (
        {"prompt": USER, "chosen": BOT, "rejected": "왜?", "ranking": [0, 1]},
        r"field 'ranking': found \[0, 1\], expected no such field beside prompt \+ chosen \+ rejected; leave it out",
    ),
    "a gap": ({"prompt": USER, "completion_0": BOT, "completion_2": "왜?"}, "numbered without a gap"),
    "dialogues that differ": (
        {"chosen": openai(*TURNS), "rejected": openai("다른 말", *TURNS[1:])},
        "field 'rejected': .* expected a dialogue with the prompt that stands beside it",
    ),
    "answers without a question": ({"chosen": BOT, "rejected": "왜?"}, "expected a dialogue such as"),
    "a score too few": ({"prompt": USER, "completions": ["가", "나"], "scores": [1]}, "the score of each of the 2"),
    "a ranking of one number": (
        THREE | {"ranking": "201"},
        "field 'ranking': found '201', expected indices from 0 to 2",
    ),
    "a ranking from 0 of answers from 1": (
        {"prompt": USER, "completion_0": None, "completion_1": "나", "completion_2": "다", "ranking": [1, 0]},
        "expected all numbers from 1 to 2, as 'completion_1' is the first answer",
    ),
    "some of a ranking of answers from 1": (
        {"prompt": USER, **{f"completion_{i}": f"가{i}" for i in (1, 2, 3)}, "ranking": [1, 2]},
        "expected all numbers from 1 to 3",
    ),
    "answers beside a number": (
        {"prompt": USER, "response_a": "가", "response_b": "나", "best": 1},
        r"field 'best': found 1, expected no number that may say which .*`columns: \{best: scores\}`",
    ),
    "answers with a number each": (
        {"prompt": USER, "answers": [{"content": "가", "votes": 3}, {"content": "나", "votes": 5}]},
        r"field 'answers\[\].votes': found 5, expected no number",
    ),
    "a label that is null": (
        {"prompt": USER, "completion": BOT, "label": None},
        "field 'label': found None, expected what",
    ),
    "a ranking that is null": (THREE | {"ranking": None}, "field 'ranking': found None, expected what it says"),
    "a verdict that names one to say no": (
        {"prompt": USER, "response_a": "가", "response_b": "나", "winner": "not_a"},
        "found 'not_a', expected one of response_a, response_b, or tie",
    ),
    "a number that names one of a list": (
        {"prompt": USER, "completions": ["가", "나"], "winner": 1},
        "found 1, expected one of a, b, or tie",
    ),
    "some of a ranking of a list": (
        {"prompt": USER, "completions": ["가", "나", "다"], "ranking": [1, 2]},
        r"found \[1, 2\], expected numbers that tell whether they count from 0 or from 1: those of all 3 answers",
    ),
    "tags beside another prompt": (
        {"prompt": "뭐?", "chosen": f"<usr> {USER} <bot> {BOT}", "rejected": f"<usr> {USER} <bot> 왜?"},
        "field 'chosen': .* expected a dialogue with the prompt that stands beside it",
    ),
    "a prompt that ends in an answer": (
        {"prompt": f"<usr> {USER} <bot> {BOT}", "chosen": "가", "rejected": "나"},
        "2 turns",
    ),
    "a verdict on none": ({"prompt": USER, "response_a": "가", "response_b": "나", "winner": "c"}, "or tie"),
    "a draw": (
        {"prompt": USER, "response_a": "가", "response_b": "나", "winner": "tie (bothbad)"},
        "better than another",
    ),
    "no prompt": (
        {"completion": BOT},
        r"field 'prompt': found None, expected prompt \+ completion, such as prompt, ins",
    ),
    "nothing that is known": ({"tokens": 3}, r"expected fields that make a record.*`columns: \{NAME: prompt\}`"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_records_that_are_refused(fields, message):
    one = raw(fields)
    with pytest.raises(RecordError, match=message) as caught:
        parse(one, kind_of(one) or "sft")
    assert str(caught.value).startswith("a.jsonl, line 1 (record 0): field ")
    assert len(str(caught.value)) < 500


def test_a_column_that_is_said_to_be_nothing_known():
    with pytest.raises(UserError, match=r"columns: 'a': found 'promt', expected what it is: prompt, context, history"):
        ReadingOptions(columns={"a": "promt"})
    with pytest.raises(UserError, match=r"encoding: found 'cp9949', expected one such as utf-8, cp949"):
        ReadingOptions(encoding="cp9949")


# --- No text is left out without a word -----------------------------------------------------------

KNOWN = st.sampled_from(["prompt", "completion", "output", "chosen", "rejected", "input", "id", "text", "label", "url"])
VALUES = st.recursive(
    st.from_regex(r"글[가-하]{2}", fullmatch=True) | st.integers() | st.none() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KNOWN | st.text("abc가", min_size=1), inner, max_size=3)
    ),
    max_leaves=5,
)
RECORDS = st.dictionaries(KNOWN | st.text("abc가_", min_size=1, max_size=6), VALUES, min_size=1, max_size=5)


@FIXED
@given(fields=RECORDS | st.builds(dict.__or__, st.sampled_from([dict(s.example) for s in SHAPES]), RECORDS))
def test_each_text_is_read_or_named_or_its_record_refused(fields):
    one = raw(fields, labels="true_only")
    kind = kind_of(one) or "sft"
    try:
        records = parse(one, kind)
    except RecordError:
        return
    assert unaccounted(one, records) == []


ODD = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@FIXED
@given(name=ODD | st.sampled_from(["no", "1", "a b", "a[].b", "a: b", "~", "#a", "가?"]), inside=st.booleans())
def test_the_line_that_helps_says_the_very_name(name, inside):
    """As YAML reads it; and the message can be printed."""
    fields = {"messages": [{"role": "user", "content": USER} | {name: "글"}, {"role": "assistant", "content": BOT}]}
    with suppress(RecordError):
        parse(raw(fields if inside else {"prompt": USER, "output": BOT, name: "글"}), "sft")
        return
    with pytest.raises(RecordError) as caught:
        parse(raw(fields if inside else {"prompt": USER, "output": BOT, name: "글"}), "sft")
    assert str(caught.value).isprintable()
    if line := re.search(r"`columns: (\{.*?\})`", str(caught.value)):
        assert list(yaml.safe_load(line[1])) == [f"messages[].{name}" if inside else name]


def test_a_whole_text_as_alpaca_has_it():
    fields = {
        "instruction": USER,
        "input": "글",
        "output": BOT,
        "text": f"### 지시:\n{USER}\n### 입력:\n글\n### 답:\n{BOT}",
    }
    assert parse(raw(fields), "sft") == [Dialogue((f"{USER}\n\n글", BOT))]


def test_what_nothing_reads_is_named():
    one = raw({"prompt": USER, "completion": BOT, "url": "https://a.kr", "tokens": 3, "길이": 12, "비고": ""})
    parse(one, "sft")
    assert list(one.layout.passed_over) == ["url", "tokens", "길이", "비고"]


def test_a_rank_beside_a_score_is_left_out_when_it_is_said():
    answers = [{"text": "가", "score": 1, "rank": 1}, {"text": "나", "score": 5, "rank": 2}]
    fields = {"prompt": USER, "responses": answers}
    with pytest.raises(RecordError, match=r"`columns: \{\"responses\[\].rank\": ignore\}`"):
        parse(raw(fields), "preference")
    (ranking,) = parse(raw(fields, columns={"responses[].rank": "ignore"}), "preference")
    assert ranking.tiers == ((1,), (0,))


def test_a_score_that_one_answer_lacks():
    answers = [{"text": "가"}, {"text": "나", "score": 5}, {"text": "다", "score": 1}]
    (ranking,) = parse(raw({"prompt": USER, "responses": answers}), "preference")
    assert ranking.tiers == ((1,), (2,))


def test_a_score_of_more_digits_than_a_float_holds():
    (ranking,) = parse(
        raw({"prompt": USER, "completions": ["가", "나", "다"], "scores": [1, 10**400, 2.5]}), "preference"
    )
    assert ranking.tiers == ((1,), (2,), (0,))


def test_a_ranking_remembers_what_the_file_said():
    (ranking,) = parse(raw(THREE | {"ranking": "3,1,2"}), "preference")
    assert ranking == Ranking("뭐?", ("가", "나", "다"), ((2,), (0,), (1,)), ranking=[2, 0, 1])
