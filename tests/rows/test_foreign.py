"""Records of the shapes that people have, through `check`, a recipe's dataset and pairs; datasets by their names."""

import json
import re

from benchmarks.architectures import CHATML, byte_tokenizer
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.records import Dialogue, Labelled, Ranking
from kochat_trl.desk.curation.audit import check_files
from kochat_trl.desk.curation.convert import text_rows
from kochat_trl.errors import UserError
from kochat_trl.models.template import render
from kochat_trl.rows.encode import IGNORED
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import DataArguments
from tests.data.datasets import DATASETS
from tests.data.foreign import BOT, FOREIGN, USER
from tests.tiny import ROOT

import pytest
import yaml

STAGES = {"sft": "sft", "preference": "reward", "prompt": "ppo", "kto": "sft"}


def documented() -> dict[str, ReadingOptions]:
    """The rows of the table in docs/data.md: name → what its last cell says."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([^`]+)`[^|]*\|.*\| *(?:`([^`|]+)`)? *\|$", text.partition("## Datasets by name")[2], flags=re.M
    )
    return {name: ReadingOptions(**yaml.safe_load(line or "{}")) for name, line in rows if "/" in name}


CASES = {name: (f.records, f.kind, f.expected, f.options) for name, f in FOREIGN.items()}
CASES |= {name: (*DATASETS[name], options) for name, options in documented().items()}


def test_each_dataset_of_the_documents_has_records_here():
    assert documented().keys() == DATASETS.keys()
    assert len(DATASETS) >= 20
    assert all(len(records) == 2 for records, _, _ in DATASETS.values())


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, write):
    records, kind, expected, options = request.param
    return (
        write("data.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)),
        kind,
        expected,
        options,
    )


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """It has a token for each byte, so that every text is told, and a template that takes a system message."""
    return byte_tokenizer(CHATML, "<eos>", "<|im_start|>", "<|im_end|>", eos_token="<eos>")


def test_check_finds_no_error_in_them(case):
    file, kind, _, options = case
    report = check_files([file], options=options)
    assert report.errors == 0
    (found,) = report.files
    assert (found.kind, found.usable) == (kind, found.records)
    assert sum(found.shapes.values()) == found.records
    assert not set(found.not_read) & {"prompt", "completion", "chosen", "rejected", "messages"}


def test_a_recipe_takes_them(case, bytes_tokenizer):
    """Each record is the tokens of its messages in the template, and what is learned are its answers."""
    file, kind, expected, options = case
    args = DataArguments(**vars(options) | {"labels": "true_only"})
    if kind == "kto":
        expected = [Dialogue((*r.history, r.prompt, r.completion), r.system) for r in expected if r.label]
    if not expected:
        with pytest.raises(UserError, match="no sft record"):
            build_dataset([file], "sft", bytes_tokenizer, None, args)
        return
    dataset, report = build_dataset([file], STAGES[kind], bytes_tokenizer, None, args)
    assert str(report) == ""
    assert len(dataset) == len(expected)
    for row, record in zip(dataset, expected, strict=True):
        if isinstance(record, Ranking):
            order = [i for tier in record.tiers for i in tier]
            shown = [render(bytes_tokenizer, record.messages(i)).removesuffix("\n") for i in order]
            assert [text_of(bytes_tokenizer, ids) for ids in row["completion_ids"]] == shown
            assert row["ranks"] == [rank for rank, tier in enumerate(record.tiers) for _ in tier]
            continue
        prompt = not isinstance(record, Dialogue)
        shown = render(bytes_tokenizer, record.messages, prompt=prompt)
        assert text_of(bytes_tokenizer, row["input_ids"]) == (shown if prompt else shown.removesuffix("\n"))
        if not prompt:
            learned = [token for token in row["labels"] if token != IGNORED]
            answers = text_of(bytes_tokenizer, learned).split("<|im_end|>")
            assert [answer for answer in answers if answer] == list(record.texts[1::2])


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] in ("preference", "kto")])
def test_the_pairs_of_them(name):
    for record in CASES[name][2]:
        rows = list(text_rows(record, 0, DataArguments()))
        if isinstance(record, Labelled):
            assert [row["label"] for row in rows] == [record.label]
            continue
        assert len(rows) == len(record.pairs()) > 0
        for row, (better, worse, _) in zip(rows, record.pairs(), strict=True):
            plain = not (record.history or record.system)
            good, bad = (record.completions[i] if plain else record.messages(i)[-1:] for i in (better, worse))
            assert (row["chosen"], row["rejected"]) == (good, bad) if plain else ([*good], [*bad])


def test_labelled_answers_to_one_prompt_are_pairs(write, bytes_tokenizer):
    """True above false; a prompt with one label alone, or an answer with both, is left out and named."""
    answers = [
        (USER, BOT, True),
        ("뭐?", "가", True),
        (USER, "왜?", False),
        ("또?", "가", False),
        (USER, "어서 와요.", True),
        (USER, "음", True),
        (USER, "음", False),
    ]
    file = write(
        "kto.jsonl", "".join(json.dumps({"prompt": p, "completion": c, "label": b}) + "\n" for p, c, b in answers)
    )
    dataset, report = build_dataset([file], "reward", bytes_tokenizer)
    (row,) = dataset
    texts = [text_of(bytes_tokenizer, ids) for ids in row["completion_ids"]]
    assert [next(a for a in (BOT, "어서 와요.", "왜?") if a in text) for text in texts] == [BOT, "어서 와요.", "왜?"]
    assert row["ranks"] == [0, 0, 1]
    assert [(error.source.index, error.fault) for error in report.left_out] == [
        *((i, "unpaired") for i in (5, 6)),
        *((i, "unpaired") for i in (1, 3)),
    ]
    assert "expected an answer labelled false to the same prompt" in str(report)
    alone = write("false.jsonl", json.dumps({"prompt": "가", "completion": "나", "label": False}))
    with pytest.raises(UserError, match=r"no preference record in (.|\n)*expected an answer labelled true"):
        build_dataset([alone], "reward", bytes_tokenizer)


def test_a_column_that_no_file_has(write, tiny_tokenizer):
    file = write("a.csv", "question,답변\n가,나\n")
    args = DataArguments(columns={"qestion": "prompt"})
    message = r"columns: there is no column 'qestion'\. Did you mean 'question'\? There are: question, 답변"
    with pytest.raises(UserError, match=message):
        build_dataset([file], "sft", tiny_tokenizer, None, args)


def test_what_is_not_read_is_logged_once(write, tiny_tokenizer, caplog):
    caplog.set_level("INFO")
    file = write("a.jsonl", '{"prompt": "가", "completion": "나", "url": "u", "길이": 1}\n' * 3)
    build_dataset([file], "sft", tiny_tokenizer)
    assert [r.message for r in caplog.records if "not read" in r.message] == [f"{file}: not read: url, 길이"]


def test_a_template_that_rows_cannot_end_in_is_told_as_such(write):
    file = write("a.jsonl", '{"prompt": "가", "completion": "나"}')
    with pytest.raises(UserError, match=r"^the chat template closes an answer with '<\|im_end\|>"):
        build_dataset([file], "sft", byte_tokenizer(CHATML))
