"""Objects one after the other, an object that holds the records, tables in any language, encodings, zstd."""

import json
import logging
import re
from unittest import mock

from kochat_trl.data.formats import json_text
from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.readers import FileFormat, file_format, read_records
from kochat_trl.data.records import Unreadable
from kochat_trl.errors import UserError
from tests.data.files import (
    BLANKS,
    FIXED,
    LAYOUTS,
    LF_LAYOUTS,
    PLAIN,
    TEXTS,
    fields_read,
    line_after,
    lines_read,
    until_error,
    written,
)

import pyarrow as pa
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("formats") / "data"


@pytest.fixture(params=[1, 256])
def window(request):
    with mock.patch.object(json_text, "_LINES_AT_ONCE", request.param):
        yield


RECORDS = st.lists(st.fixed_dictionaries({"prompt": TEXTS, "n": st.none() | st.lists(st.integers())}), min_size=1)

# --- Objects one after the other ----------------------------------------------------------------


@pytest.mark.usefixtures("window")
@FIXED
@given(records=RECORDS, layout=LAYOUTS)
def test_objects_are_read_as_they_were_written(path, records, layout):
    layout.write(path, written(path, "objects", records))
    assert fields_read(path) == records
    assert file_format(path) == FileFormat("objects", bom=layout.bom, crlf=layout.crlf, gzip=layout.gzip)


@pytest.mark.usefixtures("window")
@FIXED
@given(data=st.data(), records=RECORDS, layout=LF_LAYOUTS)
def test_lines_of_objects(path, data, records, layout):
    """With any blanks between them; the first two are in one line, or the first one has several."""
    one_line = data.draw(st.booleans()) and len(records) > 1
    text, expected = data.draw(BLANKS), []
    for i, record in enumerate(records):
        expected.append(line_after(text))
        indent = 1 if i == 0 and not one_line else data.draw(st.sampled_from([None, 0, 3]))
        text += json.dumps(record, indent=None if i == 0 and one_line else indent)
        text += "" if i == 0 and one_line else data.draw(BLANKS)
    layout.write(path, text)
    assert file_format(path).shape == "objects"
    assert fields_read(path) == records
    assert lines_read(path) == expected


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("tail", ["", "\n\n", "?\n"], ids=["cut", "cut and blank lines", "cut and rubbish"])
def test_broken_objects_give_the_whole_ones_and_the_line_of_the_fault(path, tail):
    """For objects that are cut anywhere after the first line; the oracle is `json`, one object at a time."""
    records = [{"prompt": "가\n{", "n": [1, None]}, {"prompt": {}}, {"prompt": ""}]
    text = "\n".join(json.dumps(record, indent=1, ensure_ascii=False) for record in records)
    for end in range(text.index("\n") + 12, len(text)):
        broken, expected, start = text[:end] + tail, [], 0
        try:
            while start < len(broken.rstrip()):
                start += len(broken[start:]) - len(broken[start:].lstrip())
                value, start = json.JSONDecoder().raw_decode(broken, start)
                expected.append(value)
        except json.JSONDecodeError as error:
            fault = error
        else:
            continue
        PLAIN.write(path, broken)
        found, message = until_error(path)
        # The first object is parsed to tell what the file is, so that nothing comes before its fault.
        assert found == expected
        assert int(re.search(r", line (\d+)", message)[1]) == fault.lineno, (broken, message)


TOLD_BY_LINES = {
    '{"a": 1}\n{"a": 2}{"a": 3}\n': ("lines", [1, 2]),
    '{"a": 1} {"a": 2}\n{"a": 3}\n': ("objects", [1, 1, 2]),
    '{"a": 1}, {"a": 2}\n{"a": 3}\n': ("lines", [1, 2]),
    '{"a": 1\n{"a": 2}\n{"a": 3}\n': ("lines", [1, 2, 3]),
    '{"a": [\n{"a": 2}\n]}\n{"a": 3}': ("objects", [1, 4]),
    '{"a":\n{"a": 2},\n"b": 1}': ("objects", [1]),
    '{"a": 1,, "b"\n\n{"a": 2,\n': ("lines", [1, 3]),
    '{"a": 1': ("lines", [1]),
    '{"a": 1}': ("lines", [1]),
    '{"a": 1, "a": 2}': ("lines", [1]),
    '{\n"a": 1}': ("objects", [1]),
    '{"a": NaN}\n': ("lines", [1]),
}


@pytest.mark.parametrize("text", TOLD_BY_LINES)
def test_what_begins_with_a_brace_is_told_by_its_first_lines(path, text):
    PLAIN.write(path, text)
    assert (file_format(path).shape, lines_read(path)) == TOLD_BY_LINES[text]


# --- An object that holds the records -----------------------------------------------------------

WRAPPERS = st.dictionaries(st.sampled_from(["버전", "이름", "n"]), TEXTS | st.integers(), max_size=3)


@FIXED
@given(data=st.data(), records=RECORDS, wrapper=WRAPPERS, layout=LAYOUTS)
@example(data=None, records=[{"prompt": "가"}], wrapper={}, layout=PLAIN)
def test_a_held_list_is_read_as_it_was_written(path, data, records, wrapper, layout):
    names = data.draw(st.permutations([*wrapper, "data"])) if data else ["data"]
    form = FileFormat("object", holder="data", wrapper={name: wrapper.get(name, []) for name in names})
    text = written(path, form, records)
    whole = json.loads(text)
    assert whole == wrapper | {"data": records}
    assert list(whole) == names
    lines = [number for number, line in enumerate(text.split("\n"), start=1) if line.startswith("        {")]
    layout.write(path, text)
    assert fields_read(path) == records
    assert lines_read(path) == lines
    found = FileFormat("object", layout.bom, layout.crlf, layout.gzip, holder="data", wrapper=form.wrapper)
    assert file_format(path) == found


HELD = '{"train": [{"질문": "가"}], "n": 3,\n "test": [\n{"질문": "나"},\n{"질문": "다"}]}'


def test_one_of_several_held_lists_must_be_chosen(path):
    PLAIN.write(path, HELD)
    fields, message = until_error(path)
    assert not fields
    assert message.startswith(f"{path}, line 1: one object with several lists of records: ['train', 'test']. A path")
    assert '`--map "train[].question=prompt"`' in message
    chosen = ReadingOptions(columns={"test[].질문": "prompt", "n": "ignore"})
    assert [(raw.source.line, raw.fields) for raw in read_records(path, chosen)] == [
        (3, {"질문": "나"}),
        (4, {"질문": "다"}),
    ]
    assert file_format(path, chosen).holder == "test"


NOT_HELD = {
    '{"messages": [{"role": "user", "content": "가"}]}': {},
    '{"제목": [{"a": 1}], "질문": "가"}': {},
    '{"제목": [{"a": 1}, 2]}': {},
    '{"제목": []}': {},
    '{"제목": {"data": [{"a": 1}]}}': {},
    '{"말": [{"누가": "나"}]}': {"말": "messages"},
    '{"말": [{"누가": "나"}], "글": "가"}': {"글": "prompt"},
}


@pytest.mark.parametrize("text", NOT_HELD)
def test_one_object_may_be_a_record(path, text):
    PLAIN.write(path, text)
    options = ReadingOptions(columns=NOT_HELD[text])
    assert fields_read(path, options) == [json.loads(text)]
    assert file_format(path, options).shape == "lines"
    PLAIN.write(path, f"{text}\n{text}")
    assert fields_read(path, options) == [json.loads(text)] * 2


def test_what_is_beside_the_records_is_logged_once(path, caplog):
    PLAIN.write(path, '{"출처": "위키", "data": [{"질문": "가"}, {"질문": "나"}]}')
    with caplog.at_level(logging.INFO):
        list(read_records(path))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "'data'" in message
    assert "위키" in message


# --- Tables -------------------------------------------------------------------------------------


@FIXED
@given(
    names=st.lists(st.sampled_from(["질문", "답변", "문서 번호", "a-b", "비고 (1)", "url"]), min_size=2, unique=True),
    rows=st.lists(st.lists(TEXTS, min_size=6, max_size=6), min_size=1, max_size=4),
    delimiter=st.sampled_from([",", "\t"]),
    layout=LF_LAYOUTS,
)
def test_tables_with_korean_headers_are_read_as_they_were_written(path, names, rows, delimiter, layout):
    assume({"질문", "답변"} & set(names))
    records = [dict(zip(names, row, strict=False)) for row in rows]
    layout.write(path, written(path, FileFormat("csv", delimiter=delimiter), records))
    assert fields_read(path) == records
    assert file_format(path) == FileFormat("csv", layout.bom, gzip=layout.gzip, delimiter=delimiter)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv", "\t"), (".CSV.gz", ",")])
def test_a_name_says_that_the_first_line_is_a_header(tmp_path, suffix, delimiter):
    path = tmp_path / f"a{suffix}"
    PLAIN.write(path, f"무엇을?{delimiter}그것!\n1{delimiter}2\n")
    assert fields_read(path) == [{"무엇을?": "1", "그것!": "2"}]


@pytest.mark.parametrize("start", ["", '""', "Unnamed: 0"])
def test_an_index_column_is_left_out(path, start):
    PLAIN.write(path, f"{start},질문,답\n0,가,나\n1,다\n")
    first, second = fields_read(path)
    assert first == {"질문": "가", "답": "나"}
    assert second == Unreadable("2 cells", "3 cells: 질문,답")


@pytest.mark.parametrize("header", ["질문,,답", "질문,답,", "질문,답,질문"])
def test_a_header_with_an_empty_name_or_one_twice_is_refused(path, header):
    PLAIN.write(path, f"\n{header}\n1,2,3\n")
    assert until_error(path)[1].startswith(f"{path}, line 2: found the header {header.split(',')}, expected names")


UNKNOWN = {
    "가\t나\n1\t2\n": (".tsv", ["가", "나"]),
    "\n가\t\n\n1\t2\n3\t4\n": (".tsv", ["가", ""]),
    '가,나,다\n1,2,"3\n4"\n': (".csv", ["가", "나", "다"]),
    "가,나\n1,2\n": (".csv", ["가", "나"]),
    "가,나,다\n" + "1,2,3\n" * 18 + '1,2,"3\n' + '4"\n': (".csv", ["가", "나", "다"]),
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_a_table_whose_header_is_not_known_is_refused_with_what_to_do(path, text):
    suffix, cells = UNKNOWN[text]
    PLAIN.write(path, text)
    fields, message = until_error(path)
    assert not fields
    assert f"a table of {len(cells)} columns, none with a known name: {cells}. Name the file {suffix} " in message
    assert "`--map 가=prompt`" in message
    assert "`--plain-text`" in message
    assert fields_read(path, ReadingOptions(plain_text=True))[-1] == {"prompt": text.split("\n")[-2]}
    if all(cells):
        assert list(fields_read(path, ReadingOptions(columns={"가": "prompt"}))[0]) == cells
    named = path.with_name("named.txt")
    PLAIN.write(named, text)
    assert file_format(named).shape == "text"


@pytest.mark.parametrize(
    "text",
    [
        "가\t나\n다\n",
        "가, 나\n다, 라\n",
        "가,나,다\n라,마\n",
        '가,나,다\n라,"마"바,사\n',
        "가\t나\n",
        "안녕, 나는 너를, 알아\n그래?\n",
    ],
)
def test_lines_that_are_no_table_are_prompts(path, text):
    PLAIN.write(path, text)
    assert fields_read(path) == [{"prompt": line} for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("mark", ",;|\t")
@pytest.mark.parametrize("name", ["data", "data.csv", "data.txt"])
def test_what_stands_between_the_cells(tmp_path, mark, name):
    path = tmp_path / name
    PLAIN.write(path, f'질문{mark}답\n뭐?{mark}"네{mark} {mark}그래"\n')
    assert file_format(path) == FileFormat("csv", delimiter=mark)
    assert fields_read(path) == [{"질문": "뭐?", "답": f"네{mark} {mark}그래"}]


def test_a_name_says_that_lines_are_prompts(tmp_path):
    """Unless they have a header of two names, one of which is known, or JSON."""
    path = tmp_path / "a.TXT.gz"
    PLAIN.write(path, "질문\n1\n")
    assert fields_read(path) == [{"prompt": "질문"}, {"prompt": "1"}]
    assert fields_read(path, ReadingOptions(columns={"질문": "prompt"})) == [{"질문": "1"}]
    PLAIN.write(path, "질문,답\n1,2\n")
    assert fields_read(path) == [{"질문": "1", "답": "2"}]
    PLAIN.write(path, "가\t나\n1\t2\n")
    assert fields_read(path) == [{"prompt": "가\t나"}, {"prompt": "1\t2"}]
    PLAIN.write(path, '[{"a": 1}]')
    assert fields_read(path) == [{"a": 1}]


@pytest.mark.parametrize("text", ['[{"a": 1}]', '{"a": 1}', "<<start conversation>>", "질문,답\n1,2", "]", "\0"])
def test_plain_text_wins_where_it_is_said(path, text):
    PLAIN.write(path, text)
    assert fields_read(path, ReadingOptions(plain_text=True)) == [{"prompt": line} for line in text.split("\n")]


# --- Encodings and zstd -------------------------------------------------------------------------

HANGUL = st.text(st.sampled_from("가나한희ㅋ a,'{}[]:"), min_size=1)
ENCODINGS = ["cp949", "utf-16", "utf-16-le", "utf-32", "johab", "iso2022_kr", "utf-8"]


@FIXED
@given(
    records=st.lists(st.fixed_dictionaries({"질문": HANGUL, "답": HANGUL}), min_size=1),
    encoding=st.sampled_from(ENCODINGS),
    shape=st.sampled_from(["csv", "lines", "array", "objects"]),
)
def test_a_file_in_another_encoding_is_read_as_it_was_written(path, encoding, shape, records):
    path.write_bytes(written(path, shape, records).encode(encoding))
    assert fields_read(path, ReadingOptions(encoding=encoding)) == records


def test_bytes_that_are_in_another_encoding_are_told_with_the_line(path):
    path.write_bytes("질문,답\n".encode() + "안녕,뷁\n".encode("cp949"))
    fields, message = until_error(path)
    assert not fields
    assert message.startswith(f"{path}, line 2: not UTF-8 at byte 0 of the line. As CP949 it reads '안녕,뷁'; ")
    assert message.endswith("`encoding: cp949` in a config, `--encoding cp949` in a command")
    path.write_bytes("질문,답\n".encode("utf-16"))
    assert "`encoding: utf-16` in a config" in until_error(path)[1]
    path.write_bytes("질문,답\n가,나\n".encode("cp949") + b"\xff,\n")
    assert f"{path}, line 3: not cp949 at byte 0 of the line" in until_error(path, ReadingOptions(encoding="CP949"))[1]
    path.write_bytes("질문,답\n가,나\n".encode("utf-16") + b"\0")
    assert f"{path}, line 2: not utf-16 here or after it" in until_error(path, ReadingOptions(encoding="utf16"))[1]


@pytest.mark.parametrize("encoding", ["cp9494", "hex", "", "a\0"])
def test_an_encoding_that_is_not_there(encoding):
    with pytest.raises(UserError, match=r"encoding: found '.*', expected one such as utf-8, cp949"):
        ReadingOptions(encoding=encoding)


PACKED = pa.compress('{"a": "가"}\n'.encode() * 999, codec="zstd", asbytes=True)


def test_zstd(path):
    path.write_bytes(PACKED + PACKED)
    assert file_format(path) == FileFormat("lines", zstd=True)
    assert fields_read(path) == [{"a": "가"}] * 1998


@pytest.mark.parametrize("data", [PACKED[:-9], PACKED[:5], PACKED[:9] + b"\xff" * 9 + PACKED[18:], PACKED + b"?"])
def test_broken_zstd(path, data):
    path.write_bytes(data)
    assert re.search(r", line \d+: can't be read on: ", until_error(path)[1])


# --- Writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["lines", "objects"])
def test_one_record_that_would_be_taken_for_a_wrapper_is_refused(tmp_path, shape):
    record = {"제목": [{"a": 1}]}
    with pytest.raises(UserError, match="would be taken for a list of records"):
        written(tmp_path / "a", shape, [record])
    assert not list(tmp_path.iterdir())
    written(tmp_path / "a", shape, [record, record])
    assert fields_read(tmp_path / "a") == [record, record]


TURN = {"role": "<사람>", "content": "가"}
CANNOT_HOLD = {
    "a number in a table": ("csv", {"Q": 1}, "a table holds texts"),
    "a system message": ("dialogues", {"messages": [{"role": "system", "content": "가"}]}, "expected a turn of"),
    "a field beside the turns": ("dialogues", {"messages": [TURN], "id": 1}, "expected messages alone"),
    "a field of a turn": ("dialogues", {"messages": [TURN | {"id": 1}]}, "expected a turn of"),
    "a turn without text": ("dialogues", {"messages": [TURN | {"content": None}]}, "expected a turn of"),
}


@pytest.mark.parametrize(("shape", "fields", "message"), CANNOT_HOLD.values(), ids=CANNOT_HOLD)
def test_what_a_format_cannot_hold_is_refused_and_no_file_is_left(tmp_path, shape, fields, message):
    with pytest.raises(UserError, match=message):
        written(tmp_path / "a", shape, [fields])
    assert not list(tmp_path.iterdir())


def test_a_dialogue_may_name_its_speakers_otherwise(path):
    roles = ["user", "assistant", "human", "gpt", "<사람>", "<챗봇>"]
    written(path, "dialogues", [{"messages": [{"role": role, "content": "가"} for role in roles]}])
    (fields,) = fields_read(path)
    assert [turn["role"] for turn in fields["messages"]] == ["<사람>", "<챗봇>"] * 3
