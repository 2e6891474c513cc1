"""An audit, and what cleaning did, on the terminal."""

from collections.abc import Sequence
from pathlib import Path

from kochat_trl.desk.curation.audit import BINS, FileReport, Reading, Report
from kochat_trl.desk.curation.clean import Summary
from kochat_trl.desk.curation.faults import FAULTS, Level

from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

_SHAPES = {"array": "JSON array", "lines": "JSON lines", "objects": "JSON objects", "object": "JSON object with a list"}
_SHAPES |= {"csv": "CSV", "text": "plain text", "parquet": "Parquet", "arrow": "Arrow", "xlsx": "Excel"}
_BARS = "▁▂▃▄▅▆▇█"
_STYLES: dict[Level, str] = {"error": "bold red", "warning": "yellow"}


def print_report(report: Report, console: Console) -> None:
    """Print `report`: a screen for one file; of more than three files only what is wrong with each."""

    def say(content: str | Table, style: str = "") -> None:
        console.print(Padding(Text(content, style) if isinstance(content, str) else content, (0, 0, 0, 2)))

    brief = len(report.files) > 3
    for file in report.files:
        console.print(Rule(Text(file.path, "bold"), align="left", style="dim"))
        say(_facts(file, brief))
        if file.unreadable:
            say(f"error: {file.unreadable}", _STYLES["error"])
        for alert in file.alerts:
            say(f"warning: {alert}", "bold yellow")
        if file.findings:
            say(_findings(file, 5 if console.width > 106 else 3))
        if not brief:
            for message in [message for finding in file.findings for message in finding.messages[:2]]:
                say(message, "dim")
            if file.lengths:
                console.print()
                say(_lengths(file))
            if file.reading:
                console.print()
                say(_reading(file.reading))
        console.print()
    for overlap in report.overlaps:
        sides = zip(overlap.files, overlap.records, overlap.shares, strict=True)
        where = [f"{Path(path).name} {count:,} ({share:.2%})" for path, count, share in sides]
        say(f"{_number(overlap.prompts, 'prompt')} in two files; records of {', of '.join(where)}", _STYLES["warning"])
    last = f"{_number(report.errors, 'error')}, {_number(report.warnings, 'warning')}."
    last += " The recipes refuse errors, or leave them out if told so." if report.errors else ""
    if report.errors or report.warnings:
        last += "\nTo mend a copy: kochat data clean FILE --output NEW_FILE"
    console.print(Text(last, "bold red" if report.errors else "bold yellow" if report.warnings else "bold green"))


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _facts(file: FileReport, brief: bool) -> str:
    facts: list[str] = [file.kind or "kind unknown"]
    if file.format:
        facts.append("TSV" if file.format.delimiter == "\t" else _SHAPES.get(file.format.shape, file.format.shape))
        facts += [mark.upper() for mark in ("bom", "crlf", "gzip", "zstd") if getattr(file.format, mark)]
    facts.append(f"{_number(file.records, 'record')}, {file.usable:,} usable")
    if len(file.shapes) > 1:
        facts += [f"{count:,} {shape}" for shape, count in file.shapes.items()]
    else:
        facts += list(file.shapes)
    facts += [f"not read: {', '.join(file.not_read)}"] if file.not_read else []
    if list(file.turns) != ["2"]:
        facts += [f"{count:,} of {turns} turns" for turns, count in list(file.turns.items())[:5]]
    if not brief:
        facts += [f"Hangul in {share:.1%} of {role}" for role, share in file.hangul.items()]
        facts += [f"{_number(file.begin_with_quote, 'text')} with a quote mark first"] if file.begin_with_quote else []
    return " · ".join(facts)


def _table(columns: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        wraps = name in ("what", "first records")
        side: JustifyMethod = "right" if name in numbers else "left"
        table.add_column(name, justify=side, no_wrap=not wraps, min_width=12 if wraps else None)
    return table


def _findings(file: FileReport, shown: int) -> Table:
    table = _table(("level", "records", "fault", "what", "first records"), numbers=["records"])
    for finding in file.findings:
        first = ", ".join(map(str, finding.records[:shown])) + (", …" if finding.count > shown else "")
        row = (finding.level, f"{finding.count:,}", finding.fault, FAULTS[finding.fault].says, first)
        table.add_row(*row, style=_STYLES[finding.level])
    return table


def _lengths(file: FileReport) -> Table:
    numbers = ("median", "95 %", "max", "mean")
    table = _table(("lengths", *numbers, "how many of each length"), numbers)
    for what, lengths in file.lengths.items():
        most = max(lengths.bins)
        bars = "".join(_BARS[(8 * count - 1) // most] if count else " " for count in lengths.bins)
        told = (f"{lengths.median:,}", f"{lengths.p95:,}", f"{lengths.max:,}", f"{lengths.mean:,.1f}")
        table.add_row(what, *told, f"0 {bars} {lengths.bin_width * (BINS - 1):,}+")
    return table


def _reading(reading: Reading) -> str:
    counts = [f"{ranking} {count:,}" for ranking, count in reading.rankings.items()]
    rest = [f"{len(counts) - 6:,} others"] if len(counts) > 6 else []
    text = f"rankings  {' · '.join(counts[:6] + rest)}"
    if any(sum(tally.values()) for tally in reading.pairs.values()):
        one, other = reading.votes.values()
        records = f"{_number(one, 'record')} for best_first, {other:,} for rank_of"
        p = f"p = {reading.p:.2g}" if reading.p >= 0.001 else "p < 0.001"
        text += f"\nreading   {reading.verdict}: {records} by '{reading.decided_by}' ({p})"
        for sign, tally in reading.pairs.items():
            one, other = tally.values()
            text += f"\n          the better one {sign}: {_number(one, 'pair')} for best_first, {other:,} for rank_of"
    return text


def print_summary(summary: Summary, console: Console) -> None:
    """A table of the faults that were found and what was done about them, and the counts."""
    if summary.faults:
        table = Table("fault", "records", "fix")
        for name, count in summary.faults.items():
            table.add_row(name, f"{count:,}", FAULTS[name].fix)
        console.print(table)
    counts = f"{summary.read:,} records read, {summary.written:,} written, {summary.changed:,} of them changed"
    console.print(f"{summary.file}: {counts}; {summary.dropped:,} dropped.", markup=False)
