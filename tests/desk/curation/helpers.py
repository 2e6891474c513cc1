"""Records, files and reports that the tests of this room have in common."""

import io
import json
import unicodedata
from pathlib import Path

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.readers import DIALOGUE_START, SPEAKERS, read_records
from kochat_trl.desk.curation.clean import Summary, clean_file
from kochat_trl.desk.curation.faults import FAULTS
from kochat_trl.desk.curation.view import print_report

from hypothesis import strategies as st
from rich.console import Console

NFD = unicodedata.normalize("NFD", "한국")
DEFAULT = [fault.name for fault in FAULTS.values() if fault.default]
ERRORS = ["broken", "empty", "equal"]
TAKES_TOKENIZER = {"unknown_token", "round_trip", "overlong"}
ALL = [name for name in FAULTS if name not in TAKES_TOKENIZER]

SFT = {"prompt": "질문", "completion": "답"}
RANKED = {"prompt": "질문", "completion_0": "하나", "completion_1": "둘", "completion_2": "셋", "ranking": [2, 0, 1]}
PIECES = [
    *("'", '"', "\\", r"\n", r"\xa0", r"\'", "', 'completion': '", '", "tokens":', "{", ",", "80", "a", " ", "\t"),
    *("</s>", "<s>", "<", "/s>", "<unk>", "<|im_end|>", "<|", "|>", "\0", "\r", "\n", "\r\n", "\x85", "\v", "\x1c"),
    *("\u200b", "\u200d", "\u3164", "\ufeff", "\u00a0", "\u3000", "\u2028", "\ufffd", "👩", "가", "나", "다", "ㅋ"),
    *(NFD, NFD[0], NFD[1], "\u0301", "\u0958", "\uf9d1", "①", "1", DIALOGUE_START, "\n<사람>:", "<챗봇>: "),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


class Cleaned:
    """The result of one `clean_file`: the bytes and the records of the output, the lines of the report."""

    def __init__(self, folder: Path, file: str | Path, **kwargs):
        self.folder, self.output = folder, folder / "clean.json"
        self.summary: Summary = clean_file(file, self.output, report=folder / "report.jsonl", **kwargs)
        self.bytes = self.output.read_bytes()
        options = kwargs.get("options", ReadingOptions())
        self.records = [raw.fields for raw in read_records(self.output, options)] if self.bytes else []
        self.report = [json.loads(line) for line in (folder / "report.jsonl").read_text("utf-8").splitlines()]
        self.faults = [(line["index"], line["action"], line["faults"]) for line in self.report]

    def again(self, **kwargs) -> "Cleaned":
        (self.folder / "again").mkdir()
        return Cleaned(self.folder / "again", self.output, **kwargs)


def ranking(*completions: str, prompt: str = "질문", **fields) -> dict:
    return {"prompt": prompt} | {f"completion_{i}": text for i, text in enumerate(completions)} | fields


def clean_names(cleaned: Cleaned) -> list[str]:
    return [record["prompt"] for record in cleaned.records]


def dialogue(*turns: str) -> str:
    return "\n".join([DIALOGUE_START, *(f"{SPEAKERS[i % 2]}: {text}" for i, text in enumerate(turns))]) + "\n"


def messages(*contents: str, **fields) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]} | fields


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
