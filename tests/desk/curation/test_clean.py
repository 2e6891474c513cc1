"""A bad file → a good one and a list of what was done; by hand, and on the real files."""

import io
import json
import subprocess
import sys

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.readers import DIALOGUE_START, file_format, read_records
from kochat_trl.data.records import conversation
from kochat_trl.desk.curation.clean import clean_file
from kochat_trl.desk.curation.faults import FAULTS
from kochat_trl.desk.curation.view import print_summary
from kochat_trl.errors import UserError
from kochat_trl.rows.encode import encode_dialogues, encode_prompts
from tests.desk.curation.helpers import DEFAULT, RANKED, SFT, Cleaned, clean_names, messages, ranking
from tests.tiny import parsed

import pytest
from rich.console import Console

# --- Records that recipes refuse ------------------------------------------------------------------

REFUSED = [
    ("broken", {"prompt": "가"}, "field 'completion'"),
    ("broken", {"prompt": "가", "completion": 3}, "found 3"),
    ("broken", ["가"], "expected a JSON object"),
    ("broken", {"prompt": "가", "completion": "\ud800"}, "half characters"),
    ("empty", {"prompt": "", "completion": "나"}, "field 'prompt': found ''"),
]


@pytest.mark.parametrize(("fault", "record", "message"), REFUSED)
def test_a_record_that_recipes_refuse_is_dropped(clean, fault, record, message):
    cleaned = clean([SFT, record, SFT | {"prompt": "물음"}], fixes=[fault], kind="sft")
    assert cleaned.records == [SFT, SFT | {"prompt": "물음"}]
    [line] = cleaned.report
    assert message in line.pop("error")
    before = record if isinstance(record, dict) else {"(whole record)": record}
    assert line == {"index": 1, "line": 1, "action": "dropped", "faults": [fault], "before": before}


@pytest.mark.parametrize(("fault", "record", "message"), REFUSED)
def test_without_its_fix_the_file_is_refused(clean, tmp_path, fault, record, message):
    with pytest.raises(UserError, match=rf"1 of 2 records can't be rewritten(.|\n)*{message}(.|\n)*too: {fault}"):
        clean([SFT, record], fixes=sorted(set(DEFAULT) - {fault}), kind="sft")
    assert [path.name for path in tmp_path.iterdir()] == ["dirty"]


def test_a_broken_line_is_dropped_and_shown(clean):
    cleaned = clean(f"{json.dumps(SFT)}\n{{broken\n")
    assert cleaned.records == [SFT]
    assert cleaned.report[0]["before"] == {"(whole record)": cleaned.report[0]["before"]["(whole record)"]}
    assert "broken JSON" in cleaned.report[0]["before"]["(whole record)"]
    assert cleaned.report[0]["line"] == 2


def test_a_text_that_mending_leaves_empty(clean):
    cleaned = clean([{"prompt": "<s></s>\u200b"}, {"prompt": "', 'completion': '나"}, {"prompt": "\u00a0"}])
    assert cleaned.records == []
    assert cleaned.bytes == b"[]\n"
    faults = [["zero_width", "special_token", "empty"], ["swallowed", "empty"], ["no_break_space", "empty"]]
    assert [line["faults"] for line in cleaned.report] == faults
    assert cleaned.again().bytes == b"[]\n"


# --- Repeats, and what other files have -----------------------------------------------------------


def test_repeats(clean, tmp_path):
    records = [
        {"prompt": "가 나", "completion": "답"},
        {"prompt": "가 나", "completion": "답", "tokens": 3},
        {"prompt": "'가 나", "completion": "답"},  # the same once it is mended
        {"prompt": "가  나", "completion": "답"},
        {"prompt": "가 나", "completion": "다른 답"},
        {"instruction": "가 나", "output": "답"},
    ]
    found = {}
    for fix in ("duplicate", "near_duplicate", "repeated_prompt"):
        (tmp_path / fix).mkdir()
        path = tmp_path / fix / "dirty"
        path.write_text(json.dumps(records), encoding="utf-8")
        cleaned = Cleaned(tmp_path / fix, path, fixes=["stray_quote", fix])
        found[fix] = [index for index, action, _ in cleaned.faults if action == "dropped"]
    assert found == {"duplicate": [1, 2, 5], "near_duplicate": [1, 2, 3, 5], "repeated_prompt": [1, 2, 3, 4, 5]}


def test_rankings_of_the_same_completions_in_another_order_are_no_duplicates(clean):
    records = [RANKED, RANKED | {"ranking": [0, 2, 1]}]
    assert clean(records).records == records


def test_a_contradiction_goes_before_a_prompt_is_repeated(clean):
    """Otherwise the first of the two would stay because the second is gone."""
    records = [{"prompt": "질문", "chosen": a, "rejected": b} for a, b in (("가", "나"), ("나", "가"), ("다", "라"))]
    cleaned = clean(records, fixes=["contradiction", "repeated_prompt"])
    assert cleaned.records == [records[2]]


def test_the_first_of_two_that_may_stay_is_kept(clean):
    """A record that goes for a fault of its own doesn't take its near duplicate with it."""
    cleaned = clean([{"prompt": "가 ㋿\ufffd"}, {"prompt": "나 1"}, {"prompt": "나 \u2460"}])
    assert clean_names(cleaned) == ["나 1"]
    assert cleaned.faults == [(0, "dropped", ["replacement"]), (2, "dropped", ["near_duplicate"])]


def test_overlap_of_what_stands_after_other_turns(clean, write):
    """A question after a history, read for SFT, is that of a prompt file; so is a later one of a dialogue."""
    record = {"instruction": "어떻게?", "output": "이렇게.", "history": [["뭐?", "이거."]]}
    held_out = write("held", json.dumps([{"prompt": "어떻게?", "history": [["뭐?", "이거."]]}]))
    talk = messages("뭐?", "이거.", "어떻게?", "이렇게.")
    other = record | {"history": [["뭐?", "저거."]]}
    records = [record, {"instruction": "어떻게?", "output": "네."}, other, talk]
    cleaned = clean(records, kind="sft", against=[held_out], fixes=[])
    assert cleaned.faults == [(0, "dropped", ["overlap"]), (3, "dropped", ["overlap"])]


def test_overlap(clean, write):
    held_out = write("held.jsonl", '{"prompt": "물음\\u00a0하나", "completion": "x"}\n{"prompt": ""}\n')
    talk = write("talk.txt", f"{DIALOGUE_START}\n<사람>: '안녕\n<챗봇>: 네\n")
    prompts = ["물음  하나", "안녕", "남는 것"]
    cleaned = clean([{"prompt": prompt} for prompt in prompts], fixes=["stray_quote"], against=[held_out, talk])
    assert clean_names(cleaned) == ["남는 것"]
    assert cleaned.summary.faults == {"overlap": 2}


def test_all_faults_of_its_own_are_reported(clean, write):
    cleaned = clean([{"prompt": "hm\ufffd"}], fixes=["replacement", "no_hangul"], against=[write("held", "hm\ufffd")])
    assert cleaned.faults == [(0, "dropped", ["overlap", "replacement", "no_hangul"])]


def test_no_hangul(clean):
    """An answer without it; a record for its prompt alone is judged by the prompt."""
    records = [{"prompt": "in English", "completion": "답"}, {"prompt": "질문", "completion": "I do not know."}]
    assert clean_names(clean(records, fixes=["no_hangul"])) == ["in English"]


def test_no_hangul_in_prompts_and_in_rankings(clean, tmp_path, write):
    cleaned = clean([{"prompt": "Hello"}, {"prompt": "안녕", "completion": "Hi"}], kind="prompt", fixes=["no_hangul"])
    assert clean_names(cleaned) == ["안녕"]
    (tmp_path / "rm").mkdir()
    path = write("rm/dirty", json.dumps([RANKED, RANKED | {"prompt": "물음", "completion_1": "garbage"}]))
    assert clean_names(Cleaned(tmp_path / "rm", path, fixes=["no_hangul"])) == ["질문"]


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["clean.json", "report.jsonl"])
def test_nothing_is_overwritten(clean, write, tmp_path, taken):
    write(taken, "mine")
    with pytest.raises(UserError, match=f"{taken} exists already"):
        clean("{broken")  # which isn't even read
    assert (tmp_path / taken).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dirty", taken])


def test_the_file_is_not_edited_in_place(tmp_path, write):
    file = write("a.json", json.dumps([SFT]))
    for output, report in ((file, "r"), (tmp_path / "x" / ".." / "a.json", "r"), ("o", file), ("o", "./o")):
        with pytest.raises(UserError, match="need a name each"):
            clean_file(file, output, report=report)


def test_if_the_output_cant_be_written_there_is_no_report(clean, tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("disk full")

    monkeypatch.setattr("kochat_trl.desk.curation.clean.write_records", fail)
    with pytest.raises(UserError, match="disk full"):
        clean([{"prompt": ""}, {"prompt": "가"}])
    assert [path.name for path in tmp_path.iterdir()] == ["dirty"]


def test_names_of_fixes(clean):
    with pytest.raises(
        UserError, match=r"no fix 'swalowed'. Did you mean 'swallowed'\? The fixes are: broken, unclear, empty, "
    ):
        clean([SFT], fixes=["swalowed"])


def test_fixes_that_need_something(clean):
    for fixes, options, flag in (
        (["unknown_token"], {}, "'unknown_token' needs --tokenizer"),
        (["round_trip"], {}, "'round_trip' needs --tokenizer"),
        (["overlong"], {"max_length": 9}, "'overlong' needs --tokenizer"),
        (["overlong"], {"tokenizer": object()}, "'overlong' needs --max-length"),
        (["overlap"], {}, "'overlap' needs --against"),
    ):
        with pytest.raises(UserError, match=flag):
            clean("{broken", fixes=fixes, **options)


def test_the_kind_of_a_file(clean, write, tmp_path):
    prompt = {"prompt": "뭐"}
    assert clean([SFT, prompt, SFT | {"prompt": "물음"}]).faults == [(1, "dropped", ["broken"])]
    for records, message in (
        ([SFT, prompt], r"different kinds \(1 sft, 1 prompt\)"),
        ([SFT, prompt, prompt], r"different kinds \(2 prompt, 1 sft\)"),
        ([SFT, SFT, RANKED], r"different kinds \(2 sft, 1 preference\)"),
        ([{"tokens": 3}], "no record has fields that tell"),
    ):
        with pytest.raises(UserError, match=f"{message}.*--kind"):
            clean_file(write("mixed.json", json.dumps(records)), tmp_path / "o", report=tmp_path / "r")
    (tmp_path / "told").mkdir()
    cleaned = Cleaned(tmp_path / "told", write("told.json", json.dumps([SFT, prompt, prompt])), kind="prompt")
    assert clean_names(cleaned) == ["질문", "뭐"]


def test_cleaning_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets', 'rich'}"
    code = f"import sys, kochat_trl.desk.curation.clean; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_summary(clean):
    cleaned = clean([SFT, SFT, {"prompt": "'가", "completion": "나"}, {"prompt": "", "completion": "'나"}])
    assert cleaned.summary.faults == {"empty": 1, "stray_quote": 2, "duplicate": 1}
    assert list(cleaned.summary.faults) == ["empty", "stray_quote", "duplicate"]  # as in FAULTS
    shown = io.StringIO()
    print_summary(cleaned.summary, Console(file=shown, width=400))
    assert "stray_quote │ 2" in shown.getvalue()
    assert "/dirty: 4 records read, 2 written, 1 of them changed; 2 dropped." in shown.getvalue()


# --- With a tokenizer -----------------------------------------------------------------------------


def test_unknown_tokens_and_round_trips(clean, tiny_tokenizer):
    """Its NFKC makes `？` a `?`, and it has no token for `漢`; both are in no other text that it was trained on."""
    prompts = ["몰라</s>", "대한민국의 수도는?", "대한민국의 수도는？", "漢", " 몰라"]
    records = [{"prompt": prompt, "completion": "몰라"} for prompt in prompts]
    cleaned = clean(records, fixes=["unknown_token"], tokenizer=tiny_tokenizer)
    assert cleaned.faults == [(3, "dropped", ["unknown_token"])]
    again = cleaned.again(fixes=["round_trip"], tokenizer=tiny_tokenizer)
    assert again.faults == [(2, "dropped", ["round_trip"]), (3, "dropped", ["round_trip"])]
    assert clean_names(again) == prompts[:2]


def test_a_half_character_that_recipes_dont_read_is_no_error(clean, tiny_tokenizer):
    records = [{"prompt": "몰라", "completion": "\ud800"}]
    cleaned = clean(records, kind="prompt", fixes=["round_trip"], tokenizer=tiny_tokenizer)
    assert cleaned.summary.dropped == 1


def test_overlong(clean, tmp_path, write, tiny_tokenizer):
    """A record is as long as the longest row that it gives, template and end of sequence included."""
    short, long = "몰라", "몰라 몰라 몰라 몰라"
    files = {
        "prompt": [{"prompt": short}, {"prompt": long}],
        "sft": [{"prompt": short, "completion": short}, {"prompt": short, "completion": long}],
        "talk": [messages(short, short), messages(short, short, short, short)],
        "preference": [
            ranking(short, "반가", long, ranking=[1, 0]),  # the long one is not ranked, so it gives no row
            ranking(short, long, ranking=[0, 1]),
        ],
    }
    prompt_length = len(encode_prompts(tiny_tokenizer, [conversation(short)])[0])
    length = len(encode_dialogues(tiny_tokenizer, [conversation(short, short)])[0][0])
    for name, records in files.items():
        path = write(f"{name}/dirty", json.dumps(records))
        options = {"tokenizer": tiny_tokenizer, "max_length": prompt_length if name == "prompt" else length}
        cleaned = Cleaned(tmp_path / name, path, fixes=["overlong"], **options)
        assert cleaned.faults == [(1, "dropped", ["overlong"])], name
        (tmp_path / name / "less").mkdir()
        options["max_length"] -= 1
        assert Cleaned(tmp_path / name / "less", path, fixes=["overlong"], **options).summary.written == 0, name


def test_all_fixes_at_once(clean, write, tiny_tokenizer):
    options = {"tokenizer": tiny_tokenizer, "max_length": 20, "against": [write("held", json.dumps([SFT]))]}
    records = [SFT, {"prompt": "'반가워요", "completion": "저도</s> 반가워요."}, {"prompt": "漢", "completion": "몰라"}]
    records += [{"prompt": "반가", "completion": "몰라 " * 20}, {"prompt": "반가", "completion": "저도  반가워요."}]
    cleaned = clean(records, fixes=FAULTS, **options)
    assert cleaned.faults == [
        (0, "dropped", ["overlap"]),
        (1, "changed", ["stray_quote", "special_token"]),
        (2, "dropped", ["unknown_token", "round_trip"]),
        (3, "dropped", ["overlong"]),
    ]
    assert cleaned.again(fixes=FAULTS, **options).bytes == cleaned.bytes


# --- On the real files ----------------------------------------------------------------------------


def test_a_field_of_a_message_is_not_lost(tmp_path):
    """Text that nothing reads is refused before, unless a person says that it is of no use."""
    turns = [{"role": "user", "content": "안녕", "name": "철수"}, {"role": "assistant", "content": "네, 안녕하세요."}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    paths = {"file": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl", "report": tmp_path / "report.jsonl"}
    with pytest.raises(UserError, match=r"field 'messages\[\].name': found '철수'"):
        clean_file(**paths)
    clean_file(**paths, options=ReadingOptions(columns={"messages[].name": "ignore"}))
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == {"messages": turns}


def test_the_real_prompts(clean, shared, tmp_path):
    """Mended, they are those of the seed file that they were made from, where nothing is escaped or swallowed."""
    folder = shared / "data/kochatgpt"
    (tmp_path / "seed").mkdir()
    prompts = Cleaned(tmp_path, folder / "kochatgpt_3_PPO.jsonl")
    seeds = Cleaned(tmp_path / "seed", folder / "kochatgpt_seed_data.txt")
    assert prompts.summary.faults == {"empty": 3, "swallowed": 25, "escape": 20, "duplicate": 52}
    assert seeds.summary.faults == {"empty": 3, "no_break_space": 19, "duplicate": 52}
    assert [index for index, action, faults in prompts.faults if faults == ["empty"]] == [6330, 6699, 7405]
    for cleaned, changed in ((prompts, 45), (seeds, 19)):
        summary = cleaned.summary
        assert (summary.read, summary.written, summary.changed, summary.dropped) == (12_000, 11_945, changed, 55)
    lost_its_first_letter = {"urn me loose를 부른 가수는 누구인가요?", "turn me loose를 부른 가수는 누구인가요?"}
    assert set(clean_names(prompts)) ^ set(clean_names(seeds)) == lost_its_first_letter
    assert prompts.again().bytes == prompts.bytes


def test_the_real_answers_and_rankings(shared, tmp_path, clean):
    (tmp_path / "rm").mkdir()
    answers = Cleaned(tmp_path, shared / "data/kochatgpt/kochatgpt_1_SFT.excerpt.jsonl")
    assert answers.summary.faults == {"stray_quote": 4}
    for line, record in zip(answers.report, answers.records, strict=True):
        assert line["before"] == {"completion": "'" + record["completion"]}
    rankings = Cleaned(tmp_path / "rm", shared / "data/kochatgpt/kochatgpt_2_RM.excerpt.jsonl")
    [line] = rankings.report
    assert line["faults"] == ["escape"]
    assert line["after"]["completion_1"] == line["before"]["completion_1"].replace(r"\n", "\n").replace(r"\'", "'")
    assert [record["ranking"] for record in rankings.records] == [[2, 1, 0], [2, 0, 1], [1, 2, 0], [1, 0, 2]]


def test_real_files_without_faults_come_out_as_they_are(shared, tmp_path):
    """But for copies, and for two pairs whose answers are the same."""
    kinds = {"chatbot/ChatbotData.csv": ("sft", 73), "kochatgpt/kochatgpt_1_SFT_conversation.jsonl": ("sft", 0)}
    kinds |= {"mygpt/ive_train_rm.jsonl": ("preference", 2), "mygpt/ive_instruction_train.jsonl": ("sft", 0)}
    for name, (kind, dropped) in kinds.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        cleaned = Cleaned(folder, shared / "data" / name)
        assert (cleaned.summary.changed, cleaned.summary.dropped) == (0, dropped)
        gone = {line["index"] for line in cleaned.report}
        old = [raw.fields for raw in read_records(shared / "data" / name) if raw.source.index not in gone]
        assert cleaned.records == old
        assert len(parsed(cleaned.output, kind)) == len(old)
        assert file_format(cleaned.output).shape == file_format(shared / "data" / name).shape
