"""What is said of a file as a whole, on small files and on the real ones; the report."""

import gzip
import json
import subprocess
import sys
from functools import cache

from kochat_trl.data.options import ReadingOptions
from kochat_trl.desk.curation.audit import BINS, check_files, measure
from kochat_trl.models.tokenizer import load_tokenizer
from tests.desk.curation.helpers import found, lines, printed, ranked

import pytest

# --- Files ----------------------------------------------------------------------------------------


def test_kind_is_what_most_records_are(check):
    records = [{"prompt": "가"}, {"prompt": "나", "completion": "다"}, {"prompt": "라", "completion": "마"}]
    file = check(records)
    assert (file.kind, found(file)) == ("sft", {("error", "broken"): [0]})
    assert "field 'completion': found None" in file.findings[0].messages[0]
    assert check(records, kind="prompt").usable == 3
    assert check(records, kind="preference").errors == 3
    unknown = check([{"tokens": 3}])
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
    assert "sft · dialogues · BOM · CRLF · GZIP · 2 records, 2 usable · dialogue · 1 of 2 turns · 1 of 4 turns" in text
    assert "sft · dialogues · 2 records, 2 usable · dialogue · 1 of 2 turns · 1 of 4 turns" in text


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


# --- The report -----------------------------------------------------------------------------------


def test_json_holds_the_report(write):
    files = [
        write("rm.json", json.dumps([ranked([1, 2, 0], "가", "나", "다", prompt="하나"), ranked([5, 0], "가", "나")])),
        write("p.txt", "하나\n둘\n"),
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


def test_a_pair_with_a_ranking_beside_it(check):
    """Which of the two is meant can't be told, but a person may say it."""
    record = {"prompt": "가나다", "chosen": "나다라", "rejected": "다라마", "ranking": 1}
    file = check([record])
    assert (file.kind, file.usable, found(file)) == ("preference", 0, {("error", "unclear"): [0]})
    assert "`columns: {ranking: ignore}`" in file.findings[0].messages[0]
    file = check([record], options=ReadingOptions(columns={"ranking": "ignore"}))
    assert (file.errors, file.warnings, file.usable, file.not_read) == (0, 0, 1, ["ranking"])


def test_shapes_are_counted_and_what_is_not_read_is_told(check):
    records = [
        {"prompt": "가", "completion": "나", "tokens": 3},
        {"instruction": "다", "output": "라", "mood": 7},
        {"messages": [{"role": "user", "content": "마"}, {"role": "assistant", "content": "바"}]},
        {"prompt": "사", "completion": ""},
    ]
    file = check(records)
    assert file.shapes == {"exchange": 2, "dialogue": 1}
    assert file.not_read == ["tokens", "mood"]
    file = check([{"prompt": "가", "completion": "나", "비고": "글"}])
    assert found(file) == {("error", "unclear"): [0]}
    assert "field '비고': found '글', expected a field that is known" in file.findings[0].messages[0]
    assert "--map 비고=" in file.findings[0].messages[0]


def test_import_is_quick():
    heavy = "{'torch', 'transformers', 'datasets', 'rich'}"
    code = f"import sys, kochat_trl.desk.curation.audit; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- The real files -------------------------------------------------------------------------------


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
