"""Parquet, Arrow and .xlsx files: read as they were written, as others write them, and broken ones."""

import logging
import re
import zipfile

from kochat_trl.data.readers import FileFormat, file_format, read_records
from kochat_trl.data.records import Unreadable
from kochat_trl.desk.writers import write_records
from kochat_trl.errors import UserError
from tests.data.files import FIXED, HALVES, TEXTS, fields_read, until_error, written_bytes

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("binary") / "data"


# --- Parquet and Arrow --------------------------------------------------------------------------

MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXTS}, optional={"content": TEXTS}), max_size=3)
ROWS = st.fixed_dictionaries(
    {"질문": TEXTS},
    optional={
        "n": st.integers(-(2**63), 2**63 - 1),
        "messages": MESSAGES,
        "ranking": st.lists(st.integers(0, 9)),
        "ok": st.booleans(),
    },
)


@pytest.mark.parametrize("shape", ["parquet", "arrow"])
@FIXED
@given(records=st.lists(ROWS, min_size=1, max_size=5))
@example(records=[{"질문": str(i)} if i % 3 else {"n": i} for i in range(25_000)])
def test_columns_are_read_as_they_were_written(path, shape, records):
    """A field that a row lacks is null, in the file and when it is read."""
    written_bytes(path, shape, records)
    names = dict.fromkeys(name for fields in records for name in fields)
    assert fields_read(path) == [{name: fields.get(name) for name in names} for fields in records]
    assert file_format(path) == FileFormat(shape)
    assert {raw.source.line for raw in read_records(path)} == {None}


def test_files_as_pandas_and_datasets_write_them(path):
    frame = pd.DataFrame({"질문": ["가", None, "다"], "답": ["하나", "둘", "셋"]}, index=["x", "y", "z"])
    frame.to_parquet(path)
    expected = [{"질문": "가", "답": "하나"}, {"질문": None, "답": "둘"}, {"질문": "다", "답": "셋"}]
    assert fields_read(path) == expected
    table = pa.Table.from_pandas(frame, preserve_index=False)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert path.read_bytes().startswith(b"\xff\xff\xff\xff")
    assert fields_read(path) == expected
    assert file_format(path) == FileFormat("arrow")


def test_nulls_in_structs_are_left_out_and_those_in_lists_are_not(path):
    value = {"a": [{"b": None, "c": "가"}, None], "d": {"e": None}, "f": [1, None]}
    pq.write_table(pa.table({"x": [value, None]}), path)
    assert fields_read(path) == [{"x": {"a": [{"c": "가"}, None], "d": {}, "f": [1, None]}}, {"x": None}]


CANNOT_HOLD = {
    "texts and numbers": [{"a": 1}, {"a": "가"}],
    "a number that is too large": [{"a": 2**64}],
    "half a character": [{"a": HALVES[0]}],
    "no fields": [{}],
    "an object without fields": [{"a": {}}, {"a": {}}],
    "a null in a list of objects that have it": [{"a": [{"b": 1}, {"b": [1]}]}],
    "numbers that aren't kept": [{"a": 2**60 + 1}, {"a": 0.5}],
}


@pytest.mark.parametrize("records", CANNOT_HOLD.values(), ids=CANNOT_HOLD)
def test_what_a_parquet_file_cannot_hold_is_refused_and_no_file_is_left(tmp_path, records):
    with pytest.raises(UserError, match="Parquet file"):
        write_records(tmp_path / "a.parquet", "parquet", records)
    assert not list(tmp_path.iterdir())


def test_two_columns_of_a_name(path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    assert until_error(path) == ([], f"{path}: two columns have the name 'a'")


@pytest.mark.parametrize("shape", ["parquet", "arrow", "xlsx"])
def test_a_binary_file_that_is_cut_is_refused_by_its_name(path, shape):
    data = written_bytes(path, shape, [{"질문": f"가{i}"} for i in range(100)])
    for end in range(8, len(data) - 8, 97):
        path.write_bytes(data[:end])
        fields, message = until_error(path)
        assert not fields
        assert message.startswith(f"{path}: is no whole ")
        assert "\n" not in message


def test_memory_does_not_grow_with_the_rows_of_a_parquet_file(path):
    """What Arrow takes isn't seen by `tracemalloc`; it counts itself. Texts differ, so that no dictionary helps."""
    pool, peaks = pa.default_memory_pool(), []
    for count in (20_000, 200_000):
        texts = [f"질문 {i:60}" for i in range(count)]
        pq.write_table(pa.table({"질문": texts, "답": texts[::-1]}), path, use_dictionary=False, compression="none")
        before, highest = pool.bytes_allocated(), 0
        for raw in read_records(path):
            if raw.source.index % 1000 == 0:
                highest = max(highest, pool.bytes_allocated() - before)
        peaks.append(highest)
    assert path.stat().st_size > 25_000_000
    assert peaks[1] < peaks[0] + 1_000_000


# --- Sheets -------------------------------------------------------------------------------------

CELLS = TEXTS | st.sampled_from(["=1+1", "_x0041_", "_x000D_", "0012", "3.0", "#N/A", "2024-01-01", "\uffff"])


@FIXED
@given(
    names=st.lists(st.sampled_from(["질문", "답 변", "a", "url"]), min_size=1, unique=True),
    rows=st.lists(st.lists(CELLS, min_size=4, max_size=4), min_size=1, max_size=4),
)
def test_a_sheet_is_read_as_it_was_written(path, names, rows):
    records = [dict(zip(names, row, strict=False)) for row in rows]
    if not all("".join(record.values()).strip() for record in records):
        with pytest.raises(UserError, match="has no text"):
            written_bytes(path, "xlsx", records)
        return
    written_bytes(path, "xlsx", records)
    assert fields_read(path) == records
    assert file_format(path) == FileFormat("xlsx")
    assert [raw.source.line for raw in read_records(path)] == list(range(2, len(records) + 2))


def test_a_sheet_as_excel_has_it(path, caplog):
    """With blank rows, empty cells, numbers, a row that is too long, and another sheet; pandas is the oracle."""
    book = openpyxl.Workbook()
    book.create_sheet("둘째").append(["질문"])
    sheet = book.active
    rows = [
        [],
        ["질문", "답", "n", "x"],
        ["가", None, 3, 0.5],
        [],
        [None, "나", 4.0, True],
        ["다", "라", -1, 1e300, "더"],
    ]
    for i, row in enumerate(rows, start=1):
        for j, cell in enumerate(row, start=1):
            sheet.cell(i, j, cell)
    sheet.cell(40, 2, " ")
    book.save(path)
    with caplog.at_level(logging.INFO):
        first, second, third = read_records(path)
    assert [raw.source.line for raw in (first, second, third)] == [3, 5, 6]
    frame = pd.read_excel(path, dtype=str, keep_default_na=False, header=None)
    assert [*first.fields.values(), ""] == list(frame.iloc[2])
    assert [*second.fields.values(), ""] == list(frame.iloc[4])
    assert list(first.fields) == ["질문", "답", "n", "x"]
    assert third.fields == Unreadable("5 cells", "4 cells: 질문,답,n,x")
    assert "'둘째'" in "".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "fields",
    [{"a": 1}, {"a": "가" * 32_768}, {"a": " "}, {"b": "가"}, {"a": HALVES[0]}],
    ids=["1", "long", "blank", "b", "half"],
)
def test_what_a_sheet_cannot_hold_is_refused_and_no_file_is_left(tmp_path, fields):
    with pytest.raises(UserError, match=r"record 1\b|half a character"):
        write_records(tmp_path / "a.xlsx", "xlsx", [{"a": "가" * 32_767}, fields])
    assert not list(tmp_path.iterdir())


def test_other_zip_files_and_old_excel_files_are_refused_with_what_to_do(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", '{"a": 1}')
    assert (
        until_error(path)[1] == f"{path}: is a zip file, which isn't read. Unpack it, and name the files in it: a.jsonl"
    )
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99))
    assert until_error(path)[1].endswith("Save it as .xlsx or .csv")
    book = openpyxl.Workbook()
    book.save(path)
    assert until_error(path)[1] == f"{path}: its first sheet is empty"


# --- Folders that `datasets` reads --------------------------------------------------------------

README = """---
configs:
- config_name: main
  data_files:
  - {{split: train, path: main.{0}}}
- config_name: 둘째
  data_files:
  - {{split: train, path: more/a.{0}}}
  - {{split: test, path: more/b.{0}}}
---
# 데이터
"""


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_folder_of_the_layout_of_the_hub(tmp_path, suffix):
    folder, shape = tmp_path / "folder", "parquet" if suffix == "parquet" else "lines"
    write_records(folder / f"main.{suffix}", shape, [{"prompt": "가"}, {"n": 1}])
    write_records(folder / "more" / f"a.{suffix}", shape, [{"m": [{"role": "user"}, {"content": "나"}]}] * 2)
    write_records(folder / "more" / f"b.{suffix}", shape, [{"m": [{"role": "다", "content": "라"}]}] * 2)
    assert fields_read(folder / "more") == [
        *[{"m": [{"role": "user"}, {"content": "나"}]}] * 2,
        *[{"m": [{"role": "다", "content": "라"}]}] * 2,
    ]
    (folder / "README.md").write_text(README.format(suffix), encoding="utf-8")
    named = {
        f"{folder}/main": [{"prompt": "가", "n": None}, {"prompt": None, "n": 1}],
        f"{folder}/main:train": [{"prompt": "가", "n": None}, {"prompt": None, "n": 1}],
        f"{folder}/둘째": [{"m": [{"role": "user"}, {"content": "나"}]}] * 2,
        f"{folder}/둘째:test": [{"m": [{"role": "다", "content": "라"}]}] * 2,
    }
    for name, fields in named.items():
        assert file_format(name) == FileFormat("dataset")
        assert fields_read(name) == fields
    refused = {
        f"{folder}": r"the available configs: \['main', '둘째'\], as .*/SUBSET",
        f"{folder}/셋째:test": r"'셋째' not found. Available: \['main', '둘째'\]",
        f"{folder}/main:nope": r"nope. Available splits: \['train'\]",
        f"{folder}/main.csv": "can't be read: No such file",
    }
    for name, message in refused.items():
        assert re.search(message, until_error(name)[1])


def test_a_sheet_that_names_too_small_a_size_is_read_as_a_whole(path):
    written_bytes(path, "xlsx", [{"질문": "가", "답": "나"}] * 3)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"]
    parts["xl/worksheets/sheet1.xml"] = sheet.replace(b"<sheetData>", b'<dimension ref="A1:A2"/><sheetData>')
    assert parts["xl/worksheets/sheet1.xml"] != sheet
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert fields_read(path) == [{"질문": "가", "답": "나"}] * 3
