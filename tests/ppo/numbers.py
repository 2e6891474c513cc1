"""Tables of numbers in float64, rows of many lengths, and how closely two of them agree."""

import torch

LN2 = 0.6931471805599453
LENGTHS = (5, 1, 3, 7)  # the longest fills its row


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


MASK = mask_of(LENGTHS, 7)


def same(ours, expected, **tolerance):
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-13}
    if not isinstance(expected, tuple):
        expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, **tolerance)
