"""The memory that the stages take, as tables, and what fits which GPU."""

from collections.abc import Sequence

from kochat_trl.desk.workflow.memory import Footprint

from rich.console import Console
from rich.table import Table

CARDS = (6, 8, 12, 16, 24)  # GB of consumer GPUs
GB = 2**30
# What a GPU takes beside the tensors: the CUDA context, workspaces of cuBLAS, fragments. Assumed, not measured.
GPU_EXTRA = GB


def most_rows(one: Footprint, some: Footprint, many: Footprint, card_gb: float) -> int:
    """How many rows fit a card of so many GB, from the footprints of one phase with one row, with some and with many.

    From some to many the bytes grow with the rows. With one row another moment may be the fullest, such as the
    optimizer's step: where that doesn't fit, nothing does, and the answer is 0.
    """
    room = card_gb * GB - GPU_EXTRA
    a_row = (many.peak - some.peak) / (many.rows - some.rows)
    if one.peak > room:
        return 0
    return max(1, int((room - some.peak) // max(a_row, 1)) + some.rows)


def print_memory(
    one: Sequence[Footprint],
    planned: Sequence[Footprint],
    many: Sequence[Footprint],
    cards: Sequence[float],
    console: Console,
) -> None:
    """What each phase takes as `planned`, part by part, and the rows that fit each card (`most_rows`)."""
    names = list(dict.fromkeys(name for footprint in planned for name in footprint.parts))
    table = Table(title="GB at the fullest moment", title_justify="left")
    table.add_column(overflow="fold")
    for footprint in planned:
        table.add_column(f"{footprint.phase}, {footprint.rows} rows", justify="right")
    for name in names:
        table.add_row(name, *(f"{footprint.parts.get(name, 0) / GB:.3f}" for footprint in planned))
    table.add_section()
    table.add_row("peak", *(f"{footprint.peak / GB:.3f}" for footprint in planned), style="bold")
    console.print(table)

    fits = Table(title="rows that fit a GPU, 1 GB of it left for what is no tensor", title_justify="left")
    fits.add_column("GPU")
    for footprint in planned:
        fits.add_column(footprint.phase, justify="right")
    for card in cards:
        rows = [most_rows(*three, card) for three in zip(one, planned, many, strict=True)]
        enough = [count >= footprint.rows for count, footprint in zip(rows, planned, strict=True)]
        fits.add_row(f"{card:g} GB", *(f"{n}{'' if ok else ' ✗'}" for n, ok in zip(rows, enough, strict=True)))
    console.print(fits)
    console.print(
        "✗: fewer than the config asks for. Rows are per_device_train_batch_size, which counts rankings for the reward "
        "model, and for sampling local_rollout_forward_batch_size. No GPU was measured: these are the tensors of "
        "PyTorch's CPU operations (docs/hardware.md). The reward model's evaluation and the report load the base in "
        "float32, and aren't counted."
    )
