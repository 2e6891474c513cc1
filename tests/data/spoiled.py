"""Spoiled files: of one of the shapes that `readers.py` reads, with accidents, and an independent reading of them."""

import csv
import gzip
import io
import json
import random
import re
import zlib
from dataclasses import dataclass
from typing import Any

from kochat_trl.data import shapes
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS
from kochat_trl.data.records import Unreadable
from tests.data.foreign import FOREIGN

from hypothesis import strategies as st

# --- Files that are as they should be -----------------------------------------------------------

TEXTS = [
    "안녕하세요",
    "불고기용 고기 한우에요?",
    "서울입니다.\n네.",
    "b",
    "ㅋㅋ 😀",
    "\u1112\u1161\u11ab 글",
    "'",
    '말 "음"',
    "\\n",
    " ",
]


def text(rng: random.Random) -> str:
    return rng.choice(TEXTS) + rng.choice(["", str(rng.randrange(100))])


def some_record(rng: random.Random) -> dict[str, Any]:
    one, two = text(rng), text(rng)
    count = rng.randrange(2, 5)
    ranking = rng.sample(range(count), count)
    if rng.random() < 0.5:
        foreign = rng.choice([foreign for foreign in FOREIGN.values() if not foreign.options.columns])
        return with_other_texts(rng, rng.choice(foreign.records))
    return rng.choice(
        [
            {"prompt": one, "completion": two, "tokens": 9},
            {"instruction": one, "input": "", "output": two},
            {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": two}]},
            {"prompt": one, "chosen": one, "rejected": two},
            {"prompt": one, **{f"completion_{i}": f"{i} {two}" for i in range(count)}, "ranking": ranking},
            {"prompt": one},
            {"Q": one, "A": two, "label": 0},
        ]
    )


def with_other_texts(rng: random.Random, value: Any, name: str = "") -> Any:
    """A record with other texts in some places; speakers and the like stay what they are."""
    if isinstance(value, dict):
        return {key: with_other_texts(rng, inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_other_texts(rng, inner, name) for inner in value]
    kept = not isinstance(value, str) or name in ("role", "from", "type", "winner", "ranking", "label")
    return value if kept or rng.random() < 0.5 else text(rng)


def array(rng: random.Random, records: list[Any]) -> str:
    return json.dumps(records, indent=rng.choice([None, 1, 4]), ensure_ascii=rng.random() < 0.3)


def json_lines(rng: random.Random, records: list[Any]) -> str:
    end = rng.choice(["\n", "\n", "\n\n", "\r\n"])
    return "".join(json.dumps(record, ensure_ascii=rng.random() < 0.3) + end for record in records)


def dialogues(rng: random.Random, records: list[Any]) -> str:
    lines = []
    for _ in records:
        lines.append(DIALOGUE_START)
        first = rng.randrange(10) == 0  # the chatbot, now and then
        lines += [f"{SPEAKERS[(i + first) % 2]}: {text(rng)}" for i in range(2 * rng.randrange(3))]
    return "\n".join(lines) + rng.choice(["", "\n", "\n\n"])


def table(rng: random.Random, records: list[Any]) -> str:
    stream = io.StringIO(newline="")
    end, quoting = rng.choice(["\n", "\r\n"]), rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    rows = [["Q", "A", "label"], *([text(rng), text(rng), "0"] for _ in records)]
    csv.writer(stream, lineterminator=end, quoting=quoting).writerows(rows)
    return stream.getvalue()


def objects(rng: random.Random, records: list[Any]) -> str:
    """One after the other: the first one over several lines, or two in its line."""
    texts = [json.dumps(record, indent=rng.choice([None, 1]), ensure_ascii=False) for record in records]
    between = rng.choice(["", " ", "\n", "\r\n", "\n\n"])
    if len(texts) > 1 and rng.random() < 0.5:
        return texts[0].replace("\n", " ") + " " + texts[1].replace("\n", " ") + between + between.join(texts[2:])
    return json.dumps(records[0], indent=2, ensure_ascii=False) + between + between.join(texts[1:])


def held(rng: random.Random, records: list[Any]) -> str:
    """One object with a list of the records, in any layout."""
    beside = {"버전": "1.0", "목록": [], "이름": {"a": [1]}}
    names = rng.sample(["버전", "목록", "이름", "data"], 4)[: rng.randrange(1, 5)]
    whole = {name: records if name == "data" else beside[name] for name in [*names, "data"]}
    return json.dumps(whole, indent=rng.choice([None, 0, 2]), ensure_ascii=False)


def korean_table(rng: random.Random, records: list[Any]) -> str:
    """By tabs or commas, with an index or without."""
    stream = io.StringIO(newline="")
    index = rng.choice([[], [""], ["Unnamed: 0"]])
    rows = [[*index, "질문", "답 변", "출처"], *([*(index and ["0"]), text(rng), text(rng), "0"] for _ in records)]
    csv.writer(stream, delimiter=rng.choice("\t,"), lineterminator=rng.choice(["\n", "\r\n"])).writerows(rows)
    return stream.getvalue()


def prompts(rng: random.Random, records: list[Any]) -> str:
    return "".join(text(rng).replace("\n", " ") + rng.choice(["\n", "\n", "\r\n"]) for _ in records)


SHAPES = {"array": array, "lines": json_lines, "dialogues": dialogues, "csv": table, "text": prompts}
SHAPES |= {"objects": objects, "object": held, "csv ": korean_table}

# --- What goes wrong with them ------------------------------------------------------------------

# JSON values that belong into none of the fields; some of them are JSON only by the look of it.
VALUES = [
    *("null", "true", "3", "-1", "-0", "01", "0.5", "1e5", "1e999", "-1E+400", "NaN", "Infinity", "-Infinity", "what"),
    *("", '"', ",", "}", "]", '""', '" "', "[]", "{}", "[[]]", '[""]', '{"a": 1}', '{"a": 1, "a": 2}', "'single'"),
    *("[0, 0]", "[1, 0]", "[[0, 1]]", "[2, null, 0]", "[0, 9]", "[-1, 0]", "[1.0, 0]", "[true, false]", '["1", "0"]'),
    *('[{"role": "user"}]', '[{"a": []}]', '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]'),
    *(r'"\ud800"', r'"가\udfff나"', r'"\ud83d\ude00"', r'"\u0000"', r'"\u2028"', r'"\x"', '"\0"', '"\t"'),
    *("9" * 4000, "9" * 5000, "[" + "9" * 5000 + "]", '"' + "가" * 5000 + '"'),
    *("[" * 200 + "]" * 200, '{"a":' * 300 + "1" + "}" * 300),
    *("[" * 10_000 + "]" * 10_000, "[" * 10_000, '{"a":' * 10_000),
    '{"' + "긴" * 3000 + '": 1, "' + "긴" * 3000 + '": 2}',
]
TOKENS = [
    *(b"[", b"]", b"{", b"}", b",", b":", b'"', b'""', b"'", b"\\", b"\\u", b"\\ud800", b"null", b"NaN", b"1e999"),
    *(b"\n", b"\r", b"\r\n", b"\r\r\n", b"\n\n", b"\0", b"\x1a", b"\x1b[2J", b"\x1c"),
    *("\x85".encode(), "\xa0".encode(), "\u2028".encode(), "\u3000".encode(), "\ufeff".encode()),
    *(b"\xff", b"\xff\xfe", b"\xfe\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x1f\x8b"),
    *("안녕".encode("cp949"), "안녕".encode("utf-16"), "café".encode("latin-1"), "안녕".encode()),
    *(b'{"prompt": "a"}', b'"prompt": "a",', b'\n{"prompt": "a"}\n', b'", "completion": "', b"Q,A"),
    *("<사람>:".encode(), "\n<챗봇>: ".encode(), b"<<start", b"<<start conversation>>", b"\n<<start conversation>>\n"),
    *(b"[" * 10_000, b'{"a":' * 10_000, b"9" * 5000, b'"' + b"a" * 140_000),
]


def spoil_value(rng: random.Random, records: list[Any]) -> None:
    """Put a wrong value into one record, at any depth, leave a field out, or put it in the place of the record."""
    i = rng.randrange(len(records))
    value = f"@{rng.randrange(len(VALUES))}@"  # what stands for a value that `json` wouldn't write
    if not isinstance(records[i], dict) or rng.random() < 0.1:
        records[i] = value
        return
    place = records[i]
    while rng.random() < 0.6:
        items = place.values() if isinstance(place, dict) else place
        place = rng.choice([item for item in items if item and isinstance(item, dict | list)] or [place])
    names = ["ranking", "completion_2", "messages", "input", "x", "label", "history", "scores", "system"]
    name = rng.choice([*place, *names] if isinstance(place, dict) else range(len(place)))
    place[name] = value
    if rng.random() < 0.2:
        del place[name]


def put_values(content: str) -> str:
    return re.sub(r'"@(\d+)@"', lambda match: VALUES[int(match[1])], content)


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """One of the accidents that happen to the bytes of a file."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    before, part, after = data[:start], data[start:end], data[end:]
    few = data[start : start + rng.randrange(1, 9)]
    decoded = part.decode(errors="ignore")
    return rng.choice(
        [
            lambda: before,
            lambda: after,
            lambda: before + after,
            lambda: before + data[start + len(few) :],
            lambda: before + part + part + after,
            lambda: after + part + before,
            lambda: data + data,
            lambda: before + rng.randbytes(rng.randrange(1, 5)) + part + after,
            lambda: before + bytes([rng.randrange(256)]) + data[start + 1 :],
            lambda: before + bytes(byte ^ 1 << rng.randrange(8) for byte in few) + data[start + len(few) :],
            lambda: before + rng.choice(TOKENS) + part + after,
            lambda: before + rng.choice(TOKENS) + part + rng.choice(TOKENS) + after,
            lambda: before + rng.choice(TOKENS) + after,
            lambda: rng.choice(TOKENS) + data,
            lambda: data + rng.choice(TOKENS),
            lambda: before + some_file(rng, 0).data + part + after,
            lambda: before + decoded.encode("cp949", errors="ignore") + after,
            lambda: before + decoded.encode("utf-16", errors="ignore") + after,
            lambda: before + decoded.encode("latin-1", errors="replace") + after,
            lambda: before + part.replace(b"\n", rng.choice([b"\r", b"\r\n", b"", b"\n\n"])) + after,
            lambda: data.replace(b"\r", b"").replace(b"\n", b"\r"),
            lambda: before + part.replace(b'"', rng.choice([b"", b"'", b'""', b"\xe2\x80\x9c"])) + after,
            lambda: before + part.replace(b",", rng.choice([b"", b";", b",,", b"\t"])) + after,
            lambda: rng.choice(
                [b"", b" ", b"\n", b"\r", b"\0", b"\xef\xbb\xbf", b"[]", b"{}", b"[", b"null", b"\x1f\x8b"]
            ),
        ]
    )()


def spoil_binary(rng: random.Random, data: bytes) -> bytes:
    """One of the accidents that happen to files that aren't opened in an editor."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    few = data[start : start + rng.randrange(1, 9)]
    return rng.choice(
        [
            lambda: data[:end],
            lambda: data[start:],
            lambda: data[:start] + data[end:],
            lambda: data + data,
            lambda: data[:start] + rng.randbytes(len(few)) + data[start + len(few) :],
            lambda: data[:start] + bytes(byte ^ 1 << rng.randrange(8) for byte in few) + data[start + len(few) :],
            lambda: data[:start] + bytes(end - start) + data[end:],
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.decode("utf-8", errors="replace").encode(),
        ]
    )()


@dataclass(frozen=True)
class Input:
    """The bytes of a file. Where nothing was done to them, also what they are, and how many records they hold."""

    data: bytes
    shape: str | None = None
    count: int | None = None


def some_file(rng: random.Random, accidents: int) -> Input:
    shape = rng.choice(list(SHAPES))
    records: list[Any] = [some_record(rng) for _ in range(rng.randrange(1, 6))]
    values = rng.choice([0, 0, 1, 3]) if shape in ("array", "lines", "objects", "object") else 0
    for _ in range(values):
        spoil_value(rng, records)
    data = put_values(SHAPES[shape](rng, records)).encode()
    for _ in range(accidents):
        data = spoil_bytes(rng, data)
    if rng.random() < 0.2:
        data = b"\xef\xbb\xbf" + data
    if rng.random() < 0.1:
        data = gzip.compress(data, 1, mtime=0)
        if rng.random() < 0.5:
            return Input(spoil_bytes(rng, data))
    return Input(data) if values or accidents else Input(data, shape.strip(), len(records))


SPOILED = st.builds(some_file, st.randoms(use_true_random=True), st.sampled_from([0, 1, 1, 2, 4]))


# --- What they must be read as ------------------------------------------------------------------

BROKEN = object()  # in the place of a record that can't be read while the next one can
TOO_DEEP = object()  # how deep the parser goes hangs on who calls it


def bytes_inside(data: bytes) -> bytes | None:
    """The bytes of a file, unpacked if they are gzip; None if they can't be."""
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error):
        return None


def json_value(content: str) -> Any:
    """The value of a JSON text; `BROKEN` if it isn't JSON, or has a field twice or a number that no float holds."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    def finite(number: str) -> float:
        if abs(value := float(number)) == float("inf"):
            raise ValueError
        return value

    try:
        return json.loads(content, object_pairs_hook=once, parse_constant=lambda _: 1 / 0, parse_float=finite)
    except (ValueError, ZeroDivisionError):
        return BROKEN
    except RecursionError:
        return TOO_DEEP


def objects_of(content: str) -> Any:
    """The objects that a text is made of; None if it isn't made of whole ones."""
    found = []
    while content := content.lstrip(" \t\r\n"):
        try:
            _, end = json.JSONDecoder().raw_decode(content)
        except ValueError:
            return None
        except RecursionError:
            return TOO_DEEP
        value = json_value(content[:end])
        if value is TOO_DEEP or not isinstance(value, dict):
            return TOO_DEEP if value is TOO_DEEP else None
        found.append(value)
        content = content[end:]
    return found


def rows_of(content: str, delimiter: str) -> list[list[str]] | None:
    """The rows of a table from its header on; None if it isn't strict CSV."""
    try:
        stream = io.StringIO(content, newline="\n")
        rows = [row for row in csv.reader(stream, delimiter=delimiter, strict=True) if row]
    except csv.Error:
        return None
    while rows and not "".join(rows[0]).strip():
        del rows[0]
    return rows


def expected_fields(shape: str, content: str, delimiter: str = ",") -> list[Any] | None:
    """What the records of a file must be; None if it isn't whole, so that reading it must end in an error.

    Raises `LookupError` where this can't tell.
    """
    lines = content.removesuffix("\n").split("\n")
    if "\r" in content.strip() and "\n" not in content.lstrip():
        return None  # lines that end in CR alone
    if shape == "array":
        value = json_value(content)
        if value is TOO_DEEP:
            raise LookupError
        return value if isinstance(value, list) else None
    if shape == "lines":
        return [json_value(line) for line in lines if line.strip(" \t\r\n")]
    if shape == "objects":
        found = objects_of(content)
        if found is TOO_DEEP:
            raise LookupError
        return found
    if shape == "object":
        value = json_value(content)
        lists = [field for field in value.values() if field and isinstance(field, list) and is_records(field)]
        return lists[0] if len(lists) == 1 and not shapes.knows(value) else None
    if shape == "text":
        return [{"prompt": line.rstrip("\r\n")} for line in lines]
    if shape == "csv":
        rows = rows_of(content, delimiter)
        if rows is None:
            raise LookupError  # a row may be broken by itself, or for good
        header = [cell.strip() for cell in rows[0]]
        width = len(header)
        without = [i for i, cell in enumerate(header) if cell == "Unnamed: 0" or (i == 0 and not cell)]
        names = [cell for i, cell in enumerate(header) if i not in without]
        named = all(re.fullmatch(r"[\w .()\[\]-]{1,40}", cell) for cell in names) and len(set(names)) == len(names)
        if not named or not shapes.knows(names):
            return None
        cells = [[cell for i, cell in enumerate(row) if i not in without] if len(row) == width else [] for row in rows]
        return [dict(zip(names, row, strict=True)) if row else BROKEN for row in cells[1:]]
    assert shape == "dialogues"
    found: list[Any] = []
    for line in map(str.strip, lines):
        turn = re.match(r"<(사람|챗봇)>:", line)
        if line.startswith("<<start conversation>>"):
            if line != "<<start conversation>>":
                return None
            found.append([])
        elif turn:
            found[-1].append(turn[0][:-1])
        elif line and not found[-1]:
            return None
    return list(map(tuple, found))


def is_as_expected(fields: Any, expected: Any) -> bool:
    if expected in (BROKEN, TOO_DEEP) or isinstance(fields, Unreadable):
        return expected is TOO_DEEP or (isinstance(fields, Unreadable) and expected is BROKEN)
    if isinstance(expected, tuple):  # the speakers of a dialogue
        return tuple(message["role"] for message in fields["messages"]) == expected
    return fields == expected


def is_records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(record, dict) for record in value)
