"""What is wrong with data files, counted and located: the engine of `kochat data check`.

`check_files` counts the faults of `faults.py` in each file as it is: each as `kochat data clean` would find it if that
were the only fix, but that an exact duplicate isn't also a near one. It says how long the texts are, which reading of
the rankings the answers themselves support, and which prompts the files share. Nothing is changed: `clean.py` mends.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Literal

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.options import DEFAULTS, ReadingOptions
from kochat_trl.data.parse import kind_of, parse, shape_of
from kochat_trl.data.rankings import disputed
from kochat_trl.data.readers import FileFormat, file_format, read_records
from kochat_trl.data.reading import check_columns
from kochat_trl.data.records import Dialogue, Record, RecordError
from kochat_trl.data.shapes import Kind
from kochat_trl.data.text import has_hangul
from kochat_trl.desk.curation import finders
from kochat_trl.desk.curation.faults import FAULTS, TEXT_FAULTS, Level
from kochat_trl.desk.curation.texts import ROLES
from kochat_trl.desk.statistics import sign_test
from kochat_trl.errors import UserError

KEPT = 20  # indices, and messages, kept of each fault
BINS = 24


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
class Reading:
    """Which reading of a file's rankings the answers themselves support, as `judge_reading` tells it."""

    rankings: dict[str, int]  # as written, such as "[2, 0, 1]" → records
    pairs: dict[str, dict[str, int]]  # sign → reading → pairs in its favour, of those that the readings disagree on
    decided_by: str  # a sign, or `TOGETHER`
    votes: dict[str, int]  # reading → records in its favour, by that sign
    p: float
    verdict: Literal["best_first", "rank_of", "can't be told"]


@dataclass
class FileReport:
    """One file's facts and faults. `errors` counts records that can't be used, `warnings` usable ones with a fault."""

    path: str
    format: FileFormat | None = None
    kind: Kind | None = None
    shapes: dict[str, int] = field(default_factory=dict)  # rows of `data/shapes.py` → records
    not_read: list[str] = field(default_factory=list)  # columns
    records: int = 0
    usable: int = 0
    errors: int = 0
    warnings: int = 0
    unreadable: str | None = None  # why the file can't be read, or not to its end; what was read before it counts
    alerts: list[str] = field(default_factory=list)  # warnings about the file as a whole
    findings: list[Finding] = field(default_factory=list)  # errors first, then in the order of `FAULTS`
    turns: dict[str, int] = field(default_factory=dict)  # turns of a dialogue → dialogues
    lengths: dict[str, Lengths] = field(default_factory=dict)  # such as "prompts, characters"; without empty texts
    hangul: dict[str, float] = field(default_factory=dict)  # such as "prompts" → the share that has Hangul
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
    options: ReadingOptions = DEFAULTS,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Report:
    """Audit `files`: their records as `kind` (by default what most of a file's are), read as `options` say.

    A `tokenizer` (fast, with a chat template) adds what can be told of tokens: lengths, `<unk>`, texts that don't
    decode to themselves, and records with a row over `max_length`. A file that can't be read is an error in the
    report. Raises `UserError` for `max_length` without a tokenizer, a template that `rows/encode.py` refuses, or a
    column of `options` that no file has.
    """
    if max_length is not None and tokenizer is None:
        raise UserError("max_length counts tokens, so it takes a tokenizer: name one, or leave max_length out")
    audits = [_Audit(file, kind, options) for file in files]
    check_columns([audit.layout for audit in audits if audit.layout])
    if tokenizer is not None:
        for audit in audits:
            audit.check_tokens(tokenizer, max_length)
    overlaps = [overlap for one, other in combinations(audits, 2) if (overlap := one.overlap(other))]
    return Report([audit.finished() for audit in audits], overlaps)


class _Audit:
    """The audit of one file. Checks fill in the report and `_found`; `finished` sums up what was found."""

    def __init__(self, file: str, kind: Kind | None, options: ReadingOptions):
        self._report = FileReport(file, kind=kind)
        self._options = options
        # Level and fault → record → an error's message.
        self._found: dict[tuple[Level, str], dict[int, str]] = defaultdict(dict)
        self._raws = list(self._read())
        self.layout = self._raws[0].layout if self._raws else None
        kinds: Counter[Kind | None] = Counter(filter(None, map(kind_of, self._raws)))
        self._report.kind = kind or max(kinds, key=kinds.__getitem__, default=None)
        self._usable = [finders.Item(raw, records) for raw in self._raws if (records := self._parse(raw))]
        self._texts = [
            ((raw.source.index, role), text) for raw in self._raws for role, text in finders.written_texts(raw)
        ]
        self._check_texts()
        for finder in (finders.own_faults, finders.contradictions, partial(finders.repeats, fault="repeated_prompt")):
            self._add_found(finder(self._usable))
        copies = self._add_found(finders.repeats(self._usable, "duplicate"))
        self._add_found(finders.repeats([item for item in self._usable if item not in copies], "near_duplicate"))
        self._judge_rankings()

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
        records = [record for item in self._usable for record in item.records]
        turns = Counter(len(record.texts) for record in records if isinstance(record, Dialogue))
        shapes = Counter(shape.name for item in self._usable if (shape := shape_of(item.raw)))
        report.shapes, report.not_read = dict(shapes), [*self.layout.passed_over] if self.layout else []
        report.turns = {str(number): count for number, count in sorted(turns.items())}
        return report

    def _add(self, fault: str, index: int) -> None:
        self._found[FAULTS[fault].level, fault][index] = ""

    def _add_found(self, found: Iterable[tuple[finders.Item, str]]) -> set[finders.Item]:
        """Add what a finder found, and return the records."""
        pairs = list(found)
        for item, fault in pairs:
            self._add(fault, item.raw.source.index)
        return {item for item, _ in pairs}

    def _read(self) -> Iterator[RawRecord]:
        try:
            self._report.format = file_format(self._report.path, self._options)
            yield from read_records(self._report.path, self._options)
        except UserError as error:
            self._report.unreadable = str(error)

    def _parse(self, raw: RawRecord) -> list[Record]:
        try:
            return parse(raw, self._report.kind or "sft")
        except RecordError as error:
            self._found["error", error.fault][raw.source.index] = str(error).removeprefix(f"{self._report.path}, ")
            return []

    def _check_texts(self) -> None:
        """Each text by itself, of records that can't be used, too: `clean` mends before it drops."""
        for fault in TEXT_FAULTS:
            for (index, _), text in self._texts:
                if fault.mend and fault.mend(text) != text:
                    self._add(fault.name, index)
        for role in ROLES:
            if own := [text for (_, its_role), text in self._texts if its_role == role]:
                self._report.hangul[role] = statistics.fmean(map(has_hangul, own))
                self._report.lengths[f"{role}, characters"] = measure(list(map(len, own)))
        self._report.begin_with_quote = sum(text.startswith(("'", '"')) for _, text in self._texts)

    def _judge_rankings(self) -> None:
        found = [ranking for item in self._usable for ranking in item.rankings]
        rankings = [(ranking.ranking, ranking.completions) for ranking in found if ranking.ranking is not None]
        if rankings:
            self._report.reading = reading = judge_reading(rankings)
            if reading.verdict not in (self._options.ranking_order, "can't be told"):
                order = self._options.ranking_order
                self._report.alerts.append(
                    f"The rankings are read as {order}, but the answers say that they are {reading.verdict}: "
                    f"pairs of {len(self._found['warning', 'three_cycle']):,} records would train upside down. "
                    f"Set `ranking_order: {reading.verdict}`."
                )

    def check_tokens(self, tokenizer: Any, max_length: int | None) -> None:
        """What `tokenizer` makes of each text by itself, and of each record's longest row in the chat template."""
        lengths: dict[str, list[int]] = {what: [] for what in (*ROLES, "with template")}
        usable = {item.raw.source.index for item in self._usable}
        desc = f"Tokenizing {self._report.path}"
        for (index, role), count, faults in finders.tokenized(self._texts, tokenizer, desc):
            lengths[role].append(count)
            for fault in faults if index in usable else ():
                self._add(fault, index)
        for item, count in finders.row_lengths(self._usable, tokenizer, desc):
            lengths["with template"].append(count)
            if max_length is not None and count > max_length:
                self._add("overlong", item.raw.source.index)
        self._report.lengths |= {f"{what}, tokens": measure(them) for what, them in lengths.items() if them}

    def overlap(self, other: "_Audit") -> Overlap | None:
        """The prompts that both files have; None if there is none."""
        one, two = (
            {key for item in audit._usable for record in item.records for key in finders.asked_keys(record)}
            for audit in (self, other)
        )
        if not (shared := one & two):
            return None
        counts = [len(audit._add_found(finders.overlaps(audit._usable, shared))) for audit in (self, other)]
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


def _distinct_share(text: str) -> float:
    words = text.split()
    return len(set(words)) / max(len(words), 1)


HANGUL, TOGETHER = "has Hangul", "all signs together"
SIGNS: dict[str, Callable[[str], float]] = {
    HANGUL: has_hangul,
    "is longer": len,
    "repeats itself less": _distinct_share,
}
ALPHA = 0.01
ENOUGH = 8  # votes: with fewer, p is over ALPHA even where all agree


def judge_reading(rankings: Sequence[tuple[Any, Sequence[str]]]) -> Reading:
    """Which reading of `(ranking, completions)` the answers support, by signs of quality that a program can see.

    Only pairs that the two readings turn round can tell. Of each such pair and each of `SIGNS`, the answer that shows
    the sign more should be the better one; where both show it alike, the pair says nothing. The pairs of one record
    have answers in common (the two of a 3-cycle share one), so they are no independent witnesses: a record has one
    vote, as most of its pairs say. Hangul decides, the surest sign, if it gives `ENOUGH` votes; else all signs do, by
    the records of which two signs more say one thing than the other: no other sign is to be trusted alone, since
    some data prefers short answers, and long ones repeat themselves more. Which of the two decides hangs on how many
    votes there are, not on what they say, so that one two-sided sign test at `ALPHA` is fair: if a sign had nothing
    to do with the ranking, the votes would be coin tosses.
    """
    pairs = {sign: {"best_first": 0, "rank_of": 0} for sign in SIGNS}
    votes = {sign: {"best_first": 0, "rank_of": 0} for sign in (*SIGNS, TOGETHER)}

    def count(tally: dict[str, int], lean: float) -> int:
        """Count for best_first if `lean` is positive, for rank_of if it is negative; return +1, −1 or 0."""
        if lean:
            tally["best_first" if lean > 0 else "rank_of"] += 1
        return (lean > 0) - (lean < 0)

    for ranking, completions in rankings:
        turned = [(completions[i], completions[j]) for i, j in disputed(ranking, len(completions))]
        lean = 0
        for sign, shows in SIGNS.items():
            by_pair = [count(pairs[sign], shows(better) - shows(worse)) for better, worse in turned]
            lean += count(votes[sign], sum(by_pair))
        count(votes[TOGETHER], lean if abs(lean) > 1 else 0)
    decided_by = HANGUL if sum(votes[HANGUL].values()) >= ENOUGH else TOGETHER
    best_first, rank_of = votes[decided_by].values()
    p = sign_test(best_first, rank_of)
    verdict: Any = "can't be told" if p >= ALPHA else "best_first" if best_first > rank_of else "rank_of"
    counts = Counter(str(ranking) for ranking, _ in rankings)
    return Reading(dict(counts.most_common()), pairs, decided_by, votes[decided_by], p, verdict)
