"""Which item an annotator judges next."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from kochat_trl.desk.labels.items import Item, Scores
from kochat_trl.desk.labels.journal import Picked, State
from kochat_trl.errors import UserError

Order = Literal["in-order", "random", "uncertain"]
_PICKED: dict[Order, Picked] = {"in-order": "order", "random": "random", "uncertain": "uncertain"}


class Queue:
    """Items in the order in which they are judged.

    `in-order` is the file's, `random` one that `seed` draws, and `uncertain` begins where a reward model's scores of
    the best two answers are nearest to each other (margin sampling, Settles 2009, "Active Learning Literature Survey",
    2.1); where they are as near, by id. An item is judged by one annotator, whoever comes first, and a share `overlap`
    of them, drawn by their ids alone, by two. One that an annotator skipped is left to the others.

    Raises `UserError` if `overlap` is no share, or if an item has no scores where they are asked for.
    """

    def __init__(
        self,
        items: Sequence[Item],
        order: Order = "in-order",
        seed: int = 0,
        overlap: float = 0.0,
        scores: Scores | None = None,
    ):
        if not 0 <= overlap <= 1:
            raise UserError(f"overlap: found {overlap}, expected a share from 0 to 1")
        self.items, self.order = list(items), order
        self._overlap = overlap
        if order == "random":
            self.items.sort(key=lambda item: drawn(f"{seed}/{item.id}"))
        elif order == "uncertain":
            self.items.sort(key=lambda item: (_margin(item, scores or {}), item.id))

    def left(self, state: State, annotator: str) -> list[tuple[Item, Picked]]:
        """What `annotator` may still judge, the next one first, and how each was picked: `overlap` if it is for the
        second time."""
        judged = Counter(judgement.item.id for judgement in state.standing if judgement.verdict != "skip")
        own = state.by(annotator)
        return [
            (item, "overlap" if judged[item.id] else _PICKED[self.order])
            for item in self.items
            if item.id not in own and judged[item.id] < 1 + (drawn(f"overlap/{item.id}") < self._overlap)
        ]

    def unseen(self, state: State) -> int:
        """How many items nobody has seen."""
        seen = {judgement.item.id for judgement in state.standing}
        return sum(item.id not in seen for item in self.items)


def drawn(text: str) -> float:
    """A number from 0 to 1, uniform over texts and the same for the same one."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def _margin(item: Item, scores: Scores) -> float:
    its = scores.get(item.id, {})
    if not set(item.answers) <= its.keys():
        raise UserError(f"there are no scores of the answers to {item.prompt.prompt!r}")
    best, second = sorted((its[answer] for answer in item.answers), reverse=True)[:2]
    return best - second
