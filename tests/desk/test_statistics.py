import random
import subprocess
import sys
from math import comb
from statistics import NormalDist, stdev

from kochat_trl.desk.statistics import half_interval, mean_interval, sign_test, wilson_interval

import pytest
from scipy.stats import binomtest


def test_half_an_interval_is_of_students_t():
    for values, quantile in ((2, 12.706), (3, 4.303), (6, 2.571), (11, 2.228), (31, 2.042), (121, 1.980)):  # any table
        assert half_interval(range(values)) == pytest.approx(quantile * stdev(range(values)) / values**0.5, rel=3e-4)


def test_sign_test():
    assert sign_test(0, 0) == sign_test(5, 5) == sign_test(5, 6) == 1
    assert sign_test(0, 8) == sign_test(8, 0) == pytest.approx(2 / 256, rel=1e-12)
    assert sign_test(1, 9) == pytest.approx(2 * (1 + 10) / 1024, rel=1e-12)
    assert sign_test(8, 35) == pytest.approx(2 * sum(comb(43, heads) for heads in range(9)) / 2**43, rel=1e-12)
    normal = 2 * NormalDist().cdf(-(300 - 1) / 10_300**0.5)
    assert sign_test(5000, 5300) == sign_test(5300, 5000) == pytest.approx(normal, rel=0.01)
    assert sign_test(0, 5000) == 0  # below the least float


def test_mean_interval_by_hand():
    # The standard deviation of 0, 0, 1, 1 is sqrt(1/3), so the mean's is sqrt(1/12) = 0.288675.
    mean, low, high = mean_interval([0.0, 0.0, 1.0, 1.0])
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.959964 * 0.288675, abs=1e-5)
    assert high == pytest.approx(0.5 + 1.959964 * 0.288675, abs=1e-5)


def test_mean_interval_needs_two_scores():
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([0.5])


def test_wilson_s_interval_is_scipy_s_at_whole_numbers():
    rng = random.Random(0)
    for trials in (1, 2, 10, 263, 5000):
        for successes in (0, trials, rng.randint(0, trials)):
            expected = binomtest(successes, trials).proportion_ci(method="wilson")
            assert wilson_interval(successes, trials) == pytest.approx(tuple(expected), abs=1e-12)


def test_scipy_is_loaded_only_where_a_figure_needs_it():
    code = "import sys, kochat_trl.desk.curation.audit, kochat_trl.cli.main as m; m.make_parser(); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('scipy' in sys.modules)"], check=True)
