"""What is counted is what would be dropped: the audit and the cleaning of a file find the same records."""

import json

from kochat_trl.desk.curation.audit import check_files
from kochat_trl.desk.curation.clean import clean_file
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS

import pytest

FOUND = [name for name, fault in FAULTS.items() if fault.level == "warning" and fault not in TEXT_FAULTS]
COMPLETIONS = {f"completion_{i}": text for i, text in enumerate(("좋음", "보통", "나쁨"))}
FILES = {
    "sft": [
        {"prompt": "가 나", "completion": "답"},
        {"prompt": "가 나", "completion": "답", "tokens": 3},  # a field that recipes don't read
        {"instruction": "가 나", "output": "답"},  # other names
        {"prompt": "가  나", "completion": "답"},
        {"prompt": "나", "completion": "Yes\ufffd"},
        {"prompt": "What?", "completion": "漢"},
        {"prompt": "", "completion": "No"},  # of no use: nothing else is found
        {"prompt": "", "completion": "No"},
        {"prompt": "몰라", "completion": "몰라 " * 20},
    ],
    "preference": [
        {"prompt": "질문", **COMPLETIONS, "ranking": [0, 1, 2]},
        {"prompt": "질문", "chosen": "나쁨 ", "rejected": "좋음"},
        {"prompt": "물음", **COMPLETIONS, "ranking": [1, 2, 0]},
        {"prompt": "물음", **COMPLETIONS, "ranking": [[0, 1], 2]},
        {"prompt": "뭐", **COMPLETIONS, "completion_1": "ok", "ranking": [2, 0]},
        {"prompt": "뭐", **COMPLETIONS, "completion_1": "ok", "ranking": [2, 0]},
        {"prompt": "몰라", "chosen": "몰라", "rejected": "반가 " * 20, "ranking": [1, 2, 0]},
    ],
    "prompt": [{"instruction": "Translate this.", "input": "안녕"}, {"prompt": "Hi", "completion": "안녕"}],
}
NOT_IN = {
    "sft": {"contradiction", "tied", "three_cycle"},
    "preference": {"replacement", "near_duplicate"},
    "prompt": set(FOUND) - {"no_hangul", "overlap", "unknown_token", "round_trip"},
}


@pytest.mark.parametrize("kind", FILES)
def test_the_audit_counts_what_clean_drops(kind, write, tmp_path, tiny_tokenizer):
    file = write("dirty.json", json.dumps(FILES[kind]))
    other = write("other.json", json.dumps([{"prompt": "몰라"}, {"prompt": "Hi"}]))
    report = check_files([file, other], tokenizer=tiny_tokenizer, max_length=30).files[0]
    counted = {finding.fault: finding.records for finding in report.findings if finding.level == "warning"}
    dropped = {}
    for fault in FOUND:
        options = {"tokenizer": tiny_tokenizer} if fault in ("unknown_token", "round_trip", "overlong") else {}
        options |= {"max_length": 30} if fault == "overlong" else {}
        options |= {"against": [other]} if fault == "overlap" else {}
        folder = tmp_path / fault
        fixes = ["broken", "empty", "equal", fault, *(["duplicate"] if fault == "near_duplicate" else [])]
        clean_file(file, folder / "out", report=folder / "report", fixes=fixes, kind=kind, **options)
        lines = map(json.loads, (folder / "report").read_text(encoding="utf-8").splitlines())
        dropped[fault] = [line["index"] for line in lines if fault in line["faults"]]
    assert {fault: records for fault, records in dropped.items() if records} == counted
    assert counted.keys() == set(FOUND) - NOT_IN[kind]
