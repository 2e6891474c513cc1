"""Files → records → tokenized rows."""

import gzip
import json
import os
import shutil
import threading
from pathlib import Path

from benchmarks.architectures import CHATML, byte_tokenizer
from kochat_trl.data.parse import parse
from kochat_trl.data.rankings import ranking_tiers, tier_pairs
from kochat_trl.data.readers import file_format, read_records
from kochat_trl.data.records import Dialogue, Prompt, Ranking, conversation
from kochat_trl.errors import UserError
from kochat_trl.models.template import render
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.rows import rows
from kochat_trl.rows.encode import encode_dialogue, encode_prompts, shorten_prompt
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import DataArguments
from tests.tiny import parsed

import pytest

DIALOGUES = """<<start conversation>>
<사람>: 안녕
<챗봇>: 반가워요.
<사람>: 이름이 뭐야?
<챗봇>: 저는 챗봇이에요.
두 줄로 말해요.
<<start conversation>>
<사람>: 잘 가
<챗봇>: 안녕히 가세요.
"""


def test_array_named_jsonl_and_json_lines_read_alike(write):
    records = [{"prompt": "가", "completion": "나", "tokens": 3}, {"prompt": "다\n라", "completion": "마"}]
    array = write("array.jsonl", "\ufeff" + json.dumps(records, indent=4))  # escaped, with a BOM
    lines = write("lines.jsonl", "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n")
    expected = [Dialogue(("가", "나")), Dialogue(("다\n라", "마"))]
    assert parsed(array, "sft") == parsed(lines, "sft") == expected
    assert [(r.source.index, r.source.line) for r in read_records(array)] == [(0, 2), (1, 7)]
    assert [(r.source.index, r.source.line) for r in read_records(lines)] == [(0, 1), (1, 3)]
    assert list(read_records(write("empty.json", "[ ]"))) == []


def test_dialogues(write):
    first, second = parsed(write("talk.jsonl", DIALOGUES), "sft")
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert first.messages[3]["content"] == "저는 챗봇이에요.\n두 줄로 말해요."
    assert second.messages[0]["content"] == "잘 가"


def test_instruction_files(write):
    path = write("a.jsonl", '{"instruction": "요약해", "input": "긴 글", "output": "짧은 글"}')
    assert parsed(path, "sft")[0].messages[0]["content"] == "요약해\n\n긴 글"


def test_ranking_is_best_first(write):
    record = {"prompt": "가", "completion_0": "둘째", "completion_1": "셋째", "completion_2": "첫째"}
    path = write("rm.jsonl", json.dumps([record | {"ranking": [2, 0, 1]}], ensure_ascii=False))
    (ranking,) = parsed(path, "preference")
    assert ranking == Ranking("가", ("둘째", "셋째", "첫째"), ((2,), (0,), (1,)), ranking=[2, 0, 1])
    assert ranking.pairs() == [(2, 0, 1), (2, 1, 2), (0, 1, 1)]
    assert ranking.pairs("best_vs_rest") == [(2, 0, 1), (2, 1, 2)]
    assert ranking.pairs("adjacent") == [(2, 0, 1), (0, 1, 1)]


def test_ranking_as_kochatgpts_trainer_reads_it(write):
    """`[2, 0, 1]` as ranks: completion 1 is the best, completion 0 the worst."""
    record = {"prompt": "가", "completion_0": "셋째", "completion_1": "첫째", "completion_2": "둘째"}
    path = write("rm.jsonl", json.dumps([record | {"ranking": [2, 0, 1]}], ensure_ascii=False))
    (ranking,) = parsed(path, "preference", ranking_order="rank_of")
    assert ranking.tiers == ((1,), (2,), (0,))


def test_ties_and_partial_rankings():
    assert ranking_tiers([2, [0, 3]], 4) == ((2,), (0, 3))  # 1 is not ranked
    assert ranking_tiers([1, None, 0, 1], 4, "rank_of") == ((2,), (0, 3))
    assert tier_pairs(((2,), (0, 3))) == [(2, 0, 1), (2, 3, 1)]
    assert ranking_tiers([7, 7, -3], 3, "rank_of") == ((2,), (0, 1))


def test_the_real_rankings_prefer_the_answer_that_a_reader_would(shared):
    """In the second record completion 1 is garbage, so it must lose both of its pairs."""
    ranking = parsed(shared / "data/kochatgpt/kochatgpt_2_RM.excerpt.jsonl", "preference")[1]
    garbage = ranking.completions[1]
    pairs = ranking.pairs()
    assert [ranking.completions[worse] == garbage for _, worse, _ in pairs] == [False, True, True]
    assert all(ranking.completions[better] != garbage for better, _, _ in pairs)


RANKED = {"prompt": "가", "completion_0": "나", "completion_1": "다"}
BROKEN = [
    ("sft", {"prompt": "가"}, "field 'completion': found None, expected a non-empty string, such as completion, "),
    ("sft", {"prompt": 3, "completion": "나"}, "field 'prompt': found 3"),
    ("sft", {"text": "가"}, "field 'text': found '가', expected a dialogue such as <usr>"),
    ("sft", "가", "found '가', expected a JSON object"),
    ("sft", {"turns": 3}, r"field 'turns': found 3, expected a list of \{role, content\}"),
    ("sft", {"tokens": 3}, r"found \['tokens'\], expected fields that make a record, such as prompt \+ completion"),
    ("sft", {"instruction": " ", "output": "나"}, "field 'instruction': found ' '"),
    ("sft", {"prompt": "가", "chosen": "나", "rejected": "다"}, "expected an answer to learn from; this .* compares"),
    ("prompt", {"prompt": ""}, "field 'prompt': found ''"),
    ("prompt", {"completion": "가"}, "field 'prompt': found None, expected prompt . completion"),
    ("prompt", {"messages": []}, "found 0 turns, expected turns that end with the user's"),
    ("prompt", {"text": "<sys> 가"}, "found 0 turns, expected turns that end with the user's"),
    ("prompt", {"messages": [], "completion": "가", "label": True}, "found 0 turns"),
    ("prompt", {"messages": [], "label": True}, "found 0 turns, expected a dialogue that ends with an answer"),
    ("preference", {"prompt": "가", "chosen": "나"}, r"field 'rejected': found None, expected prompt \+ chosen \+ rej"),
    ("preference", {"prompt": "가", "chosen": "나", "rejected": "나"}, "a text that differs from the chosen one"),
    ("preference", {"prompt": "가", "completion_0": "나"}, "expected answers to compare: prompt . chosen"),
    ("preference", {"prompt": "가", "completion_0": "나", "ranking": [0]}, "expected two answers at least"),
    (
        "preference",
        {"prompt": "가", "completion_0": "나", "completion_2": "다", "ranking": [0, 1]},
        "field 'completion_2': found '다', expected answers numbered without a gap; there are completion_0, compl",
    ),
    *[
        ("preference", RANKED | {"ranking": ranking}, "field 'ranking': .* at least one answer that is better")
        for ranking in ([[0, 1]], [1], [])
    ],
    ("sft", {"prompt": "가\ud800", "completion": "나"}, "field 'prompt': .* expected text without half characters"),
    ("sft", {"messages": [{"role": "user", "content": "가"}]}, "found 1 turns, expected an even number"),
    ("sft", {"messages": ["가", "나"]}, "field 'messages': found .* expected a list of"),
    *[
        (
            "preference",
            RANKED | {"ranking": ranking},
            "field 'ranking': found .* expected indices from 0 to 1, best first, none twice",
        )
        for ranking in ([0, 0], [1, 3], "나가", [True, False], [0, 1, 2], [0, []], [[[0]], 1], [0.5, 1])
    ],
    ("preference", RANKED | {"ranking": None}, "expected what it says of the answers"),
    (
        "preference",
        RANKED | {"completion_1": "나", "ranking": [0, 1]},
        "field 'completion_1': found '나', expected a text that no other answer has",
    ),
]
GOOD = {
    "sft": {"prompt": "가", "completion": "나"},
    "prompt": {"prompt": "가", "tokens": 3},
    "preference": {"prompt": "가", "chosen": "다", "rejected": "라"},
}


@pytest.mark.parametrize(("kind", "record", "message"), BROKEN)
def test_broken_record_says_where_and_what(write, kind, record, message):
    path = write("data.jsonl", "[\n\n" + json.dumps(GOOD[kind]) + ",\n" + json.dumps(record, indent=1) + "]")
    line = path + r", line 4 \(record 1\): "
    with pytest.raises(UserError, match=line + ".*" + message):
        parsed(path, kind)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "가"},\n {"prompt" "나"}]', r"line 2 \(record 1\): broken JSON"),
        ('[{"prompt": "가"}\n\n {"prompt": "나"}]', "line 3: found .* expected ',' or '\\]' after record 0"),
        ('[{"prompt": "가"}', "expected ',' or '\\]' after record 0"),
        ('[{"prompt": "가"}]\n[1]', "line 2: found '.1.' after the JSON array, expected nothing"),
        ('{"prompt": "가"}\n{"prompt": }', r"line 2 \(record 1\): field .* broken JSON.*a JSON object in one line"),
        ('{"prompt": "가", "prompt": "나"}', "field 'prompt' is there twice"),
        ('[{"prompt": "가", "tokens": 1e999}]', r"line 1 \(record 0\): broken JSON: the number .1e999. is too large"),
        ('[{"prompt": NaN}]', r"line 1 \(record 0\): broken JSON: NaN is not JSON"),
        ('[{"prompt": ' + "9" * 5000 + "}]", r"line 1 \(record 0\): broken JSON: Exceeds the limit"),
        ("[" * 100_000, r"line 1 \(record 0\): broken JSON: nested too deeply"),
        ('"prompt": "가"}]', "line 1: found .*, expected a JSON array"),
        ("<사람>: 가", "line 1: found .*, expected a JSON array"),
        ("\n \n", "is empty"),
        ("", "is empty"),
        ("Q,A\r\n가,나,다\r\n", r"line 2 \(record 0\).*found 3 cells, expected 2 cells: Q,A"),
        ('Q,A\n가,"나\n다\n', "line 2: a quote is opened here and not closed"),
        ('Q,A\n가,"나"다\n', r"line 2 \(record 0\).*broken CSV"),
        ("<<start conversation>>\n안녕", "line 2: found '안녕', expected '<사람>:' or '<챗봇>:'"),
    ],
    ids=lambda value: value[:30],
)
def test_broken_file_says_where_and_what(write, content, message):
    with pytest.raises(UserError, match=message):
        parsed(write("data.jsonl", content), "prompt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<<start conversation>>\n<사람>: 안녕", "found 1 turns, expected an even number"),
        ("<<start conversation>>\n<챗봇>: 안녕\n<사람>: 응", "turn 0': found '<챗봇>', expected user"),
        ("<<start conversation>>\n<사람>:\n<챗봇>: 응", "turn 0': found '', expected a non-empty string"),
        ("<<start conversation>>", "found 0 turns"),
    ],
)
def test_broken_dialogue(write, content, message):
    with pytest.raises(UserError, match=message):
        parsed(write("data.jsonl", content), "sft")


def test_missing_and_non_utf8_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl: can't be read: No such file"):
        list(read_records("nowhere.jsonl"))
    (tmp_path / "euc.jsonl").write_bytes("[{'prompt': '안녕'}]".encode("euc-kr"))
    with pytest.raises(UserError, match=r"line 1: not UTF-8 at byte 13 of the line. As CP949 .*안녕.*encoding: cp949"):
        list(read_records(tmp_path / "euc.jsonl"))
    (tmp_path / "utf16.jsonl").write_text('[{"prompt": "안녕"}]', encoding="utf-16")
    with pytest.raises(UserError, match="is UTF-16"):
        list(read_records(tmp_path / "utf16.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress('{"prompt": "안녕"}\n'.encode() * 99)[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl.gz, line \d+: can't be read on"):
        list(read_records(tmp_path / "cut.jsonl.gz"))


def test_formats_are_told_from_the_bytes(tmp_path):
    lines = b'\xef\xbb\xbf{"prompt": "\xea\xb0\x80"}\r\n'
    (tmp_path / "a.csv").write_bytes(gzip.compress(lines))
    found = file_format(tmp_path / "a.csv")
    assert (found.shape, found.bom, found.crlf, found.gzip) == ("lines", True, True, True)
    assert parsed(tmp_path / "a.csv", "prompt") == [Prompt("가")]
    (tmp_path / "b.json").write_text("\nQ,A,label\n", encoding="utf-8")
    assert file_format(tmp_path / "b.json").shape == "csv"


def test_csv_and_plain_text(write):
    csv_file = write("chat.txt", 'Q,A,label\r\n"가, 나","다\r\n""라""",0\r\n')
    (raw,) = read_records(csv_file)
    assert raw.fields == {"Q": "가, 나", "A": '다\r\n"라"', "label": "0"}
    assert parse(raw, "sft") == [Dialogue(("가, 나", '다\r\n"라"'))]
    assert parse(raw, "prompt") == [Prompt("가, 나")]
    text = write("seed.jsonl", "가\n\n나, 다\n")
    assert [raw.fields["prompt"] for raw in read_records(text)] == ["가", "", "나, 다"]  # an empty line is a record


def test_what_looks_like_another_shape(write):
    """A prompt may begin with a bracket, and a CSV file may have a column of its own, or one column."""
    prompts = [raw.fields for raw in read_records(write("a.txt", "[긴급] 도와줘\n[안내] 뭐야\n"))]
    assert prompts == [{"prompt": "[긴급] 도와줘"}, {"prompt": "[안내] 뭐야"}]
    rows = [raw.fields for raw in read_records(write("b.csv", 'id,prompt\n1,"가, 나"\n'))]
    assert rows == [{"id": "1", "prompt": "가, 나"}]
    assert parsed(write("c.csv", 'prompt\n"가, 나"\n'), "prompt") == [Prompt("가, 나")]
    assert parsed(write("d.json", '[\n\n{"prompt": "가"}]'), "prompt") == [Prompt("가")]


def test_a_pipe_is_read_to_its_end(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lines = "".join(f"질문 {i}\n" for i in range(3000))
    writer = threading.Thread(target=lambda: pipe.write_text(lines, encoding="utf-8"))
    writer.start()
    records = list(read_records(pipe))
    writer.join()
    assert [raw.fields["prompt"] for raw in records] == lines.split("\n")[:-1]
    with pytest.raises(UserError, match="is a pipe"):
        file_format(pipe)


def test_a_dataset_of_the_hub_is_read_by_its_name(tmp_path, monkeypatch):
    """From a folder of the Hub's layout, which is all that can be had without a network."""
    folder = tmp_path / "owner/korean"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"prompt": "가", "completion": "나"}\n{"prompt": "다"}\n', encoding="utf-8")
    (folder / "test.jsonl").write_text('{"prompt": "라"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    rows = list(read_records("owner/korean"))
    assert [row.fields for row in rows] == [{"prompt": "가", "completion": "나"}, {"prompt": "다", "completion": None}]
    assert str(rows[1].source) == "owner/korean, record 1"
    assert parsed("owner/korean:test", "prompt") == [Prompt("라")]
    with pytest.raises(UserError, match=r"owner/nothing: there is no such file, and `datasets` can't load it"):
        list(read_records("owner/nothing"))


def test_broken_records_are_refused_or_listed(write, tiny_tokenizer):
    records = [{"prompt": "가나다"}] + [{"prompt": ""}] * 7
    path = write("ppo.jsonl", json.dumps(records))
    with pytest.raises(
        UserError,
        match=r"7 of 8 records can't be used:\n(.*\n){3} +... and 4 more .* 7 in all\n.*invalid_records: skip",
    ):
        build_dataset([path], "ppo", tiny_tokenizer)
    skip = DataArguments(invalid_records="skip")
    dataset, report = build_dataset([path], "ppo", tiny_tokenizer, options=skip)
    assert (len(dataset), len(report.left_out)) == (1, 7)
    assert str(report).splitlines()[6].startswith(f"left out: {path}, line 1 (record 7): field 'prompt'")
    with pytest.raises(UserError, match="no prompt record in"):
        build_dataset([write("b.jsonl", '[{"prompt": ""}]')], "ppo", tiny_tokenizer, options=skip)


def test_a_row_that_is_too_long_is_refused_unless_asked_for(write, tiny_tokenizer):
    path = write(
        "sft.jsonl", json.dumps([{"prompt": "가", "completion": "나"}, {"prompt": "가", "completion": "나 " * 50}])
    )
    rows = [encode_dialogue(tiny_tokenizer, conversation("가", text)) for text in ("나", "나 " * 50)]
    assert len(rows[0][0]) < 40 < len(rows[1][0])
    message = rf"1 of 2 records .*\n.*record 1\).*found {len(rows[1][0])} tokens, expected at most 40 tokens"
    with pytest.raises(UserError, match=message + r"\n.*`overlong: drop`"):
        build_dataset([path], "sft", tiny_tokenizer, max_length=40)

    dataset, report = build_dataset([path], "sft", tiny_tokenizer, 40, DataArguments(overlong="drop"))
    assert (dataset["input_ids"][:], dataset["labels"][:]) == ([rows[0][0]], [rows[0][1]])
    assert [error.source.index for error in report.left_out] == [1]

    dataset, report = build_dataset([path], "sft", tiny_tokenizer, 40, DataArguments(overlong="truncate"))
    assert dataset["input_ids"][:] == [rows[0][0], rows[1][0][:40]]
    assert dataset["labels"][:] == [rows[0][1], rows[1][1][:40]]
    assert ([error.source.index for error in report.in_part], report.left_out) == ([1], [])
    assert str(report).startswith(f"kept in part: {path}, line 1 (record 1)")


def test_a_cut_that_leaves_nothing_to_learn_is_left_out(write, tiny_tokenizer):
    sft = [{"prompt": "가 " * 50, "completion": "나"}, {"prompt": "가", "completion": "나"}]
    rankings = [{"prompt": "가", "chosen": "나 " * 50 + "다", "rejected": "나 " * 50}]
    rankings += [{"prompt": "가", "chosen": "다", "rejected": "나 " * 50}]
    truncate = DataArguments(overlong="truncate")
    for stage, records in (("sft", sft), ("reward", rankings)):
        path = write(f"{stage}.jsonl", json.dumps(records))
        dataset, report = build_dataset([path], stage, tiny_tokenizer, 40, truncate)
        assert len(dataset) == 1
        assert [error.source.index for error in report.left_out] == [0]
    assert [error.source.index for error in report.in_part] == [1]  # its rejected answer is long, its chosen one is not
    short = len(encode_dialogue(tiny_tokenizer, conversation("가", "다"))[0])
    assert [len(ids) for ids in dataset["completion_ids"][0]] == [short, 40]
    assert (dataset["ranks"][0], dataset["length"][0]) == ([0, 1], 40)


def test_a_ranking_keeps_the_completions_that_fit(write, tiny_tokenizer):
    completions = {"completion_0": "나", "completion_1": "다 " * 50, "completion_2": "라"}
    path = write("rm.jsonl", json.dumps([{"prompt": "가", **completions, "ranking": [1, 0, 2]}]))
    dataset, report = build_dataset([path], "reward", tiny_tokenizer, 40, DataArguments(overlong="drop"))
    ids = [encode_dialogue(tiny_tokenizer, conversation("가", text))[0] for text in ("나", "라")]
    assert dataset[:] == {"completion_ids": [ids], "ranks": [[0, 1]], "length": [max(map(len, ids))]}
    assert str(report).startswith(f"kept in part: {path}, line 1 (record 0)")


def test_only_ranked_completions_count_and_equal_tokens_are_kept(write, shared):
    """kogpt2 reads NFKC, so two texts can have the same ids. Such a pair teaches nothing; it is not lost in silence."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    records = [
        {"prompt": "가", "chosen": "네! 좋아요", "rejected": "네！ 좋아요"},
        {"prompt": "가", "completion_0": "나", "completion_1": "다", "completion_2": "라 " * 60, "ranking": [0, 1]},
    ]
    dataset, report = build_dataset([write("rm.jsonl", json.dumps(records))], "reward", tokenizer, 40)
    assert (len(dataset), str(report)) == (2, "")
    first = dataset["completion_ids"][0]
    assert first[0] == first[1]


def test_a_prompt_is_cut_at_its_start_inside_the_template(write, tiny_tokenizer):
    prompt = "대한민국의 수도는 어디인가요? 하나 더하기 둘은 얼마예요? 강아지는 어떻게 울어요? " * 6
    prompt = prompt.strip()
    path = write("ppo.jsonl", json.dumps([{"prompt": prompt}, {"prompt": "가"}]))
    dataset, report = build_dataset([path], "ppo", tiny_tokenizer, 60, DataArguments(overlong="truncate"))
    text = tiny_tokenizer.decode(dataset["input_ids"][0])
    head, tail = render(tiny_tokenizer, [{"role": "user", "content": "|"}], prompt=True).split("|")
    assert text.startswith(head)
    assert text.endswith(tail)
    kept = text.removeprefix(head).removesuffix(tail)
    assert prompt.endswith(kept)
    assert len(dataset["input_ids"][0]) == 60
    assert len(report.in_part) == 1
    with pytest.raises(UserError, match=r"no prompt record of .* fits max_length"):
        build_dataset([path], "ppo", tiny_tokenizer, 5, DataArguments(overlong="truncate"))


def test_a_ranking_is_one_row(write, tiny_tokenizer):
    """Whole, so that no two of its pairs can be in different sets; unranked completions are left out."""
    completions = {f"completion_{i}": text for i, text in enumerate("나다라")}
    records = [
        {"prompt": "가", "chosen": "나", "rejected": "다"},
        {"prompt": "가", **completions, "ranking": [0, 2, 1]},
        {"prompt": "가", **completions, "ranking": [2, [0, 1]]},
        {"prompt": "가", **completions, "ranking": [2, 0]},
    ]
    path = write("rm.jsonl", json.dumps(records))
    dataset, _ = build_dataset([path], "reward", tiny_tokenizer)
    ids = {text: encode_dialogue(tiny_tokenizer, conversation("가", text))[0] for text in "나다라"}
    assert dataset["completion_ids"][:] == [
        [ids[text] for text in order] for order in ("나다", "나라다", "라나다", "라나")
    ]
    assert dataset["ranks"][:] == [[0, 1], [0, 1, 2], [0, 1, 1], [0, 1]]
    upside_down = DataArguments(ranking_order="rank_of")
    path = write("one.jsonl", json.dumps([{"prompt": "가", **completions, "ranking": [1, 2, 0]}]))
    dataset, _ = build_dataset([path], "reward", tiny_tokenizer, options=upside_down)
    assert dataset["completion_ids"][:] == [[ids[text] for text in "라나다"]]


def test_tokenized_rows_are_cached_until_something_changes(write, tiny_tokenizer, monkeypatch):
    calls = []

    def spy(tokenizer, prompts):
        calls.append(len(prompts))
        return [[1, 2, len(messages[-1]["content"])] for messages in prompts]

    monkeypatch.setattr("kochat_trl.rows.rows.encode_prompts", spy)
    path = write("ppo.jsonl", '[{"prompt": "캐시 하나"}, {"prompt": "캐시 둘입니다"}]')
    first, _ = build_dataset([path], "ppo", tiny_tokenizer)
    again, _ = build_dataset([path], "ppo", tiny_tokenizer)
    assert first[:] == again[:] == {"input_ids": [[1, 2, 5], [1, 2, 7]]}
    assert calls == [2]
    build_dataset([write("ppo.jsonl", '[{"prompt": "캐시 셋"}]')], "ppo", tiny_tokenizer)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", tiny_tokenizer.chat_template + " ")
    build_dataset([path], "ppo", tiny_tokenizer)
    assert calls == [2, 1, 1]


@pytest.mark.parametrize("name", ["rows.py", "encode.py"])
def test_rows_are_made_anew_by_other_code(write, tiny_tokenizer, monkeypatch, tmp_path, name):
    """The cache is keyed by all files that make a row of a record."""
    room = tmp_path / "rows"
    shutil.copytree(Path(rows.__file__).parent, room)
    monkeypatch.setattr(rows, "__file__", str(room / "rows.py"))
    path = write("ppo.jsonl", '[{"prompt": "같은 것"}]')
    made = [build_dataset([path], "ppo", tiny_tokenizer)[0].cache_files for _ in range(2)]
    (room / name).write_text((room / name).read_text(encoding="utf-8") + "\n# other code\n", encoding="utf-8")
    made.append(build_dataset([path], "ppo", tiny_tokenizer)[0].cache_files)
    assert made[0] == made[1] != made[2]


def test_a_prompt_that_the_template_writes_too_is_cut_in_its_own_place():
    tokenizer = byte_tokenizer(CHATML, "<eos>", "<|im_start|>", "<|im_end|>", eos_token="<eos>")
    whole = encode_prompts(tokenizer, [conversation("assistant")])[0]
    cut = shorten_prompt(tokenizer, conversation("assistant"), len(whole) - 1)
    assert tokenizer.decode(cut) == "<|im_start|>user\nssistant<|im_end|>\n<|im_start|>assistant\n"
