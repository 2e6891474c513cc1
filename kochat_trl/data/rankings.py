"""A ranking of k completions → (chosen, rejected) pairs.

KoChatGPT's `ranking` is a **best-first** list of completion indices: `[2, 0, 1]` says that completion 2 is the
best and completion 1 the worst. KoChatGPT's own trainer reads it as "rank of completion i" instead, which
turns 4 of the 18 pairs over the six permutations of three upside down.
"""

from collections.abc import Sequence
from itertools import combinations


def ranking_pairs(ranking: Sequence[int]) -> list[tuple[int, int]]:
    """All k·(k−1)/2 pairs `(better, worse)` of completion indices in a best-first `ranking`."""
    return list(combinations(ranking, 2))
