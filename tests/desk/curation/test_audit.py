"""Faults counted and located, on small files and on the real ones; which reading the rankings support; the report."""

import gzip
import io
import json
import subprocess
import sys
from functools import cache

from kochat_trl.desk.curation.audit import BINS, KEPT, check_files, measure
from kochat_trl.desk.curation.audit_view import print_report
from kochat_trl.desk.curation.which_reading import TOGETHER, judge_reading
from kochat_trl.desk.sample.sample import write_sample_data
from kochat_trl.errors import UserError
from kochat_trl.models.tokenizer import CHAT_TEMPLATE, load_tokenizer
from kochat_trl.rows.encode import conversation, encode_dialogue

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def ranked(ranking, *completions, prompt="질문"):
    return {"prompt": prompt} | {f"completion_{i}": text for i, text in enumerate(completions)} | {"ranking": ranking}


def found(file):
    """Every finding of a file: (level, fault) → the records."""
    return {(finding.level, finding.fault): finding.records for finding in file.findings}


def printed(report, width=100):
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console)
    return console.file.getvalue()


@pytest.fixture
def check(write):
    """Audit records, written as JSON lines."""
    return lambda records, **kwargs: check_files([write("data.jsonl", lines(records))], **kwargs).files[0]


# --- Each fault ---------------------------------------------------------------------------------

TEXTS = {
    "swallowed": "무엇?', 'completion': '답",
    "escape": "첫째\\n둘째",
    "control": "가\x07나",
    "zero_width": "가\u200b나",
    "no_break_space": "가\u00a0나",
    "not_nfc": "\u1100\u1161",
    "special_token": "가</s>",
    "stray_quote": "'가나다",
    "replacement": "가\ufffd",
    "no_hangul": "I do not know.",
}


@pytest.mark.parametrize("fault", TEXTS)
def test_a_fault_of_a_text(check, fault):
    bad = TEXTS[fault]
    answers = [{"prompt": "하나", "completion": "둘"}, {"prompt": "셋", "completion": bad}]
    assert found(check(answers)) == {("warning", fault): [1]}
    assert found(check([{"prompt": "하나"}, {"prompt": bad}])) == {("warning", fault): [1]}
    turns = [{"role": "user", "content": "가"}, {"role": "assistant", "content": bad}]
    once = {("warning", fault): [0]}  # both answers of the record have it
    assert found(check([{"messages": [*turns, *turns]}])) == once


def test_hangul_is_asked_of_what_the_file_is_for(check):
    record = [{"prompt": "What?", "completion": "답"}]
    assert found(check(record)) == {}
    assert found(check(record, kind="prompt")) == {("warning", "no_hangul"): [0]}
    assert check([{"prompt": "가", "chosen": "나", "rejected": "no"}]).hangul == {"prompts": 1, "answers": 0.5}


def test_errors_say_what_is_wrong(write):
    records = [
        ranked([0, 1], "가", "나"),
        ranked([0, 1], "가", "가", prompt="둘"),
        ranked([0, 1], "가", " ", prompt="셋"),
        ranked([0, 2], "가", "나", prompt="넷"),
        ranked([[0, 1]], "가", "나", prompt="다섯"),
        ranked([[0, 1], 2], "가", "나", "다", prompt="여섯"),
    ]
    file = check_files([write("rm.jsonl", lines(records) + '{"prompt": \n')]).files[0]
    assert found(file) == {
        ("error", "broken"): [3, 6],
        ("error", "empty"): [2],
        ("error", "equal"): [1],
        ("error", "tied"): [4],
        ("warning", "tied"): [5],
    }
    assert (file.records, file.usable, file.errors, file.warnings) == (7, 2, 5, 1)
    assert file.findings[0].messages[0].startswith("line 4 (record 3): field 'ranking': found [0, 2], expected indices")
    assert "broken JSON" in file.findings[0].messages[1]
    assert file.count("tied") == 2
    assert file.findings[4].messages == []


def test_repeats(check):
    records = [
        {"prompt": "가 나", "completion": "답"},
        {"completion": "답", "prompt": "가 나"},  # the same, in another order
        {"prompt": "가  나", "completion": "답"},  # nearly
        {"prompt": "가 나", "completion": "다른 답"},  # the prompt only
        {"prompt": "", "completion": "답"},
        {"prompt": "", "completion": "답"},  # of no use, so it repeats nothing
        {"prompt": "다", "completion": "답"},
    ]
    assert found(check(records)) == {
        ("error", "empty"): [4, 5],
        ("warning", "duplicate"): [1],
        ("warning", "near_duplicate"): [2],
        ("warning", "repeated_prompt"): [1, 2, 3],
    }
    twice = [ranked([0, 1], "가", "나"), ranked([1, 0], "가", "나"), ranked([1, 0], "가", "나")]
    assert found(check(twice))["warning", "duplicate"] == [2]  # another ranking makes another record
    twice = [ranked([0, 1], "가", "나"), ranked([1, 0], "가 ", "나"), ranked([1, 0], "가", "나")]
    assert found(check(twice))["warning", "near_duplicate"] == [2]
    twice = [{"prompt": prompt} for prompt in ("가 나", "가  나", "가  나")]
    assert found(check(twice))["warning", "duplicate"] == [2]


def test_contradictions_across_shapes(check):
    records = [
        ranked([0, 1, 2], "좋음", "보통", "나쁨"),
        {"prompt": "질문", "chosen": "좋음", "rejected": "나쁨"},  # agrees
        {"prompt": "질문", "chosen": "나쁨 ", "rejected": "좋음"},
        {"prompt": "다른 질문", "chosen": "나쁨", "rejected": "좋음"},
        ranked([[0, 1], 2], "나쁨", "없음", "보통"),
    ]
    assert found(check(records)) == {
        ("warning", "repeated_prompt"): [1, 2, 4],
        ("warning", "contradiction"): [0, 1, 2, 4],  # both sides: either may be wrong
        ("warning", "tied"): [4],
    }
    alike = [ranked([0, 1], "가", "가 "), ranked([1, 0], "가", "가 ")]
    assert check(alike).count("contradiction") == 0


def test_three_cycles(check):
    rankings = [[0, 1, 2], [1, 2, 0], [2, 1, 0], [2, 0, 1], [1, 0, 2], [0, 2, 1]]
    file = check([ranked(r, "가", "나", "다", prompt=f"질문 {r}") for r in rankings])
    assert found(file) == {("warning", "three_cycle"): [1, 3]}
    assert file.reading.rankings == {str(ranking): 1 for ranking in rankings}
    # Of four completions; some aren't ranked, or tied.
    rankings = [[1, 0, 3, 2], [1, 2, 3, 0], [1, 2, 0], [1, [2, 3], 0]]
    file = check([ranked(r, "가", "나", "다", "라", prompt=f"질문 {r}") for r in rankings])
    assert found(file) == {("warning", "three_cycle"): [1], ("warning", "tied"): [3]}
    assert [finding.fault for finding in file.findings] == ["tied", "three_cycle"]  # as `FAULTS` has them
    assert check([{"prompt": "가", "chosen": "나", "rejected": "다"}]).reading is None


def test_rankings_are_read_in_the_given_order(check):
    records = [ranked([0, 1, 1], "가", "나", "다"), ranked([2, 0, None], "가", "나", "다", prompt="둘")]
    assert found(check(records)) == {("error", "broken"): [0, 1]}
    assert found(check(records, order="rank_of")) == {("warning", "tied"): [0]}
    turned = [ranked([1, 2, 0], "가", "나", "다"), {"prompt": "질문", "chosen": "나", "rejected": "다"}]
    assert check(turned).count("contradiction") == 0
    assert check(turned, order="rank_of").count("contradiction") == 2


def test_the_first_records_and_all_of_the_count(check):
    file = check([{"prompt": "가"}, *[{"prompt": ""}] * 30])
    assert file.count("empty") == 30
    assert file.findings[0].records == list(range(1, KEPT + 1))
    assert len(file.findings[0].messages) == KEPT
    assert (file.errors, file.warnings) == (30, 0)


# --- Files --------------------------------------------------------------------------------------


def test_kind_is_what_most_records_are(check):
    records = [{"prompt": "가"}, {"prompt": "나", "completion": "다"}, {"prompt": "라", "completion": "마"}]
    file = check(records)
    assert (file.kind, found(file)) == ("sft", {("error", "broken"): [0]})
    assert "field 'completion': found None" in file.findings[0].messages[0]
    assert check(records, kind="prompt").usable == 3
    assert check(records, kind="preference").errors == 3
    unknown = check([{"text": "가"}])
    assert (unknown.kind, unknown.errors) == (None, 1)


def test_format_and_turns(write, tmp_path):
    talk = '<<start conversation>>\n<사람>: \'가\n<챗봇>: 나\n<사람>: "가"\n<챗봇>: 나\n'
    talk += "<<start conversation>>\n<사람>: 다\n<챗봇>: 라\n"
    (tmp_path / "talk.gz").write_bytes(gzip.compress(("\ufeff" + talk).replace("\n", "\r\n").encode()))
    report = check_files([str(tmp_path / "talk.gz"), write("talk.txt", talk)])
    first, second = report.files
    for file, changed in ((first, True), (second, False)):
        assert file.format.shape == "dialogues"
        assert (file.format.bom, file.format.crlf, file.format.gzip) == (changed,) * 3
        assert (file.kind, file.turns, file.begin_with_quote) == ("sft", {"2": 1, "4": 1}, 2)
    text = printed(report)
    assert "sft · dialogues · BOM · CRLF · GZIP · 2 records, 2 usable · 1 of 2 turns · 1 of 4 turns" in text
    assert "sft · dialogues · 2 records, 2 usable · 1 of 2 turns · 1 of 4 turns" in text


def test_a_file_that_breaks_off(write):
    broken = write("a.json", '[{"prompt": ""},\n{"prompt": "나"},\n{"prompt": "나"},\n{"prompt" "다"}]')
    report = check_files([broken, "nowhere.jsonl", write("c.jsonl", lines([{"prompt": "라"}]))])
    first, second, third = report.files
    assert "line 4 (record 3): broken JSON" in first.unreadable
    assert (first.records, first.usable, first.errors, first.warnings) == (3, 2, 1, 1)
    assert first.count("duplicate") == 1
    assert "nowhere.jsonl: can't be read" in second.unreadable
    assert (second.records, second.format, second.kind) == (0, None, None)
    assert (third.errors, third.unreadable, third.usable) == (0, None, 1)
    assert (report.errors, report.warnings) == (3, 1)  # one record, two files


def test_lengths():
    lengths = measure([*range(100), 1000])
    assert (lengths.count, lengths.min, lengths.median, lengths.p95, lengths.max) == (101, 0, 50, 95, 1000)
    assert lengths.mean == pytest.approx((99 * 50 + 1000) / 101)
    assert lengths.bin_width == 5  # 24 bins of 5 hold 99 % of them
    assert lengths.bins == [5] * 20 + [0, 0, 0, 1]
    assert len(lengths.bins) == BINS
    assert measure([3]).bins == [0, 0, 0, 1] + [0] * 20


def test_lengths_of_prompts_and_answers(check):
    file = check(
        [{"instruction": "가나", "input": "다라마", "output": "바"}, {"instruction": "가" * 10, "output": " "}]
    )
    assert {name: (each.count, each.max) for name, each in file.lengths.items()} == {
        "prompts, characters": (3, 10),
        "answers, characters": (1, 1),
    }


def test_overlap(write):
    one = write("one.jsonl", lines({"prompt": prompt} for prompt in ["가 나", "다", "다", "", "라"]))
    other = write("other.jsonl", lines({"prompt": p, "completion": "답"} for p in ["다", "가\u00a0나", "마", "바"]))
    apart = write("apart.jsonl", lines([{"prompt": ""}, {"prompt": "사"}]))
    report = check_files([one, other, apart])
    (overlap,) = report.overlaps
    assert overlap.files == (one, other)
    assert (overlap.prompts, overlap.records, overlap.shares) == (2, (3, 2), (3 / 4, 2 / 4))
    assert found(report.files[0])["warning", "overlap"] == [0, 1, 2]
    assert found(report.files[1])["warning", "overlap"] == [0, 1]
    assert report.files[2].count("overlap") == 0


# --- Which reading ------------------------------------------------------------------------------


def rewritten(path, change):
    records = json.loads(path.read_text())
    for record in records:
        record["ranking"] = change(record["ranking"])
    path.write_text(json.dumps(records, ensure_ascii=False))
    return str(path)


def test_the_sample_data_says_how_it_was_ranked(tmp_path):
    paths = write_sample_data(tmp_path, seed=0)
    report = check_files([str(paths["rm"]), str(paths["rm_eval"])])
    for file in report.files:
        assert (file.reading.verdict, file.reading.decided_by, file.alerts) == ("best_first", "has Hangul", [])
        assert sum(file.reading.rankings.values()) == file.records
        assert len(file.reading.rankings) == 6
    (wrong,) = check_files([str(paths["rm_eval"])], order="rank_of").files
    assert wrong.reading == file.reading
    assert "read as rank_of, but the answers say that they are best_first" in wrong.alerts[0]
    assert f"of {file.count('three_cycle'):,} records" in wrong.alerts[0]

    inverted = rewritten(paths["rm_eval"], lambda ranking: [ranking.index(i) for i in range(3)])
    report = check_files([inverted])
    (turned,) = report.files
    assert turned.reading.verdict == "rank_of"
    assert tuple(turned.reading.votes.values()) == tuple(file.reading.votes.values())[::-1]
    assert "`ranking_order: rank_of`" in turned.alerts[0]
    assert report.warnings == turned.warnings + 1
    assert check_files([inverted], order="rank_of").files[0].alerts == []


def test_four_records_tell_nothing(shared):
    """Two of them are 3-cycles, and by eye both are best first."""
    (file,) = check_files([str(shared / "data/kochatgpt/kochatgpt_2_RM.excerpt.jsonl")]).files
    assert (file.records, file.usable) == (4, 4)
    assert list(file.reading.rankings) == ["[2, 1, 0]", "[2, 0, 1]", "[1, 2, 0]", "[1, 0, 2]"]
    assert file.reading.pairs["is longer"] == {"best_first": 4, "rank_of": 0}
    assert file.reading.pairs["has Hangul"] == {"best_first": 1, "rank_of": 0}
    assert (file.reading.p, file.reading.verdict, file.alerts) == (1, "can't be told", [])


def test_a_record_has_one_vote():
    """[2, 0, 1]: read as rank_of, completion 1 is the best and not the worst, in two pairs that tell the same."""
    record = ([2, 0, 1], ("한국어 답", "En", "또 한국어"))
    reading = judge_reading([record] * 7)
    assert reading.pairs["has Hangul"] == {"best_first": 14, "rank_of": 0}
    assert (reading.decided_by, reading.votes) == (TOGETHER, {"best_first": 7, "rank_of": 0})
    assert (reading.p, reading.verdict) == (2 / 2**7, "can't be told")
    reading = judge_reading([record] * 8)
    assert (reading.decided_by, reading.p, reading.verdict) == ("has Hangul", 2 / 2**8, "best_first")
    own_inverse = ([1, 0, 2], ("한국어 답", "한국어 답변", "English"))
    assert judge_reading([own_inverse] * 50).votes == {"best_first": 0, "rank_of": 0}


def test_hangul_decides_before_length():
    short = ([1, 2, 0], ("a long answer in English", "답", "another one"))  # 1 is the best, or the worst
    reading = judge_reading([short] * 10)
    assert reading.pairs["is longer"] == {"best_first": 0, "rank_of": 20}
    assert (reading.decided_by, reading.verdict) == ("has Hangul", "best_first")
    other = ([1, 2, 0], ("답 하나", "a long answer in English", "답 둘"))
    reading = judge_reading([short, other] * 10)
    assert (reading.decided_by, reading.p, reading.verdict) == ("has Hangul", 1, "can't be told")


def test_signs_together_where_all_is_hangul():
    """Longer against less repetition is a draw, and either alone is not enough; where they agree, they tell."""
    alone = ([1, 2, 0], ("답", "긴 답", "둘"))
    reading = judge_reading([alone] * 20)
    assert reading.pairs["is longer"] == {"best_first": 40, "rank_of": 0}
    assert (reading.votes, reading.verdict) == ({"best_first": 0, "rank_of": 0}, "can't be told")
    draw = ([1, 2, 0], ("답 둘", "답 답 답 답", "답"))
    assert judge_reading([draw] * 20).votes == {"best_first": 0, "rank_of": 0}
    agree = ([1, 2, 0], ("답 답", "서로 다른 낱말들", "둘 둘"))
    reading = judge_reading([agree] * 20 + [draw] * 20)
    assert (reading.decided_by, reading.votes["best_first"], reading.verdict) == (TOGETHER, 20, "best_first")


# --- Tokens -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def characters():
    """A tokenizer of single characters after NFKC, as kogpt2's does it; it doesn't know all of Hangul."""
    known = sorted(set(CHAT_TEMPLATE) | set("저도 반가워요.안녕로마숫자다IV"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **tokens)


def test_tokens(check, characters):
    records = [
        {"prompt": "반가워요", "completion": "저도 반가워요."},
        {"prompt": "반가워", "completion": "저도 반가워요." * 3},
        {"prompt": "Ⅳ", "completion": "로마 숫자다"},
        {"prompt": "안녕", "completion": "뷁"},
    ]
    template = len("### Instruction(명령어):\n\n\n### Response(응답):") + 1  # and </s>
    file = check(records, tokenizer=characters, max_length=template + 23)
    assert found(file) == {
        ("warning", "unknown_token"): [3],
        ("warning", "round_trip"): [2, 3],
        ("warning", "overlong"): [1],
    }
    assert {name: (each.count, each.max) for name, each in file.lengths.items()} == {
        "prompts, characters": (4, 4),
        "answers, characters": (4, 24),
        "prompts, tokens": (4, 4),
        "answers, tokens": (4, 24),
        "with template, tokens": (4, template + 27),
    }
    assert file.lengths["with template, tokens"].mean == template + (12 + 27 + 8 + 3) / 4  # Ⅳ is two
    assert check(records, tokenizer=characters, max_length=template + 27).count("overlong") == 0

    file = check(records, kind="prompt", tokenizer=characters, max_length=template + 2)
    assert file.lengths["with template, tokens"].max == template - 1 + 4
    assert found(file)["warning", "overlong"] == [0]
    assert check(records, tokenizer=characters).count("overlong") == 0


def test_many_texts_are_tokenized_in_batches(check, characters, monkeypatch):
    monkeypatch.setattr("kochat_trl.desk.curation.finders.BATCH", 3)
    records = [{"prompt": "반" * n, "completion": "뷁" if n == 6 else "가"} for n in range(1, 9)]
    file = check(records, tokenizer=characters)
    assert (file.lengths["prompts, tokens"].count, file.lengths["prompts, tokens"].mean) == (8, 4.5)
    assert found(file)["warning", "unknown_token"] == [5]


def test_the_longest_row_of_a_record_counts(check, characters):
    """Completion 1 isn't ranked, and makes no row."""
    record = ranked([2, 0], "반가워요.", "반가워요." * 9, "안녕", prompt="저")
    lengths = check([record], tokenizer=characters).lengths["with template, tokens"]
    (ids, _) = encode_dialogue(characters, conversation("저", "반가워요."))
    assert (lengths.count, lengths.max) == (1, len(ids))


def test_half_characters_are_an_error_and_no_crash(write, characters):
    path = write("half.jsonl", '{"prompt": "가", "completion": "\\ud83d"}\n{"prompt": "나", "completion": "다"}')
    report = check_files([path], tokenizer=characters)
    assert found(report.files[0])["error", "broken"] == [0]
    assert "\\ud83d" in json.dumps(report.to_json())


def test_a_length_takes_a_tokenizer(write):
    with pytest.raises(UserError, match="takes a tokenizer"):
        check_files([write("a.jsonl", lines([{"prompt": "가"}]))], max_length=10)


# --- The report ---------------------------------------------------------------------------------


def test_json_holds_the_report(write):
    files = [
        write("rm.json", json.dumps([ranked([1, 2, 0], "가", "나", "다"), ranked([5, 0], "가", "나")])),
        write("p.txt", "질문\n둘\n"),
        "nowhere.json",
    ]
    report = check_files(files)
    told = json.loads(json.dumps(report.to_json()))
    assert (told["errors"], told["warnings"]) == (report.errors, report.warnings) == (2, 2)
    assert [file["path"] for file in told["files"]] == files
    rm = told["files"][0]
    assert (rm["kind"], rm["records"], rm["format"]["shape"]) == ("preference", 2, "array")
    assert rm["findings"][0]["fault"] == "broken"
    assert rm["findings"][0]["records"] == [1]
    assert rm["reading"]["rankings"] == {"[1, 2, 0]": 1}
    assert told["overlaps"] == [{"files": files[:2], "prompts": 1, "records": [1, 1], "shares": [1, 0.5]}]


def test_print_shows_what_is_there_and_nothing_else(write):
    report = check_files([write("rm.jsonl", lines([ranked([1, 2, 0], "가", "[b]다[/b]", "나"), {"prompt": ""}]))])
    text = printed(report)
    assert "preference · JSON lines · 2 records, 1 usable" in text
    assert [line.split()[:3] for line in text.splitlines() if line.strip().startswith(("error", "warning"))] == [
        ["error", "1", "broken"],
        ["warning", "1", "three_cycle"],
    ]
    assert "line 2 (record 1): field" in text
    assert "[1, 2, 0] 1" in text
    assert "can't be told: 0 records for best_first, 0 for rank_of by 'all signs together' (p = 1)" in text
    assert "the better one is longer: 2 pairs for best_first, 0 for rank_of" in text
    assert "1 error, 1 warning." in text
    assert "kochat data clean FILE --output" in text
    clean = printed(check_files([write("p.txt", "하나\n둘\n")]))
    assert clean.rstrip().endswith("0 errors, 0 warnings.")
    assert "level" not in clean


def test_print_says_loudly_what_is_upside_down_or_unreadable(tmp_path):
    path = write_sample_data(tmp_path, seed=1)["rm_eval"]
    text = " ".join(printed(check_files([str(path), "nowhere.json"], order="rank_of")).split())
    assert "warning: The rankings are read as rank_of, but the answers say that they are best_first" in text
    assert "error: nowhere.json: can't be read: No such file" in text


def test_print_is_brief_about_many_files(write):
    files = [write(f"{i}.txt", "하나\n'둘\n") for i in range(4)]
    full, brief = printed(check_files(files[:3])), printed(check_files(files))
    assert full.count("median") == 3
    assert "median" not in brief
    assert brief.count("stray_quote") == 4
    assert "2 prompts in two files; records of 0.txt 2 (100.00%), of 1.txt 2 (100.00%)" in brief


def test_bars(write):
    path = write("p.txt", "".join("가" * length + "\n" for length in [1] * 8 + [2] * 4 + [4]))
    assert "0  █▄ ▁" in printed(check_files([path]))


def test_a_pair_with_a_ranking_beside_it(tmp_path):
    """`chosen` and `rejected` count, and the `ranking` is some field of the user's own."""
    record = {"prompt": "가나다", "chosen": "나다라", "rejected": "다라마", "ranking": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(record), encoding="utf-8")
    report = check_files([str(tmp_path / "a.jsonl")])
    assert (report.errors, report.warnings, report.files[0].usable) == (0, 0, 1)


def test_import_is_quick():
    heavy = "{'torch', 'transformers', 'datasets', 'rich'}"
    code = f"import sys, kochat_trl.desk.curation.audit; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- The real files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared):
    """Audit files of shared/data; with kogpt2's tokenizer if asked to."""

    @cache
    def check(*names, tokens=False):
        tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer")) if tokens else None
        return check_files([str(shared / "data" / name) for name in names], tokenizer=tokenizer)

    return check


def numbers(lengths):
    return lengths.median, lengths.p95, lengths.max


def test_the_real_prompts(real):
    report = real("kochatgpt/kochatgpt_3_PPO.jsonl", tokens=True)
    (file,) = report.files
    assert (file.kind, file.format.shape, file.records, file.usable) == ("prompt", "array", 12_000, 11_997)
    assert found(file)["error", "empty"] == [6330, 6699, 7405]
    assert (report.errors, file.count("duplicate"), file.count("swallowed")) == (3, 52, 25)
    assert file.count("repeated_prompt") == 52
    assert file.count("near_duplicate") == 0
    assert file.begin_with_quote == 26
    assert numbers(file.lengths["prompts, tokens"]) == (9, 20, 118)
    assert numbers(file.lengths["with template, tokens"]) == (35, 46, 144)
    assert (file.count("round_trip"), file.count("unknown_token")) == (39, 28)


@pytest.mark.parametrize("width", [80, 100])
def test_the_real_prompts_fit_a_screen(real, width):
    text = printed(real("kochatgpt/kochatgpt_3_PPO.jsonl", tokens=True), width)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= width
    assert "6330, 6699, 7405 " in text
    assert "259, 268, 2021, …" in text


def test_the_real_dialogues(real):
    """The 145 to 431 tokens of these are of their lines in the file, speakers included; these rows have a template."""
    (file,) = real("kochatgpt/kochatgpt_1_SFT_conversation.jsonl", tokens=True).files
    assert (file.format.shape, file.records, file.usable, file.turns) == ("dialogues", 439, 439, {"8": 439})
    lengths = file.lengths["with template, tokens"]
    assert (lengths.count, lengths.min, lengths.max) == (439, 219, 503)


def test_the_real_seed(real):
    (file,) = real("kochatgpt/kochatgpt_seed_data.txt").files
    assert (file.format.shape, file.format.bom, file.records) == ("text", True, 12_000)
    assert (file.count("empty"), file.count("no_break_space")) == (3, 19)


def test_the_real_excerpt(real):
    (file,) = real("kochatgpt/kochatgpt_1_SFT.excerpt.jsonl").files
    assert (file.kind, file.records, file.count("stray_quote")) == ("sft", 4, 4)


def test_the_real_instructions_and_prompts(real):
    names = ["instruction_train", "instruction_test", "train_ppo", "test_ppo"]
    files = real(*[f"mygpt/{theme}_{name}.jsonl" for theme in ("ive", "kuksundo") for name in names]).files
    assert [file.records for file in files] == [223, 25, 480, 20, 311, 39, 627, 73]
    assert [file.kind for file in files] == ["sft", "sft", "prompt", "prompt"] * 2
    assert [file.count("not_nfc") for file in files] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert all(file.errors == 0 for file in files)


def test_the_real_pairs(real):
    """65 tokens is the mean of the longer row of each of the 526 pairs to train on."""
    report = real(*[f"mygpt/{name}_rm.jsonl" for name in ("ive_train", "kuksundo_train", "ive_test", "kuksundo_test")])
    assert [file.records for file in report.files] == [203, 323, 20, 27]
    assert [file.count("equal") for file in report.files] == [2, 0, 0, 0]
    train = real("mygpt/ive_train_rm.jsonl", "mygpt/kuksundo_train_rm.jsonl", tokens=True).files
    lengths = [file.lengths["with template, tokens"] for file in train]
    assert [each.count for each in lengths] == [201, 323]
    assert round(sum(each.mean * each.count for each in lengths) / 524) == 65
    assert max(each.max for each in lengths) == 118


def test_the_real_csv(real):
    (file,) = real("chatbot/ChatbotData.csv").files
    assert (file.kind, file.format.shape, file.format.crlf, file.records) == ("sft", "csv", True, 11_823)
    assert (file.count("repeated_prompt"), file.errors) == (161, 0)


def test_the_real_overlap(real):
    """The PPO prompts were taken from the seed file."""
    (overlap,) = real("kochatgpt/kochatgpt_3_PPO.jsonl", "kochatgpt/kochatgpt_seed_data.txt").overlaps
    assert overlap.records == (11_951, 11_951)
    assert overlap.prompts == 11_899
