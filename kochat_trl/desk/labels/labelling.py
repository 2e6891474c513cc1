"""People judge the items of a queue, several at once, into one journal: what a terminal and the page stand on."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from threading import Condition, RLock, Thread
from typing import Literal

from kochat_trl.data.rankings import Tiers
from kochat_trl.data.records import Prompt
from kochat_trl.data.text import visible
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Journal, Judgement, Picked, now
from kochat_trl.desk.labels.queue import Queue
from kochat_trl.errors import UserError

logger = logging.getLogger(__name__)
HELD = 900.0  # seconds for which an item is kept for whom it is shown to
AHEAD = 8  # items that are made before anybody judges them


@dataclass(frozen=True)
class Turn:
    """What an annotator is to judge: `item`, its answers' indices as `shown`, and how it was `picked`.

    `item` is None if nothing is `left`, or if the answers to what is left are still being made, or are before others.
    `minutes` is how long what is left takes at the annotator's own pace, the median; None before the first judgement.
    `last` is the judgement that an undo takes back. `trouble` is what the making of answers met, if it met any.
    """

    item: Item | None
    picked: Picked
    shown: tuple[int, ...]
    done: int
    left: int
    minutes: int | None
    last: Judgement | None
    trouble: str | None


_NONE: tuple[None, Picked] = None, "order"


class Labelling:
    """What may be judged is `queue`'s; what was is `journal`'s. Every method may be called from any thread."""

    def __init__(self, journal: Journal, queue: Queue, seed: int = 0, clock: Callable[[], float] = time.monotonic):
        self.journal, self.queue, self.seed = journal, queue, seed
        self._clock, self._lock = clock, RLock()
        self._changed = Condition(self._lock)
        self.coming = 0  # prompts whose answers are still to be made
        self.trouble: str | None = None  # what making answers met last
        self._held: dict[str, tuple[str, float]] = {}  # item → who has it on the screen, and since when
        self._maker: Thread | None = None
        self._again: dict[str, tuple[Item, Picked]] = {}  # annotator → what was taken back

    def make_items(self, prompts: Sequence[Prompt], answers_to: Callable[[Prompt], tuple[str, ...]]) -> None:
        """Add an item for each prompt, in a thread that stays a few ahead of those who judge.

        A prompt without two different answers is left out, and so is one for which `answers_to` raises `UserError`:
        each is logged, and `Turn.trouble` has the last. Any other error ends it.
        """
        self.coming = len(prompts)

        def make() -> None:
            for prompt in prompts:
                with self._changed:
                    self._changed.wait_for(lambda: not self.coming or self.queue.unseen(self.journal.state) < AHEAD)
                    if not self.coming:
                        return
                answers, trouble, ends = tuple[str, ...](), "it has no two different answers", False
                try:
                    answers = answers_to(prompt)
                except UserError as error:  # of this prompt; the others go on
                    trouble = str(error)
                except Exception as error:
                    trouble, ends = f"{error!r}; no more answers are made", True
                with self._changed:
                    self.coming = 0 if ends else max(0, self.coming - 1)
                    if len(answers) > 1:
                        self.queue.items.append(Item(prompt, answers))
                    else:
                        self.trouble = f"left out: {prompt.prompt!r}: {trouble}"
                        logger.warning("%s", visible(self.trouble))
                    self._changed.notify_all()

        self._maker = Thread(target=make, daemon=True)
        self._maker.start()

    def close(self) -> None:
        """Make no more answers; returns when the one that is being made is done."""
        with self._changed:
            self.coming = 0
            self._changed.notify_all()
        if self._maker:
            self._maker.join()

    def turn(self, annotator: str, wait: bool = False) -> Turn:
        """What is next, which is then kept for `annotator` for a while: two who judge at once see two items. It stays
        next until it is judged. With `wait`, answers that are being made are waited for."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._left(annotator) or not self.coming)
            found = self._left(annotator)
            again = self._again.get(annotator)
            mine = {id for id, (who, _) in self._held.items() if who == annotator}
            found.sort(key=lambda it: (it != again, it[0].id not in mine))
            free = (it for it in found if not self._is_before_others(it[0], annotator))
            item, picked = next(free, _NONE)
            self._held = {it: held for it, held in self._held.items() if held[0] != annotator}
            if item:
                self._held[item.id] = annotator, self._clock()
            own = self.journal.state.by(annotator)
            left = len(found) + self.coming
            pace = median(judgement.seconds for judgement in own.values()) if own else None
            minutes = None if pace is None else max(1, round(left * pace / 60))
            shown = item.shown_to(annotator, self.seed) if item else ()
            last = self.journal.state.last(annotator)
            return Turn(item, picked, shown, len(own), left, minutes, last, self.trouble)

    def judge(
        self, annotator: str, item_id: str, verdict: Tiers | Literal["all_bad", "skip"], seconds: float, note: str = ""
    ) -> bool:
        """Put a judgement on disk; False, and nothing is written, if the annotator has judged that item, as when an
        answer of this got lost and is asked for again. Raises `UserError` for an item that there is none of."""
        with self._lock:
            item = self.item(annotator, item_id)
            left = {item.id: picked for item, picked in self._left(annotator)}
            if item_id not in left and item_id in self.journal.state.by(annotator):
                return False
            picked = left.get(item_id, "overlap")  # somebody else was faster: what was judged is kept all the same
            shown = item.shown_to(annotator, self.seed)
            self.journal.add(Judgement(item, verdict, annotator, now(), seconds, shown, picked, note))
            self._again.pop(annotator, None)
            self._held = {id: held for id, held in self._held.items() if held[0] != annotator}
            self._changed.notify_all()
            return True

    def item(self, annotator: str, item_id: str) -> Item:
        """The item with this id that `annotator` may judge, or has judged. Raises `UserError` if there is none."""
        with self._lock:
            known = {item.id: item for item in self.queue.items}
            known |= {it: judgement.item for it, judgement in self.journal.state.by(annotator).items()}
            known |= {item.id: item for item, _ in self._left(annotator)}
            if item_id not in known:
                raise UserError(f"there is no item {item_id!r} to judge: it is of another file")
            return known[item_id]

    def undo(self, annotator: str, item_id: str | None = None) -> Judgement | None:
        """Take back what the annotator judged last, which is then next; None if there is nothing, or if it isn't of
        `item_id`, as when it was taken back before."""
        with self._lock:
            last = self.journal.state.last(annotator)
            if last is None or item_id not in (None, last.item.id):
                return None
            self.journal.undo(annotator)
            if last.picked != "talk":
                self._again[annotator] = last.item, last.picked
            return last

    def prefer(self, annotator: str, prompt: Prompt, answers: tuple[str, ...], best: int, seconds: float) -> Judgement:
        """Put on disk that of different answers to one question that of index `best` is better than the others."""
        if len(set(answers)) < 2 or not 0 <= best < len(answers):
            raise UserError("a preference needs two different answers, and which of them is better")
        different = tuple(dict.fromkeys(answers))
        place = different.index(answers[best])
        rest = tuple(i for i in range(len(different)) if i != place)
        item, shown = Item(prompt, different), tuple(range(len(different)))
        with self._lock:
            judgement = Judgement(item, ((place,), rest), annotator, now(), seconds, shown, "talk")
            self.journal.add(judgement)
            return judgement

    @property
    def standing(self) -> list[Judgement]:
        """All that stands."""
        with self._lock:
            return self.journal.state.standing

    def _left(self, annotator: str) -> list[tuple[Item, Picked]]:
        again = self._again.get(annotator)
        left = self.queue.left(self.journal.state, annotator)
        return [again, *(it for it in left if it[0].id != again[0].id)] if again else left

    def _is_before_others(self, item: Item, annotator: str) -> bool:
        who, since = self._held.get(item.id, (annotator, 0.0))
        return who != annotator and self._clock() - since < HELD
