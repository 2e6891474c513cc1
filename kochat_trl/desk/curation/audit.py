"""What is wrong with data files, counted and located: the engine of `kochat data check`.

`check_files` finds the faults of `faults.py` in each file, and says how long its texts are, which reading of its
rankings the answers themselves support, and which prompts the files share. Nothing is changed: `clean.py` mends.
"""

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

from kochat_trl.data.rankings import RankingOrder
from kochat_trl.data.readers import FileFormat, file_format, read_records
from kochat_trl.data.records import Dialogue, Kind, Ranking, RawRecord, Record, RecordError, kind_of, parse
from kochat_trl.data.text import has_hangul, normalized
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS, is_answer, texts
from kochat_trl.desk.curation.which_reading import Reading, disputed, judge_reading
from kochat_trl.errors import UserError

Level = Literal["error", "warning"]
KEPT = 20  # indices, and messages, kept of each fault
BATCH = 1000  # texts tokenized together
BINS = 24


# --- The report ---------------------------------------------------------------------------------


@dataclass
class Finding:
    """How many records have a fault, the first of them, and of an error the first messages.

    One fault can be found on both levels: `tied` is an error where it leaves a ranking without a pair.
    """

    fault: str
    level: Level
    count: int
    records: list[int]
    messages: list[str]


@dataclass
class Lengths:
    """How some lengths are distributed: `bins[i]` counts those from `i * bin_width`, the last one all beyond it too.

    `median` and `p95` are the lengths at 50 and 95 % of their sorted list.
    """

    count: int
    min: int
    median: int
    p95: int
    max: int
    mean: float
    bin_width: int
    bins: list[int]


@dataclass
class FileReport:
    """One file's facts and faults. `errors` counts records that can't be used, `warnings` usable ones with a fault."""

    path: str
    format: FileFormat | None = None
    kind: Kind | None = None
    records: int = 0
    usable: int = 0
    errors: int = 0
    warnings: int = 0
    unreadable: str | None = None  # why the file can't be read, or not to its end; what was read before it counts
    alerts: list[str] = field(default_factory=list)  # warnings about the file as a whole
    findings: list[Finding] = field(default_factory=list)  # errors first, then in the order of `FAULTS`
    turns: dict[str, int] = field(default_factory=dict)  # turns of a dialogue → dialogues
    lengths: dict[str, Lengths] = field(default_factory=dict)  # such as "prompts, characters"; without empty texts
    hangul: dict[str, float] = field(default_factory=dict)  # "prompts" and "answers" → the share that has Hangul
    begin_with_quote: int = 0  # texts
    reading: Reading | None = None

    def count(self, fault: str) -> int:
        return sum(finding.count for finding in self.findings if finding.fault == fault)


@dataclass
class Overlap:
    """How many prompts two files share, and how many of each file's usable records have one of them."""

    files: tuple[str, str]
    prompts: int
    records: tuple[int, int]
    shares: tuple[float, float]  # `records` of all usable ones


@dataclass
class Report:
    files: list[FileReport]
    overlaps: list[Overlap]

    @property
    def errors(self) -> int:
        """Records that can't be used, and files that can't be read to their end."""
        return sum(file.errors + (file.unreadable is not None) for file in self.files)

    @property
    def warnings(self) -> int:
        """Usable records with a fault, and alerts."""
        return sum(file.warnings + len(file.alerts) for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return {"errors": self.errors, "warnings": self.warnings} | asdict(self)


def check_files(
    files: Sequence[str],
    *,
    kind: Kind | None = None,
    order: RankingOrder = "best_first",
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Report:
    """Audit `files`: their records as `kind` (by default what most of a file's are), their rankings read as `order`.

    A `tokenizer` (fast, with a chat template) adds what can be told of tokens: lengths, `<unk>`, texts that don't
    decode to themselves, and records with a row over `max_length`. A file that can't be read is an error in the
    report. Raises `UserError` for `max_length` without a tokenizer, or a template that `convert.py` refuses.
    """
    if max_length is not None and tokenizer is None:
        raise UserError("max_length counts tokens, so it takes a tokenizer: name one, or leave max_length out")
    audits = [_Audit(file, kind, order) for file in files]
    if tokenizer is not None:
        for audit in audits:
            audit.check_tokens(tokenizer, max_length)
    overlaps = [overlap for one, other in combinations(audits, 2) if (overlap := one.overlap(other))]
    return Report([audit.finished() for audit in audits], overlaps)


# --- One file -----------------------------------------------------------------------------------


class _Audit:
    """The audit of one file. Checks fill in the report and `_found`; `finished` sums up what was found."""

    def __init__(self, file: str, kind: Kind | None, order: RankingOrder):
        self._report = FileReport(file, kind=kind)
        self._order = order
        self._found: dict[tuple[Level, str], dict[int, str]] = {}  # level, fault → record → an error's message
        self._raws = list(self._read())
        kinds: Counter[Kind] = Counter(filter(None, map(kind_of, self._raws)))
        if kind is None and kinds:
            self._report.kind = kinds.most_common(1)[0][0]
        self._usable = {raw.source.index: record for raw in self._raws if (record := self._parse(raw))}
        self._texts = [
            (raw.source.index, "answers" if is_answer(name) else "prompts", text)
            for raw in self._raws
            for name, text in texts(raw).items()
            if text.strip()
        ]
        self._prompts: dict[str, list[int]] = {}  # normalized → the usable records that have it
        self._check_texts()
        self._check_repeats()
        self._check_prompts()
        self._check_rankings([(i, record) for i, record in self._usable.items() if isinstance(record, Ranking)])

    def finished(self) -> FileReport:
        report, places = self._report, list(FAULTS)
        faulty: dict[Level, set[int]] = {"error": set(), "warning": set()}
        for level, fault in sorted(self._found, key=lambda found: (found[0], places.index(found[1]))):
            found = self._found[level, fault]
            messages = list(filter(None, found.values()))
            report.findings.append(Finding(fault, level, len(found), sorted(found)[:KEPT], messages[:KEPT]))
            faulty[level].update(found)
        report.records, report.usable = len(self._raws), len(self._usable)
        report.errors, report.warnings = len(faulty["error"]), len(faulty["warning"] - faulty["error"])
        return report

    def _add(self, fault: str, index: int, error: RecordError | None = None) -> None:
        """Record `index` has `fault`; with an `error` it can't be used."""
        level = "error" if error else FAULTS[fault].level
        message = str(error or "").removeprefix(f"{self._report.path}, ")
        self._found.setdefault((level, fault), {})[index] = message

    def _read(self) -> Iterator[RawRecord]:
        try:
            self._report.format = file_format(self._report.path)
            yield from read_records(self._report.path)
        except UserError as error:
            self._report.unreadable = str(error)

    def _parse(self, raw: RawRecord) -> Record | None:
        try:
            return parse(raw, self._report.kind or "sft", self._order)
        except RecordError as error:
            self._add(error.fault, raw.source.index, error)
            return None

    def _check_texts(self) -> None:
        """Each text by itself. In a file of prompts Hangul is asked of these, in others of the answers."""
        for fault in TEXT_FAULTS:
            for index, _, text in self._texts:
                if fault.mend and fault.mend(text) != text:
                    self._add(fault.name, index)
        judged = "prompts" if self._report.kind == "prompt" else "answers"
        for role in ("prompts", "answers"):
            own = [(index, text, has_hangul(text)) for index, its_role, text in self._texts if its_role == role]
            for index, text, hangul in own:
                if role == judged and not hangul:
                    self._add("no_hangul", index)
                if "\ufffd" in text:
                    self._add("replacement", index)
            if own:
                self._report.hangul[role] = statistics.fmean(hangul for *_, hangul in own)
                self._report.lengths[f"{role}, characters"] = measure([len(text) for _, text, _ in own])
        self._report.begin_with_quote = sum(text.startswith(("'", '"')) for *_, text in self._texts)

    def _check_repeats(self) -> None:
        """All texts and the ranking of a record, usable or not; `near_duplicate` doesn't count exact ones again."""
        exact, alike = set(), set()
        for raw in self._raws:
            if found := texts(raw):
                ranking = repr(isinstance(raw.fields, dict) and raw.fields.get("ranking"))
                key = (frozenset(found.items()), ranking)
                near_key = (frozenset((name, normalized(text)) for name, text in found.items()), ranking)
                if near_key in alike:
                    self._add("duplicate" if key in exact else "near_duplicate", raw.source.index)
                exact.add(key)
                alike.add(near_key)

    def _check_prompts(self) -> None:
        turns: Counter[int] = Counter()
        for index, record in self._usable.items():
            if isinstance(record, Dialogue):
                turns[len(record.messages)] += 1
            prompt = normalized(record.messages[0]["content"] if isinstance(record, Dialogue) else record.prompt)
            if prompt in self._prompts:
                self._add("repeated_prompt", index)
            self._prompts.setdefault(prompt, []).append(index)
        self._report.turns = {str(number): count for number, count in sorted(turns.items())}

    def _check_rankings(self, records: list[tuple[int, Ranking]]) -> None:
        preferred: set[tuple[str, str, str]] = set()
        rankings = []
        for index, record in records:
            if any(len(tier) > 1 for tier in record.tiers):
                self._add("tied", index)
            prompt, completions = normalized(record.prompt), list(map(normalized, record.completions))
            pairs = {(prompt, completions[pair.better], completions[pair.worse]) for pair in record.pairs()}
            if any(better != worse and (prompt, worse, better) in preferred for _, better, worse in pairs):
                self._add("contradiction", index)
            preferred |= pairs
            fields = self._raws[index].fields
            if "chosen" not in fields and (ranking := fields.get("ranking")):
                rankings.append((ranking, record.completions))
                if disputed(ranking, len(completions)):
                    self._add("three_cycle", index)
        if rankings:
            self._report.reading = reading = judge_reading(rankings)
            if reading.verdict not in (self._order, "can't be told"):
                self._report.alerts.append(
                    f"The rankings are read as {self._order}, but the answers say that they are {reading.verdict}: "
                    f"pairs of {len(self._found['warning', 'three_cycle']):,} records would train upside down. "
                    f"Set `ranking_order: {reading.verdict}`."
                )

    def check_tokens(self, tokenizer: Any, max_length: int | None) -> None:
        """What `tokenizer` makes of each text by itself, and of each record's longest row in the chat template."""
        from kochat_trl.rows.encode import conversation, encode_dialogues, encode_prompts

        lengths: dict[str, list[int]] = {"prompts": [], "answers": [], "with template": []}
        for batch in self._batches(self._texts):
            plain = [text.encode(errors="replace").decode() for *_, text in batch]  # it takes no half characters
            rows = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
            back = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for (index, role, text), ids, decoded in zip(batch, rows, back, strict=True):
                lengths[role].append(len(ids))
                if tokenizer.unk_token_id in ids:
                    self._add("unknown_token", index)
                if decoded != text:
                    self._add("round_trip", index)

        inputs: list[tuple[int, Any]] = []
        for index, record in self._usable.items():
            if isinstance(record, Ranking):
                ranked = [record.completions[i] for tier in record.tiers for i in tier]
                inputs += [(index, conversation(record.prompt, completion)) for completion in ranked]
            else:
                inputs.append((index, record.messages if isinstance(record, Dialogue) else record.prompt))
        longest: dict[int, int] = {}
        for batch in self._batches(inputs):
            if self._report.kind == "prompt":
                rows = encode_prompts(tokenizer, [row for _, row in batch])
            else:
                rows = [ids for ids, _ in encode_dialogues(tokenizer, [row for _, row in batch])]
            for (index, _), ids in zip(batch, rows, strict=True):
                longest[index] = max(len(ids), longest.get(index, 0))
        for index, length in longest.items():
            if max_length is not None and length > max_length:
                self._add("overlong", index)
        lengths["with template"] = list(longest.values())
        self._report.lengths |= {f"{what}, tokens": measure(them) for what, them in lengths.items() if them}

    def _batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        from tqdm import tqdm

        for start in tqdm(range(0, len(items), BATCH), desc=f"Tokenizing {self._report.path}", delay=2, leave=False):
            yield items[start : start + BATCH]

    def overlap(self, other: "_Audit") -> Overlap | None:
        """The prompts that both files have; None if there is none."""
        shared = self._prompts.keys() & other._prompts.keys()
        counts = []
        for audit in (self, other):
            indices = [index for prompt in shared for index in audit._prompts[prompt]]
            for index in indices:
                audit._add("overlap", index)
            counts.append(len(indices))
        if not shared:
            return None
        shares = (counts[0] / len(self._usable), counts[1] / len(other._usable))
        return Overlap((self._report.path, other._report.path), len(shared), (counts[0], counts[1]), shares)


def measure(values: Sequence[int]) -> Lengths:
    """The distribution of `values`, at least one."""
    ordered = sorted(values)
    median, p95, p99 = (ordered[int(share * len(ordered))] for share in (0.5, 0.95, 0.99))
    width = p99 // BINS + 1
    bins = Counter(min(value // width, BINS - 1) for value in values)
    mean = statistics.fmean(values)
    return Lengths(len(values), ordered[0], median, p95, ordered[-1], mean, width, [bins[i] for i in range(BINS)])
