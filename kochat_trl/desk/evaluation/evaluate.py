"""Scores of a reward model, and how good they are on rankings that it was not trained on.

A reward model that learned no more than that the longer answer wins, or the one in Korean, can look good: the data that
taught it so is like the data that tests it. Hence both rules stand beside it here, on the same pairs.
"""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from kochat_trl.data.parsing import read_parsed
from kochat_trl.data.rankings import RankingOrder
from kochat_trl.data.records import Dialogue, Ranking, RecordError, kind_of, parse
from kochat_trl.data.text import hangul_share
from kochat_trl.data.writers import to_json
from kochat_trl.errors import UserError
from kochat_trl.files import new_file, refuse_existing
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import Loading, load_scorer, score_dialogues, score_ids
from kochat_trl.rows.encode import IGNORED, conversation, encode_dialogues
from kochat_trl.statistics import effective_size, sign_test, wilson_interval

from rich.console import Console
from rich.table import Table
from rich.text import Text

LEVEL = 0.05  # a baseline is beaten where p is below this
BINS = 10  # of confidence
LENGTH_GAPS = ((1, 8), (9, 32), (33, math.inf))  # in tokens


# --- Texts → scores -----------------------------------------------------------------------------


def score_records(
    path: str, records: Sequence[Dialogue | Ranking], loading: Loading = "float32", batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """A row for each answer: `prompt`, `completion`, and `score`, which the reward model `path` gives it.

    An answer of a ranking has its `rank`, 0 for the best, None if it has none. A dialogue of several exchanges has
    `messages` for the first two.
    """
    rows = [row for record in records for row in _rows(record)]
    tokenizer = load_tokenizer(path)
    dialogues = [row.get("messages") or conversation(row["prompt"], row["completion"]) for row in rows]
    scores = score_dialogues(load_scorer(path, loading, tokenizer), tokenizer, dialogues, batch_size)
    for row, score in zip(rows, scores, strict=True):
        rank = {"rank": row.pop("rank")} if "rank" in row else {}
        yield row | {"score": round(score, 6)} | rank


def _rows(record: Dialogue | Ranking) -> Iterator[dict[str, Any]]:
    if isinstance(record, Ranking):
        ranks = {i: rank for rank, tier in enumerate(record.tiers) for i in tier}
        for i, completion in enumerate(record.completions):
            yield {"prompt": record.prompt, "completion": completion, "rank": ranks.get(i)}
    elif len(record.messages) == 2:
        prompt, completion = (message["content"] for message in record.messages)
        yield {"prompt": prompt, "completion": completion}
    else:
        yield {"messages": record.messages}


# --- Rankings → pairs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One completion of a ranking. `rank` is 0 for the best; `tokens` counts its `</s>` too."""

    text: str
    rank: int
    tokens: int
    score: float

    @property
    def hangul(self) -> float:
        """The share of Hangul in its letters; 0 if it has none."""
        return hangul_share(self.text)


RankedAnswers = tuple[str, list[Answer]]  # a prompt, and the answers to it that were ranked
BASELINES: dict[str, Callable[[Answer], float]] = {
    "longer answer wins": lambda answer: answer.tokens,
    "shorter answer wins": lambda answer: -answer.tokens,
    "more Hangul wins": lambda answer: answer.hangul,
}


@dataclass(frozen=True)
class ScoredPair:
    """Two answers to `prompt`, of which people prefer the first, from a ranking of `ranks` different ranks."""

    prompt: str
    better: Answer
    worse: Answer
    ranks: int

    @property
    def margin(self) -> float:
        return self.better.score - self.worse.score

    @property
    def length_gap(self) -> int:
        """How many tokens the better answer is longer."""
        return self.better.tokens - self.worse.tokens


def read_files(
    files: Sequence[str], read: Callable[[Any], Any], skip_invalid: bool
) -> tuple[list[Any], list[RecordError]]:
    """The records of `files` as `read` makes them of raw ones, and the errors of those that it can't.

    Raises `BrokenRecordsError` if there are errors, unless `skip_invalid`; `UserError` if no record is left.
    """
    invalid: list[RecordError] = []
    records = [record for _, record in read_parsed(files, read, invalid, skip_invalid)]
    if not records:
        raise UserError(f"there is nothing to score in {', '.join(files)}")
    return records, invalid


def read_rankings(
    files: Sequence[str], order: RankingOrder = "best_first", skip_invalid: bool = False
) -> tuple[list[Ranking], list[RecordError]]:
    """The rankings and pairs of `files`, and the records that are none. Raises as `read_files` does."""
    return read_files(files, lambda raw: parse(raw, "preference", order), skip_invalid)


def read_answers(
    file: str, order: RankingOrder = "best_first", skip_invalid: bool = False
) -> tuple[list[Dialogue | Ranking], list[RecordError]]:
    """The dialogues and rankings of `file`, and the records that are neither. Raises as `read_files` does."""

    def read(raw: Any) -> Any:
        return parse(raw, "preference" if kind_of(raw) == "preference" else "sft", order)

    return read_files([file], read, skip_invalid)


def score_rankings(
    path: str, rankings: Sequence[Ranking], loading: Loading = "float32", batch_size: int = 64
) -> list[RankedAnswers]:
    """The ranked answers with their scores by the reward model `path`; each one is scored once, wherever it stands.

    Raises as `load_reward_model` and `score_ids` do.
    """
    tokenizer = load_tokenizer(path)
    ranked = [[(r.prompt, r.completions[i], rank) for rank, tier in enumerate(r.tiers) for i in tier] for r in rankings]
    texts = list(dict.fromkeys((prompt, text) for answers in ranked for prompt, text, _ in answers))
    encoded = encode_dialogues(tokenizer, [conversation(*text) for text in texts])
    scores = score_ids(load_scorer(path, loading, tokenizer), tokenizer, [ids for ids, _ in encoded], batch_size)
    tokens = (sum(label != IGNORED for label in labels) for _, labels in encoded)
    known = dict(zip(texts, zip(tokens, scores, strict=True), strict=True))
    return [(a[0][0], [Answer(text, rank, *known[prompt, text]) for prompt, text, rank in a]) for a in ranked]


def scored_pairs(rankings: Sequence[RankedAnswers]) -> list[ScoredPair]:
    """Every two answers of different rank to the same prompt, of each ranking in turn."""
    found = []
    for prompt, answers in rankings:
        ranks = len({answer.rank for answer in answers})
        for better in answers:
            found += [ScoredPair(prompt, better, worse, ranks) for worse in answers if better.rank < worse.rank]
    return found


def pair_kind(better: int, worse: int, ranks: int) -> str:
    """The name of a pair by the ranks of its answers, 0 for the best, in a ranking that has `ranks` different ones.

    Of two ranks there is one kind, `pair`; of three, best, middle and worst; of more, ranks are numbered from 1.
    """
    if ranks == 2:
        return "pair"
    if ranks == 3:
        names = ("best", "middle", "worst")
        return f"{names[better]}–{names[worse]}"
    return f"{better + 1}–{worse + 1} of {ranks}"


def gap_kind(tokens: int) -> str:
    """The name of the pairs whose better answer is about `tokens` longer (shorter, if negative)."""
    if tokens == 0:
        return "same length"
    low, high = next(gap for gap in LENGTH_GAPS if abs(tokens) <= gap[1])
    return f"{'longer' if tokens > 0 else 'shorter'} by {f'{low}–{high}' if high < math.inf else f'{low} or more'}"


# --- Metrics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """The share of pairs put right, with 95 % intervals; `if_independent` takes every pair for a prompt of its own."""

    pairs: int
    prompts: int
    accuracy: float
    interval: tuple[float, float]
    if_independent: tuple[float, float]


@dataclass(frozen=True)
class Baseline:
    """A rule that needs no model, and on how many prompts the model does better (`ahead`) or worse than the rule."""

    accuracy: Accuracy
    ahead: int
    behind: int
    p: float
    beaten: bool


@dataclass(frozen=True)
class Bin:
    """The pairs about whose order the model is about as sure: from `low` to `high`, on average `confidence`."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, and the bins that have pairs."""

    error: float
    bins: list[Bin]


@dataclass(frozen=True)
class Scores:
    """The scores of one rank; `std` is the root mean square distance from `mean`."""

    answers: int
    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class Agreement:
    """Of two scorings of the same answers: the share of pairs in the same order, and how far the scores are apart."""

    same_order: float
    mean_difference: float
    max_difference: float


def wins(pairs: Sequence[ScoredPair], worth: Callable[[Answer], float]) -> list[float]:
    """For each pair 1 if the better answer is worth more, 0 if the worse one is, ½ if both are worth the same."""
    return [_won(worth(pair.better) - worth(pair.worse)) for pair in pairs]


def _won(gap: float) -> float:
    return 1.0 if gap > 0 else 0.0 if gap < 0 else 0.5


def accuracy_of(won: Sequence[float], prompts: Sequence[str]) -> Accuracy:
    """The accuracy of pairs that were won (1), lost (0) or drawn (½); `prompts` says whose each one is.

    The interval is Wilson's for as many trials as the pairs are worth (`effective_size`). So it has a width also where
    every pair is right, unlike a bootstrap over prompts.
    """
    share, size = fmean(won), effective_size(won, prompts)
    interval, if_independent = wilson_interval(share * size, size), wilson_interval(sum(won), len(won))
    return Accuracy(len(won), len(set(prompts)), share, interval, if_independent)


def accuracies(
    pairs: Sequence[ScoredPair], won: Sequence[float], order: Callable[[ScoredPair], Any], name: Callable[[Any], str]
) -> dict[str, Accuracy]:
    """The accuracy of the pairs that have the same `name(order(pair))`, in that order."""
    places: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(pairs)), key=lambda i: order(pairs[i])):
        places[name(order(pairs[i]))].append(i)
    return {key: accuracy_of([won[i] for i in own], [pairs[i].prompt for i in own]) for key, own in places.items()}


def compare(model: Sequence[float], baseline: Sequence[float], prompts: Sequence[str]) -> Baseline:
    """Whether the model beats a baseline, by what `wins` says of each on the same pairs.

    The model is ahead on a prompt where it puts more of its pairs right. It beats the baseline if its accuracy is
    higher and it is ahead on more prompts than it is behind on, by an exact two-sided sign test at 5 %. Where every
    prompt has one pair, that is McNemar's exact test, on the pairs where only one of the two is right.
    """
    lead: dict[str, float] = defaultdict(float)
    for prompt, ours, theirs in zip(prompts, model, baseline, strict=True):
        lead[prompt] += ours - theirs
    ahead, behind = (sum(sign * value > 0 for value in lead.values()) for sign in (1, -1))
    p = sign_test(ahead, behind)
    beaten = fmean(model) > fmean(baseline) and ahead > behind and p < LEVEL
    return Baseline(accuracy_of(baseline, prompts), ahead, behind, p, beaten)


def expected_calibration_error(margins: Sequence[float]) -> Calibration:
    """How far the model's confidence in the order of two answers is from how often the order is right.

    `margins` has r_better − r_worse of each pair. The model knows two answers, not which is the better one. It puts
    them in an order with the confidence σ(|margin|), from 0.5 to 1, that Bradley–Terry gives it, and is right where the
    margin is above 0 (half right at 0). ECE = Σ_b n_b/n · |accuracy_b − confidence_b| over ten bins of equal width.
    With few pairs it is above 0 for a calibrated model too. Source: Guo et al. (arXiv:1706.04599), equation 3.
    """
    members: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        members[min(int((confidence - 0.5) * 2 * BINS), BINS - 1)].append((confidence, _won(margin)))
    bins = []
    for i in sorted(members):
        confidences, rights = zip(*members[i], strict=True)
        low, high = (0.5 + edge / (2 * BINS) for edge in (i, i + 1))
        bins.append(Bin(low, high, len(rights), fmean(confidences), fmean(rights)))
    return Calibration(sum(b.pairs * abs(b.accuracy - b.confidence) for b in bins) / len(margins), bins)


def agreement(one: Sequence[RankedAnswers], other: Sequence[RankedAnswers]) -> Agreement:
    """How far two scorings of the same rankings agree. An answer that is in several rankings counts in each."""
    pairs = zip(scored_pairs(one), scored_pairs(other), strict=True)
    same = [_won(a.margin) == _won(b.margin) for a, b in pairs]
    scores = ([answer.score for _, answers in rankings for answer in answers] for rankings in (one, other))
    differences = [abs(a - b) for a, b in zip(*scores, strict=True)]
    return Agreement(fmean(same), fmean(differences), max(differences))


@dataclass(frozen=True)
class Evaluation:
    """What scored rankings say of the model that scored them."""

    answers: int
    accuracy: Accuracy
    baselines: dict[str, Baseline]
    by_kind: dict[str, Accuracy]
    by_length_gap: dict[str, Accuracy]
    calibration: Calibration
    scores_by_rank: dict[int, Scores]


def evaluate(rankings: Sequence[RankedAnswers]) -> Evaluation:
    """All metrics. Pairs of the same prompt are taken together wherever pairs are assumed to be independent."""
    pairs = scored_pairs(rankings)
    prompts = [pair.prompt for pair in pairs]
    won = wins(pairs, lambda answer: answer.score)
    scores: dict[int, list[float]] = defaultdict(list)
    for answer in (answer for _, answers in rankings for answer in answers):
        scores[answer.rank].append(answer.score)

    def place(pair: ScoredPair) -> tuple[int, int, int]:
        return pair.ranks, pair.worse.rank - pair.better.rank, pair.better.rank

    return Evaluation(
        answers=len({(prompt, answer.text) for prompt, answers in rankings for answer in answers}),
        accuracy=accuracy_of(won, prompts),
        baselines={name: compare(won, wins(pairs, worth), prompts) for name, worth in BASELINES.items()},
        by_kind=accuracies(pairs, won, place, lambda p: pair_kind(p[2], p[1] + p[2], p[0])),
        by_length_gap=accuracies(pairs, won, lambda pair: pair.length_gap, gap_kind),
        calibration=expected_calibration_error([pair.margin for pair in pairs]),
        scores_by_rank={
            rank: Scores(len(own), fmean(own), pstdev(own), min(own), max(own)) for rank, own in sorted(scores.items())
        },
    )


# --- For people ---------------------------------------------------------------------------------


def print_evaluation(evaluation: Evaluation, quantized: dict[str, Agreement], console: Console) -> None:
    """Print all of an evaluation, with a warning for each baseline that the model doesn't beat."""
    total = evaluation.accuracy
    console.print(f"{total.pairs:,} pairs of {evaluation.answers:,} answers to {total.prompts:,} prompts")
    table = _table("all pairs", "pairs", "right", "95 % interval", "beaten")
    table.add_row("the model", *_cells(total), "")
    for name, rule in evaluation.baselines.items():
        table.add_row(name, *_cells(rule.accuracy), f"{'yes' if rule.beaten else 'no'}, {_p(rule.p)}")
    _print(table, console)
    for heading, parts in {
        "pairs by rank": evaluation.by_kind,
        "better answer, in tokens": evaluation.by_length_gap,
    }.items():
        table = _table(heading, "pairs", "right", "95 % interval")
        for name, part in parts.items():
            table.add_row(name, *_cells(part))
        _print(table, console)
    table = _table("scores by rank", "answers", "mean", "std", "min", "max")
    for rank, s in evaluation.scores_by_rank.items():
        numbers = (f"{value:.3f}" for value in (s.mean, s.std, s.min, s.max))
        table.add_row(f"{rank}{', the best' if rank == 0 else ''}", f"{s.answers:,}", *numbers)
    _print(table, console)
    if quantized:
        table = _table("against float32", "same order", "mean |Δscore|", "max |Δscore|")
        for loading, a in quantized.items():
            table.add_row(loading, f"{a.same_order:.1%}", f"{a.mean_difference:.4f}", f"{a.max_difference:.4f}")
        _print(table, console)
    console.print(f"\nexpected calibration error    {evaluation.calibration.error:.3f}\n")
    for name, rule in evaluation.baselines.items():
        if not rule.beaten:
            told = f"better on {rule.ahead:,} of {total.prompts:,} prompts, worse on {rule.behind:,}, {_p(rule.p)}"
            console.print(Text(f"WARNING: not shown to beat '{name}': {told}.", "bold yellow"))


def _cells(accuracy: Accuracy) -> tuple[str, str, str]:
    low, high = accuracy.interval
    return f"{accuracy.pairs:,}", f"{accuracy.accuracy:.1%}", f"{low:.1%} – {high:.1%}"


def _print(table: Table, console: Console) -> None:
    console.print()
    console.print(table)


def _table(heading: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(heading, min_width=26)  # so that the tables stand in line
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, min_width=15 if "interval" in name else 7)
    return table


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def output_files(folder: str | Path) -> tuple[Path, Path]:
    """The two files of an evaluation in `folder`. Raises `UserError` if one is there already."""
    paths = Path(folder) / "evaluation.json", Path(folder) / "reliability.png"
    for path in paths:
        refuse_existing(path)
    return paths


def write_evaluation(
    folder: str | Path, evaluation: Evaluation, quantized: dict[str, Agreement], facts: dict[str, Any]
) -> None:
    """Write `evaluation.json`, which begins with `facts`, and `reliability.png` as new files."""
    json_file, png_file = output_files(folder)
    against = {loading: asdict(a) for loading, a in quantized.items()}
    image = io.BytesIO()
    plot_reliability(evaluation.calibration).savefig(image, format="png", dpi=150)
    with new_file(json_file) as stream:
        stream.write(to_json(facts | asdict(evaluation) | {"against_float32": against}, indent=2) + "\n")
    with png_file.open("xb") as file:
        file.write(image.getvalue())


def plot_reliability(calibration: Calibration) -> Any:
    """A figure of accuracy against confidence, with the number of pairs of each bin below it.

    Points on the diagonal are calibrated; below it the model is too sure. Bars are Wilson's intervals of each bin, its
    pairs taken for independent.
    """
    from matplotlib.figure import Figure  # without pyplot: it needs no display and leaves nothing open

    bins = calibration.bins
    confidences, rights = [b.confidence for b in bins], [b.accuracy for b in bins]
    intervals = [wilson_interval(b.accuracy * b.pairs, b.pairs) for b in bins]
    errors = [[b.accuracy - low for b, (low, _) in zip(bins, intervals, strict=True)]]
    errors += [[high - b.accuracy for b, (_, high) in zip(bins, intervals, strict=True)]]
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot((0.5, 1), (0.5, 1), color="0.6", linestyle="--", label="calibrated")
    upper.errorbar(confidences, rights, errors, fmt="o-", capsize=3, label="the model, 95 % intervals")
    upper.set(ylim=(-0.03, 1.03), ylabel="share of pairs put right")
    upper.set_title(f"expected calibration error {calibration.error:.3f}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    upper.grid(alpha=0.3)
    lower.bar([b.low for b in bins], [b.pairs for b in bins], 0.5 / BINS, align="edge", edgecolor="white")
    lower.set(xlim=(0.5, 1), xlabel="confidence σ(|r₁ − r₂|)", ylabel="pairs")
    return figure
