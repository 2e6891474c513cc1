"""What must hold for every file, whatever is in it."""

import csv
import gzip
import io
import json
import re
from pathlib import Path
from unittest import mock

from kochat_trl.data.formats import json_text
from kochat_trl.data.formats.beginning import Beginning
from kochat_trl.data.formats.formats import tell
from kochat_trl.data.options import DEFAULTS
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, FileFormat, file_format, read_records
from kochat_trl.data.records import Unreadable
from kochat_trl.errors import UserError
from tests.data.files import (
    ARRAYS,
    BLANKS,
    FIXED,
    HALVES,
    LAYOUTS,
    LF_LAYOUTS,
    LINES,
    NFD,
    PIECES,
    PLAIN,
    TEXTS,
    Layout,
    dialogue,
    fields_read,
    line_after,
    lines_read,
    peak_of_reading,
    texts_of,
    until_error,
    written,
)

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties") / "data"


@pytest.fixture(params=[1, 3, 256])
def window(request: pytest.FixtureRequest):
    """How many lines of an array are parsed together: with one, the parser meets every cut that there is."""
    with mock.patch.object(json_text, "_LINES_AT_ONCE", request.param):
        yield


# --- Reading what was written -------------------------------------------------------------------


@pytest.mark.usefixtures("window")
@FIXED
@given(records=ARRAYS, layout=LAYOUTS, one_line=st.booleans())
@example(records=[{"prompt": i} for i in range(1000)], layout=PLAIN, one_line=False)
def test_an_array_is_read_as_it_was_written(path, records, layout, one_line):
    text = written(path, "array", records)
    layout.write(path, json.dumps(records) if one_line else text)
    assert fields_read(path) == records
    crlf = layout.crlf and not one_line
    assert file_format(path) == FileFormat("array", bom=layout.bom, crlf=crlf, gzip=layout.gzip)


@FIXED
@given(records=LINES, layout=LAYOUTS)
def test_json_lines_are_read_as_they_were_written(path, records, layout):
    layout.write(path, written(path, "lines", records))
    assert fields_read(path) == records
    assert file_format(path) == FileFormat("lines", bom=layout.bom, crlf=layout.crlf, gzip=layout.gzip)


def tellable_turn(text: str) -> str:
    """`text` as a dialogue file can tell it: without blanks around it, and without CR, which ends a line."""
    return text.replace("\r", "").strip()


def contents(records: list[dict]) -> list[str]:
    return [message["content"] for fields in records for message in fields["messages"]]


TURNS = st.lists(st.tuples(st.sampled_from(SPEAKERS), TEXTS.map(tellable_turn)), max_size=4).map(
    lambda turns: dialogue(*turns)
)


@FIXED
@given(records=st.lists(TURNS, min_size=1, max_size=4), layout=LAYOUTS)
@example(records=[dialogue(("<사람>", "가 \n 나 \n 다"))], layout=PLAIN)
def test_dialogues_are_read_as_they_were_written(path, records, layout):
    """For texts without blanks around them, without CR, and without a line that begins a turn: that one is refused."""
    markers = (DIALOGUE_START, *(f"{speaker}:" for speaker in SPEAKERS))
    later_lines = [line for text in contents(records) for line in text.split("\n")[1:]]
    if any(line.strip().startswith(markers) for line in later_lines):
        with pytest.raises(UserError, match="a line of a turn begins with"):
            written(path, "dialogues", records)
        return
    layout.write(path, written(path, "dialogues", records))
    assert fields_read(path) == records
    assert file_format(path) == FileFormat("dialogues", bom=layout.bom, crlf=layout.crlf, gzip=layout.gzip)


NAMES = st.sampled_from(["A", "label", "output", "input", "chosen", "rejected", "tokens", "번호", "id_2"])
HEADERS = st.tuples(st.sampled_from(["prompt", "instruction", "Q"]), st.lists(NAMES, max_size=4, unique=True)).flatmap(
    lambda names: st.permutations([names[0], *names[1]])
)
TABLES = HEADERS.flatmap(
    lambda header: st.lists(st.fixed_dictionaries({name: TEXTS for name in header}), min_size=1, max_size=5)
)


@FIXED
@given(records=TABLES, layout=LF_LAYOUTS, quoted=st.booleans())
def test_csv_is_read_as_it_was_written(path, records, layout, quoted):
    text = written(path, "csv", records)
    if quoted:  # as others write it: CRLF ends, every cell in quotes, the header's too
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(records[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(records)
        text = stream.getvalue()
    layout.write(path, text)
    assert fields_read(path) == records
    assert file_format(path) == FileFormat("csv", bom=layout.bom, crlf=quoted, gzip=layout.gzip)


def is_told_as_text(prompts: list[str]) -> bool:
    lines = (f"{prompt}\n" for prompt in prompts)
    try:
        return tell(Beginning("data", lines, DEFAULTS))[0].shape == "text"
    except UserError:
        return False


@FIXED
@given(prompts=st.lists(texts_of(PIECES, forbidden="\r\n\ufeff"), min_size=1, max_size=6), layout=LAYOUTS)
@example(prompts=["가", "", "\0", "[", "{", DIALOGUE_START], layout=PLAIN)
@example(prompts=["", "", "[{"], layout=PLAIN)
@example(prompts=["가\t나", "다\t라"], layout=PLAIN)
@example(prompts=["가,나,다", "라,마,바"], layout=PLAIN)
@example(prompts=["가,나,다", "라,마,바", "사"], layout=PLAIN)
def test_plain_text_is_read_as_it_was_written(path, prompts, layout):
    """For prompts without line ends and BOM; where the first one looks like another shape, the file is refused."""
    records = [{"prompt": prompt} for prompt in prompts]
    assume(any(map(str.strip, prompts)))  # else the file is empty
    if not is_told_as_text(prompts):
        with pytest.raises(UserError, match="would be taken for another shape"):
            written(path, "text", records)
        return
    layout.write(path, written(path, "text", records))
    assert fields_read(path) == records
    assert lines_read(path) == list(range(1, len(records) + 1))
    assert file_format(path) == FileFormat("text", bom=layout.bom, crlf=layout.crlf, gzip=layout.gzip)


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("shape", ["array", "lines", "dialogues", "text"])
def test_very_long_lines(path, shape):
    long = "가나다 " * 50_000 + "끝"
    record = dialogue(("<사람>", long), ("<챗봇>", long)) if shape == "dialogues" else {"prompt": long}
    PLAIN.write(path, written(path, shape, [record] * 3))
    same = fields_read(path) == [record] * 3
    assert same  # and not the comparison itself, which pytest would print


@FIXED
@given(texts=st.lists(texts_of(PIECES + HALVES), min_size=1, max_size=3))
def test_what_a_shape_cannot_tell_is_refused(path, texts):
    """Half characters in a shape without escapes, a prompt of two lines, rows of different fields."""
    shapes = {
        "csv": [{"Q": text, "A": "나"} for text in texts],
        "text": [{"prompt": text} for text in texts],
        "dialogues": [dialogue(("<사람>", text)) for text in texts],
    }
    whole = "".join(texts)
    for shape, records in shapes.items():
        if any("\ud800" <= character <= "\udfff" for character in whole) or (shape == "text" and "\n" in whole):
            with pytest.raises(UserError):
                written(path, shape, records)
            assert not path.exists()
    for uneven in (
        [{"Q": "가", "A": "나"}, {"Q": "다"}],
        [{"Q": "가", "A": "나"}, {"Q": "다", "A": "라", "input": "마"}],
    ):
        with pytest.raises(UserError, match="record 1"):
            written(path, "csv", uneven)


# --- Where a record is --------------------------------------------------------------------------


@pytest.mark.usefixtures("window")
@FIXED
@given(data=st.data(), records=ARRAYS, layout=LF_LAYOUTS)
def test_lines_of_an_array(path, data, records, layout):
    """Blanks and line ends anywhere between the tokens of the array; lines are counted while it is put together."""
    text, expected = data.draw(BLANKS) + "[" + data.draw(BLANKS), []
    for i, record in enumerate(records):
        text += ("," if i else "") + data.draw(BLANKS)
        expected.append(line_after(text))
        text += json.dumps(record, indent=data.draw(st.sampled_from([None, 0, 3]))) + data.draw(BLANKS)
    layout.write(path, text + "]" + data.draw(BLANKS))
    assert fields_read(path) == records
    assert lines_read(path) == expected


@FIXED
@given(data=st.data(), records=LINES, layout=LF_LAYOUTS)
def test_lines_of_json_lines(path, data, records, layout):
    """With blank lines, and with lines that are no JSON, between the records."""
    broken = st.sampled_from(['{"prompt":', "가", '{"a": 1} {"a": 2}', '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 9999])
    text, expected, fields = "", [], []
    for record in records:
        text += data.draw(st.sampled_from(["", "\n", "\r\n", " \t\n\n"]))
        expected.append(line_after(text))
        fields.append(record)
        text += json.dumps(record, ensure_ascii=True) + data.draw(st.sampled_from(["\n", "\r\n", " \n"]))
        if data.draw(st.booleans()):
            expected.append(line_after(text))
            fields.append(None)
            text += data.draw(broken) + "\n"
    layout.write(path, text)
    assert [None if isinstance(found, Unreadable) else found for found in fields_read(path)] == fields
    assert lines_read(path) == expected


@FIXED
@given(data=st.data(), dialogues=st.lists(TURNS, min_size=1, max_size=4), layout=LAYOUTS)
def test_lines_of_dialogues(path, data, dialogues, layout):
    text, expected = "", []
    for turns in (fields["messages"] for fields in dialogues):
        text += data.draw(st.sampled_from(["", "\n", " \n\n"]))
        expected.append(line_after(text))
        text += f"{DIALOGUE_START}{data.draw(st.sampled_from(['', ' ']))}\n"
        text += "".join(f"{turn['role']}: {(turn['content'].splitlines() or [''])[0]}\n" for turn in turns)
    layout.write(path, text)
    assert [len(fields["messages"]) for fields in fields_read(path)] == [
        len(fields["messages"]) for fields in dialogues
    ]
    assert lines_read(path) == expected


@FIXED
@given(data=st.data(), rows=st.lists(st.lists(TEXTS, min_size=1, max_size=4), min_size=1, max_size=6))
def test_lines_of_csv(path, data, rows):
    """Cells of several lines, blank lines, rows with too few or too many cells, in any quoting."""
    stream = io.StringIO(newline="")
    stream.write(data.draw(st.sampled_from(["Q,A\n", "\nQ,A\r\n", ' \n"Q","A"\n'])))
    expected = []
    for row in rows:
        stream.write(data.draw(st.sampled_from(["", "\n", "\r\n"])))
        expected.append(line_after(stream.getvalue()))
        csv.writer(stream, quoting=data.draw(st.sampled_from([0, 1]))).writerow(row)
    PLAIN.write(path, stream.getvalue())
    fields = [dict(zip(("Q", "A"), row, strict=True)) if len(row) == 2 else None for row in rows]
    assert [None if isinstance(found, Unreadable) else found for found in fields_read(path)] == fields
    assert lines_read(path) == expected


def array_texts() -> list[str]:
    records = [{"prompt": "가\n[", "n": [1, -2.5e3, None]}, {}, {"prompt": NFD, "completion": {"a": []}}]
    return [
        json.dumps(records, indent=2, ensure_ascii=False) + "\n\n",
        json.dumps(records, ensure_ascii=False),
        "\n".join(re.findall(r'"(?:\\.|[^"\\])*"|[\[\]{},:]|[^\s"\[\]{},:]+', json.dumps(records))) + "\n \n",
    ]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("text", array_texts(), ids=["indented", "one line", "a token a line"])
@pytest.mark.parametrize("tail", ["", "\n\n\n", "?\n\n"], ids=["cut", "cut and blank lines", "cut and rubbish"])
def test_a_broken_array_gives_its_whole_records_and_the_line_of_the_fault(path, text, tail):
    """For an array that is cut anywhere; the oracle is `json`, which sees the file as a whole."""
    whole, ends = json.loads(text), [1]
    for _ in whole:
        ends.append(json.JSONDecoder().raw_decode(text, text.index("{", ends[-1]))[1])
    for end in range(2, len(text.rstrip())):  # from '[{' on, which tells that it is an array
        broken = text[:end] + tail
        try:
            json.loads(broken)
        except json.JSONDecodeError as error:
            fault = error
        else:
            continue  # the rubbish went into a string
        PLAIN.write(path, broken)
        records, message = until_error(path)
        assert records == whole[: sum(its_end <= end for its_end in ends[1:])]
        assert int(re.search(r", line (\d+)", message)[1]) == fault.lineno, (broken, message)


# --- Files that generated ones are seldom like --------------------------------------------------

REFUSED = {
    "a blank that JSON doesn't know": ("\xa0[1]", r"line 1: found '\\xa0\[1\]', expected '\['"),
    "a second BOM": ("\n\ufeff[1]", r"line 2: found '\\ufeff\[1\]', expected '\['"),
    "text after the array": ("[{}]\n]", r"line 2: found '\]' after the JSON array, expected nothing"),
    "an array in an array, and so on": ("[" * 9999, r"line 1 \(record 0\): broken JSON: nested too deeply"),
    "a number that no float holds": (
        '[{"a":\n1e999}]',
        r"line 1 \(record 0\): broken JSON: the number '1e999' is too large",
    ),
    "text glued to a marker": (
        f"{DIALOGUE_START}\n<사람>: 가\n{DIALOGUE_START} <사람>: 나",
        r"line 3: found .* expected '<<start conversation>>' alone",
    ),
    "a name twice": (
        "Q,A,Q\n1,2,3",
        r"line 1: found the header \['Q', 'A', 'Q'\], expected names of fields, none empty and none twice",
    ),
    "a BOM before the header": ("\n\ufeffQ,A\n1,2", r"line 2: found the header \['\\ufeffQ', 'A'\], expected"),
    "a header of two lines": ('"Q","A\n1","2"\n', r"line 1: found the header \['Q', 'A\\n1', '2'\], expected"),
    "a broken header": ('"Q" ,A\n1,2', "line 1: broken CSV: ',' expected after"),
    "a quote that nothing closes": ('Q,A\n1,2\n"3,4\n', "line 3: a quote is opened here and not closed"),
    "a quote that is closed late": (
        'Q,A\n1,"' + "가" * 140_000 + '"',
        "line 2: a cell of over 131,072 characters; is a quote",
    ),
    "CR alone": ("가\r나\r다\r", "line 1: ends of CR alone, expected LF or CRLF"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_refused(path, text, message):
    PLAIN.write(path, text)
    assert re.match(re.escape(f"{path}, ") + message, until_error(path)[1])


def test_a_line_of_other_blanks_is_no_record_and_not_nothing(path):
    PLAIN.write(path, '{"a": 1}\n\u3000\n \t\n{"a": 2}\n')
    first, second, third = read_records(path)
    assert (first.fields, third.fields) == ({"a": 1}, {"a": 2})
    assert isinstance(second.fields, Unreadable)
    assert [record.source.line for record in (first, second, third)] == [1, 2, 4]


def test_blank_lines_before_a_header_in_quotes(path):
    PLAIN.write(path, '\n \n"Q", A\n\n"1","2"\n')
    (record,) = read_records(path)
    assert (record.fields, record.source.line) == ({"Q": "1", "A": "2"}, 5)


PACKED = gzip.compress(b'{"a": 1}\n' * 99, mtime=0)


@pytest.mark.parametrize("data", [PACKED[:-9], PACKED[:2], PACKED[:10] + b"\xff" * 9 + PACKED[19:], PACKED + b"?"])
def test_broken_gzip(path, data):
    path.write_bytes(data)
    assert re.search(r", line \d+: can't be read on: ", until_error(path)[1])


def test_a_path_that_no_file_system_takes():
    with pytest.raises(UserError, match="can't be read: File name too long"):
        list(read_records("가" * 300 + ".jsonl"))


# --- Memory -------------------------------------------------------------------------------------

ENDLESS = {
    "array": ("[\n", '  {{"prompt": "{}",\n   "completion": "가"}},\n', "null]"),
    "objects": ("", '{{"prompt": "{}",\n "completion": "가"}}\n', ""),
    "lines": ("", '{{"prompt": "{}", "completion": "가"}}\n', ""),
    "dialogues": ("", "<<start conversation>>\n<사람>: {}\n<챗봇>: 가\n", ""),
    "csv": ("Q,A\n", '"{}","가"\n', ""),
    "text": ("", "{}\n", ""),
}


@pytest.mark.parametrize("shape", ENDLESS)
@pytest.mark.parametrize("layout", [PLAIN, Layout(bom=True, crlf=True, gzip=True)], ids=["plain", "gzip"])
def test_memory_does_not_grow_with_the_number_of_records(path, shape, layout):
    start, record, end = ENDLESS[shape]
    peaks = []
    for count in (600, 600, 6000):  # the first run warms up
        layout.write(path, start + "".join(record.format(f"질문 {i:60}") for i in range(count)) + end)
        peaks.append(peak_of_reading(path))
    assert peaks[2] < peaks[1] + 50_000  # the file grows by 400,000 bytes or more
