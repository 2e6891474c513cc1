"""Whatever is cleaned: cleaning again changes nothing, nothing is lost, and what changed is in the report."""

import json

from kochat_trl.data.rankings import ranking_tiers
from kochat_trl.data.readers import DIALOGUE_START, read_records
from kochat_trl.data.records import RecordError, parse
from kochat_trl.desk.curation.faults import texts
from kochat_trl.errors import UserError
from tests.desk.curation.helpers import ALL, DEFAULT, ERRORS, TEXTS, Cleaned, dialogue, messages

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

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
