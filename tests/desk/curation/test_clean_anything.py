"""Whatever is cleaned: cleaning again changes nothing, nothing is lost, and what changed is in the report."""

import json
import re

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.parse import parse
from kochat_trl.data.readers import DIALOGUE_START, read_records
from kochat_trl.data.records import Source
from kochat_trl.data.shapes import SHAPES
from kochat_trl.desk.curation.texts import texts, with_texts
from kochat_trl.errors import UserError
from tests.desk.curation.helpers import ALL, DEFAULT, ERRORS, TEXTS, Cleaned, dialogue, messages

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

FEW = st.sampled_from(["가", "나", "'가", "가\u200b", "나 ", "①", "a"])  # that meet one another often
TAGS = ["<usr>", "<bot> ", "<b</s>ot>", "\n<sys>", "Human:", "\nHuman: ", "\u200bAssistant:", "\\nAssistant: "]
WORDS = FEW | TEXTS | st.lists(st.sampled_from([*TAGS, "가", "'"]), max_size=5).map("".join)
ODD = st.none() | st.integers(0, 3) | st.just("\ud800") | st.just([])
EXTRA = st.fixed_dictionaries({}, optional={"tokens": st.integers(), "id": WORDS, "input": WORDS, "system": WORDS})


def fields(names: dict[str, st.SearchStrategy]) -> st.SearchStrategy[dict]:
    """Records with these fields in any order, and now and then with one too few or of the wrong type."""
    whole = st.builds(lambda own, extra: own | extra, st.fixed_dictionaries(names), EXTRA)
    odd = st.fixed_dictionaries({}, optional={name: values | ODD for name, values in names.items()})
    return st.one_of(whole, whole, whole, odd).flatmap(lambda r: st.permutations(list(r.items())).map(dict))


def of_shapes(kind: str) -> st.SearchStrategy[dict]:
    """The examples of all shapes that are for `kind`, with any words in the place of some of their texts."""
    examples = [shape.example for shape in SHAPES if shape.kind == kind]

    @st.composite
    def spoiled(draw: st.DrawFn) -> dict:
        example = draw(st.sampled_from(examples))
        places = [*texts(RawRecord(Source("", 0, 1), example))]
        return with_texts(example, draw(st.dictionaries(st.sampled_from(places), WORDS, min_size=1)))

    return spoiled()


def so_many(values: st.SearchStrategy, count: int) -> st.SearchStrategy[list]:
    return st.lists(values, min_size=count, max_size=count)


MESSAGES = st.lists(WORDS, min_size=1, max_size=4).map(lambda turns: messages(*turns)["messages"])
SFT_RECORDS = (
    fields({"prompt": WORDS, "completion": WORDS})
    | fields({"instruction": WORDS, "input": WORDS | st.none(), "output": WORDS})
    | fields({"Q": WORDS, "A": WORDS})
    | fields({"messages": MESSAGES})
    | fields({"prompt": WORDS, "outputs": st.lists(WORDS, max_size=3)})
    | of_shapes("sft")
)
RANKINGS = st.lists(st.integers(0, 3) | st.none() | st.lists(st.integers(0, 3), max_size=2), max_size=4)
RANKINGS |= st.permutations([0, 1, 2]) | st.permutations([0, 1])
RANKINGS |= st.permutations(["2", "1", "0"]) | st.permutations("210").map(" > ".join) | st.just("1,0")
COMPLETIONS = {f"completion_{i}": WORDS for i in range(4)}
SCORES = st.none() | st.integers(0, 2)
PREFERENCE_RECORDS = (
    fields({"prompt": WORDS, "chosen": WORDS, "rejected": WORDS})
    | st.integers(2, 4).flatmap(
        lambda count: fields({"prompt": WORDS, **dict(list(COMPLETIONS.items())[:count]), "ranking": RANKINGS})
    )
    | st.integers(2, 4).flatmap(
        lambda count: fields({"prompt": WORDS, "responses": so_many(WORDS, count), "scores": so_many(SCORES, count)})
    )
    | fields(
        {
            "prompt": WORDS,
            "answers": st.lists(st.fixed_dictionaries({"text": WORDS, "rank": SCORES}), min_size=2, max_size=4),
        }
    )
    | of_shapes("preference")
)
PROMPT_RECORDS = fields({"prompt": WORDS}) | fields({"instruction": WORDS, "input": WORDS}) | fields({"Q": WORDS})
KTO_RECORDS = fields({"prompt": WORDS, "completion": WORDS, "label": st.booleans()}) | of_shapes("kto")
RECORDS = {"sft": SFT_RECORDS, "preference": PREFERENCE_RECORDS, "kto": KTO_RECORDS}
RECORDS["prompt"] = PROMPT_RECORDS | SFT_RECORDS | of_shapes("prompt") | of_shapes("preference")


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str]:
    """The kind and the text of a file; of three in four records, another is a copy."""
    kind = draw(st.sampled_from(sorted(RECORDS)))
    if kind in ("sft", "prompt") and draw(st.integers(0, 3)) == 0:
        talks = draw(st.lists(st.lists(WORDS.map(str.strip), min_size=2, max_size=4), min_size=1, max_size=4))
        return kind, "".join(dialogue(*turns) for turns in talks)
    shape = RECORDS[kind]
    if kind in ("sft", "prompt") and draw(st.integers(0, 5)) == 0:
        shape = MESSAGES.map(lambda content: {"messages": content})
    records = draw(st.lists(shape, max_size=4))
    records += draw(st.lists(st.sampled_from(records), max_size=2)) if records else []
    if draw(st.booleans()):
        return kind, "\n".join(map(json.dumps, records)) + "\nnull\n{broken"
    return kind, json.dumps(records)


def is_meant(error: UserError, chosen: list[str]) -> bool:
    """A file that mixes kinds, whose dialogues can't be read, or with records that no chosen fix drops."""
    told = re.search(r"choose the fixes that drop them, too: (.*)$", str(error))
    others = ("--kind", f"expected '{DIALOGUE_START}' alone")
    return set(told[1].split(", ")).isdisjoint(chosen) if told else any(words in str(error) for words in others)


@pytest.mark.parametrize(
    "names", [DEFAULT, ALL, ERRORS, ["unclear", *ERRORS, "near_duplicate", "contradiction", "swallowed"]]
)
@pytest.mark.parametrize("order", ["best_first", "rank_of"])
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(file=files(), tell_kind=st.booleans())
def test_whatever_is_cleaned(tmp_path_factory, names, order, file, tell_kind):
    """Cleaning again changes nothing, no record is lost or invented, and what isn't reported is as it was."""
    kind, text = file
    folder = tmp_path_factory.mktemp("any")
    (folder / "dirty").write_text(text, encoding="utf-8")
    (folder / "held").write_text('[{"prompt": "나"}]', encoding="utf-8")
    reading = ReadingOptions(ranking_order=order)
    options = {"fixes": names, "against": [folder / "held"] if "overlap" in names else [], "options": reading}
    try:
        cleaned = Cleaned(folder, folder / "dirty", kind=kind if tell_kind else None, **options)
    except UserError as error:
        if not is_meant(error, names) or (folder / "clean.json").exists():
            raise
        reject()

    if cleaned.bytes:  # lines of which none is left are an empty file
        again = cleaned.again(kind=kind if tell_kind else None, **options)
        assert again.bytes == cleaned.bytes
        assert again.report == []

    raws, summary = list(read_records(folder / "dirty")), cleaned.summary
    dropped = {line["index"] for line in cleaned.report if line["action"] == "dropped"}
    changes = {line["index"]: line for line in cleaned.report if line["action"] == "changed"}
    assert (summary.read, summary.dropped, summary.changed) == (len(raws), len(dropped), len(changes))
    left = [raw for raw in raws if raw.source.index not in dropped]
    written = list(read_records(cleaned.output, reading)) if cleaned.bytes else []
    assert len(left) == len(written) == summary.written
    for old, new in zip(left, written, strict=True):
        if tell_kind:
            parse(new, kind)  # recipes take all that is left
        change = changes.get(old.source.index)
        if change is None:
            assert new.fields == old.fields
            continue
        assert change["before"] != change["after"]
        assert [*new.fields] == [name for name in old.fields if name in new.fields]
        kept = {name: value for name, value in leaves(old.fields).items() if name not in change["before"]}
        assert kept | change["after"] == leaves(new.fields)


def leaves(value, name=""):
    """What is in a record under the names of a report, `messages[1].content`; a list of numbers is one."""
    if isinstance(value, dict) and value:
        inner = {key if not name else f"{name}.{key}": item for key, item in value.items()}
    elif isinstance(value, list) and any(isinstance(item, dict | list | str) for item in value):
        inner = {f"{name}[{i}]": item for i, item in enumerate(value)}
    else:
        return {name: value}
    return {path: leaf for key, item in inner.items() for path, leaf in leaves(item, key).items()}
