"""Intervals and tests of the figures that are shown.

scipy.stats takes most of a second to load, so it is loaded where a figure needs it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)  # 1.96, of a 95 % interval


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of two or more values that are normally distributed.

    t s / √n, t the quantile of Student's distribution with n − 1 degrees of freedom. Source: Student, Biometrika 6
    (1908).
    """
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def sign_test(one: int, other: int) -> float:
    """The two-sided p of `one` against `other` votes if both were as likely: exact, 1 without votes.

    It is 2 Σ_{i ≤ min} C(n, i) / 2ⁿ, at most 1. Source: Conover, Practical Nonparametric Statistics (1999), 3.4.
    """
    from scipy.stats import binomtest

    return float(binomtest(one, one + other).pvalue) if one + other else 1.0


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two or more scores and the ends of its 95 % interval, mean ± z s / √n: normal, as for many scores."""
    if len(scores) < 2:
        raise ValueError(f"An interval needs at least 2 scores, got {len(scores)}")
    mean, half_width = fmean(scores), Z * stdev(scores) / math.sqrt(len(scores))
    return mean, mean - half_width, mean + half_width


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a proportion: every p that is within z standard errors of what was seen.

    With p̂ = successes / trials and z = 1.96 its ends are (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n), where
    (p̂ − p)² = z² p(1 − p)/n. A draw is half a success. It varies less than a coin does, so draws make the interval
    wider than need be. (scipy has it for whole numbers only.) Source: Wilson, JASA 22 (1927).
    """
    share = successes / trials
    middle = share + Z**2 / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return max(0.0, min(share, (middle - half) / scale)), min(1.0, max(share, (middle + half) / scale))  # if rounded


def effective_size(won: Sequence[float], prompts: Sequence[str]) -> float:
    """How many pairs, each of a prompt of its own, would tell as much about the accuracy as these do.

    The three pairs of a ranking share answers: one bad score loses two of them. So the accuracy's variance is taken
    from what each of G prompts adds to it, G/(G − 1) Σ_g (Σ_i (won_i − mean))² / n², and the n pairs are worth
    mean (1 − mean) / variance. That is held to n at most, and to n² / Σ_g n_g² at least: the pairs of a prompt then all
    say the same. Where nothing varies, it is the least. Sources: Kish, Survey Sampling (1965); for Wilson's interval
    with it, Franco et al., Journal of Survey Statistics and Methodology 7 (2019).
    """
    mean = fmean(won)
    added: dict[str, float] = defaultdict(float)
    for prompt, value in zip(prompts, won, strict=True):
        added[prompt] += value - mean
    sizes = Counter(prompts)
    fewest = len(won) ** 2 / sum(size**2 for size in sizes.values())
    if len(sizes) == 1 or len(set(won)) == 1:
        return fewest
    variance = len(sizes) / (len(sizes) - 1) * sum(value**2 for value in added.values()) / len(won) ** 2
    return min(max(mean * (1 - mean) / variance, fewest), len(won)) if variance else len(won)
