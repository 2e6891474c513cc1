"""Judgements → KoChatGPT's rankings, which reward training and all else here read as they are."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from kochat_trl.desk.labels.journal import Judgement


def ranking_records(judgements: Iterable[Judgement]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """A ranking record of each judgement that prefers an answer, and how many others there are: "all_bad", "skip" and
    "tied", where all answers are as good.

    The completions are in the file's order, `ranking` is best first with ties as inner lists; who judged, and when,
    stands beside. An item that two people judged gives two records.
    """
    records = []
    without: Counter[str] = Counter()
    for judgement in judgements:
        tiers = judgement.tiers
        if tiers is None or len(tiers) < 2:
            without[judgement.verdict if isinstance(judgement.verdict, str) else "tied"] += 1
            continue
        record = judgement.item.prompt.fields
        record |= {f"completion_{i}": answer for i, answer in enumerate(judgement.item.answers)}
        record["ranking"] = [tier[0] if len(tier) == 1 else list(tier) for tier in tiers]
        records.append(record | {"annotator": judgement.annotator, "judged_at": judgement.judged_at})
    return records, without
