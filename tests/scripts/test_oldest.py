"""The lower bounds that `make test-oldest` installs."""

import re

from scripts.oldest import lower_bounds


def test_every_dependency_has_a_lower_bound():
    bounds = lower_bounds()
    assert [bound for bound in bounds if not re.fullmatch(r"[\w-]+(\[\w+\])?==[\d.]+", bound)] == []
    assert {"transformers", "trl", "starlette"} <= {bound.partition("==")[0] for bound in bounds}
