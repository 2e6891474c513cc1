"""A short run of tests/data/fuzz.py, and proof that it sees what it looks for."""

import dataclasses
import time

from kochat_trl.data.readers import read_records
from kochat_trl.errors import UserError
from tests.data import fuzz

import pytest


def test_broken_files_end_in_records_or_in_an_error_that_says_where(tmp_path):
    ends, failure = fuzz.fuzz(3000, seed=1, folder=tmp_path, steps=list(fuzz.STEPS))
    assert failure is None, f"input {failure.number} of seed 1 failed in '{failure.step}': {failure.error!r}"
    assert min(ends["read to the end"], ends["broken for good"], ends["unreadable records"]) > 300


def test_an_input_does_not_hang_on_the_ones_before_it(tmp_path):
    assert fuzz.input_of(7, 100) == fuzz.input_of(7, 100)
    assert len({fuzz.input_of(seed, number).data for seed in range(2) for number in range(50)}) > 90


def loses_the_last_record(path):
    yield from list(read_records(path))[:-1]


def ends_without_an_error(path):
    try:
        yield from read_records(path)
    except UserError:
        return


def fails_by_another_error(path):
    for raw in read_records(path):
        yield raw
        raise KeyError("prompt")


def hangs(path):
    yield from read_records(path)
    while True:
        time.sleep(0.01)


def counts_from_one(path):
    for raw in read_records(path):
        yield dataclasses.replace(raw, source=dataclasses.replace(raw.source, index=raw.source.index + 1))


def changes_a_text(path):
    for raw in read_records(path):
        changed = isinstance(raw.fields, dict) and "prompt" in raw.fields
        yield dataclasses.replace(raw, fields=raw.fields | {"prompt": "가"}) if changed else raw


def does_not_say_where(path):
    try:
        yield from read_records(path)
    except UserError:
        raise UserError(f"{path}: is broken") from None


def names_a_line_that_is_not_there(path):
    try:
        yield from read_records(path)
    except UserError:
        raise UserError(f"{path}, line 9999: is broken") from None


@pytest.mark.parametrize(
    "reader",
    [
        loses_the_last_record,
        ends_without_an_error,
        fails_by_another_error,
        hangs,
        counts_from_one,
        changes_a_text,
        does_not_say_where,
        names_a_line_that_is_not_there,
    ],
)
def test_a_reader_with_a_fault_is_caught(tmp_path, monkeypatch, reader):
    monkeypatch.setattr(fuzz, "read_records", reader)
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    _, failure = fuzz.fuzz(100, seed=0, folder=tmp_path, steps=["read"])
    assert failure
    assert isinstance(failure.error, KeyError | fuzz.Wrong | fuzz.Hang)
    assert isinstance(failure.error, fuzz.Hang) == (reader is hangs)
