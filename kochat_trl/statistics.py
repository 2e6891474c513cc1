"""Intervals and tests of the figures that are shown."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

# Quantiles of Student's t at 0.975 for 1, 2, … degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of two or more values that are normally distributed."""
    freedom, z = len(values) - 1, 1.95996
    quantile = T_95[freedom - 1] if freedom <= len(T_95) else z + (z**3 + z) / (4 * freedom)  # Cornish and Fisher
    return quantile * stdev(values) / math.sqrt(len(values))


def sign_test(one: int, other: int) -> float:
    """The two-sided p of `one` against `other` votes if both were as likely; exact, in whole numbers."""
    ways = tail = 1  # ways for 0 coins of all to fall heads; for 0, 1, ... of them
    for heads in range(min(one, other)):
        ways = ways * (one + other - heads) // (heads + 1)
        tail += ways
    return min(1.0, 2 * tail / 2 ** (one + other))


_Z_95 = statistics.NormalDist().inv_cdf(0.975)


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of ``scores`` and the ends of its normal 95 % interval."""
    if len(scores) < 2:
        raise ValueError(f"An interval needs at least 2 scores, got {len(scores)}")
    mean = statistics.fmean(scores)
    half_width = _Z_95 * statistics.stdev(scores) / math.sqrt(len(scores))
    return mean, mean - half_width, mean + half_width


Z = NormalDist().inv_cdf(0.975)  # 1.96, of a 95 % interval


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a proportion: every p that is within z standard errors of what was seen.

    With p̂ = successes / trials and z = 1.96 its ends are (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n), where
    (p̂ − p)² = z² p(1 − p)/n. A draw is half a success. It varies less than a coin does, so draws make the interval
    wider than need be. Source: Wilson, JASA 22 (1927).
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
    sizes: dict[str, int] = defaultdict(int)
    for prompt, value in zip(prompts, won, strict=True):
        added[prompt] += value - mean
        sizes[prompt] += 1
    fewest = len(won) ** 2 / sum(size**2 for size in sizes.values())
    if len(sizes) == 1 or len(set(won)) == 1:
        return fewest
    variance = len(sizes) / (len(sizes) - 1) * sum(value**2 for value in added.values()) / len(won) ** 2
    return min(max(mean * (1 - mean) / variance, fewest), len(won)) if variance else len(won)
