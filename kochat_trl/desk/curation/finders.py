"""Faults of records that recipes can use, each found in one way: `audit.py` counts what `clean.py` drops.

A finder takes items and yields each one that has a fault, with the fault's name in `faults.py`. Of a record that
recipes refuse that is all that is found: nothing else about it matters, and `clean` has dropped it before. Records are
compared by what recipes read in them, so the order of fields, their names, or a field of no use makes no difference.
`audit` looks at records as they are, `clean` as it has mended them.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

from kochat_trl.data.layout import RawRecord
from kochat_trl.data.rankings import Tiers, disputed
from kochat_trl.data.records import Dialogue, Labelled, Prompt, Ranking, Record
from kochat_trl.data.text import has_hangul, normalized
from kochat_trl.desk.curation.texts import texts

from tqdm import tqdm

BATCH = 1000  # texts, or records, that are tokenized together


@dataclass(eq=False)
class Item:
    """The fields of a record and what recipes read in them, an example or more: none if they refuse it, and no finder
    takes it then."""

    raw: RawRecord
    records: Sequence[Record]

    @property
    def contents(self) -> tuple[str, ...]:
        """The texts that recipes read, the first prompt first, without the system message."""
        return tuple(text for record in self.records for text in contents_of(record))

    @property
    def system(self) -> str:
        return next((record.system for record in self.records if record.system), "")

    @property
    def order(self) -> Tiers | bool:
        """Which answers are better ones."""
        (record, *_) = self.records
        return record.tiers if isinstance(record, Ranking) else record.label if isinstance(record, Labelled) else ()

    @property
    def rankings(self) -> list[Ranking]:
        return [record for record in self.records if isinstance(record, Ranking)]

    @cached_property
    def prompt_key(self) -> str:
        """What two prompts have in common that are the same to a reader."""
        return prompt_key(self.records[0])


AnItem = TypeVar("AnItem", bound=Item)
Found = Iterator[tuple[AnItem, str]]
Owner = TypeVar("Owner")


def contents_of(record: Record) -> tuple[str, ...]:
    """The texts of a record in their order, without the system message."""
    if isinstance(record, Dialogue):
        return record.texts
    asked = (*record.history, record.prompt)
    if isinstance(record, Ranking):
        return (*asked, *record.completions)
    return (*asked, record.completion) if isinstance(record, Labelled) else asked


def prompt_key(record: Record) -> str:
    """What is asked, with what stands before it, as a reader sees it; of a dialogue its first question."""
    return normalized(record.texts[0] if isinstance(record, Dialogue) else "\n".join((*record.history, record.prompt)))


def asked_keys(record: Record) -> list[str]:
    """`prompt_key`, and of a dialogue each of its questions with what stands before it."""
    texts = record.texts if isinstance(record, Dialogue) else ()
    return [prompt_key(Prompt(texts[i], None, texts[:i])) for i in range(0, len(texts), 2)] or [prompt_key(record)]


def _judged(record: Record) -> Sequence[str]:
    """The texts that Hangul is asked of."""
    if isinstance(record, Dialogue):
        return record.texts[1::2]
    if isinstance(record, Ranking):
        return record.completions
    return [record.completion if isinstance(record, Labelled) else record.prompt]


def written_texts(raw: RawRecord) -> list[tuple[str, str]]:
    """Each text that isn't blank, read by recipes or not, after what it is, one of `faults.ROLES`."""
    return [(role, text) for role, text in texts(raw).values() if text.strip()]


def own_faults(items: Sequence[AnItem]) -> Found[AnItem]:
    """`replacement`, `no_hangul`, `tied`, `three_cycle`.

    Hangul is asked of answers, or of a record for its prompt alone, of the prompt as it is read, an `input` with it. A
    ranking is a 3-cycle, or a longer one, as it stands in the file: whole and without ties, or it has one reading only.
    """
    for item in items:
        if any("\ufffd" in text for _, text in written_texts(item.raw)):
            yield item, "replacement"
        if not all(has_hangul(text) for record in item.records for text in _judged(record)):
            yield item, "no_hangul"
        for record in item.rankings:
            if len(record.tiers) < 2 or any(len(tier) > 1 for tier in record.tiers):
                yield item, "tied"
            if record.ranking is not None and disputed(record.ranking, len(record.completions)):
                yield item, "three_cycle"


def overlaps(items: Sequence[AnItem], prompts: Set[str]) -> Found[AnItem]:
    """`overlap`: something that it asks is one of `prompts`, those of other files as `asked_keys` has them."""
    return ((item, "overlap") for item in items if not prompts.isdisjoint(chain(*map(asked_keys, item.records))))


_SAME: dict[str, Callable[[Item], Any]] = {
    "duplicate": lambda item: (item.system, item.contents, item.order),
    "near_duplicate": lambda item: (tuple(map(normalized, (item.system, *item.contents))), item.order),
    "repeated_prompt": lambda item: item.prompt_key,
}


def repeats(items: Sequence[AnItem], fault: str) -> Found[AnItem]:
    """`duplicate`, `near_duplicate` or `repeated_prompt`: all but the first of those that are alike.

    An exact copy is a near one, too: to count it once, leave the duplicates out of `items`.
    """
    seen = set()
    for item in items:
        if (key := _SAME[fault](item)) in seen:
            yield item, fault
        seen.add(key)


def contradictions(items: Sequence[AnItem]) -> Found[AnItem]:
    """`contradiction`: records that prefer one completion to another, where another record prefers that to this.

    All of them are found, not only the later ones: which of them is right can't be told. Under another system message
    another completion may well be the better one.
    """
    having: dict[tuple[tuple[str, str], Any, Any], set[int]] = {}  # prompt, better, worse → places in `items`
    for place, item in enumerate(items):
        prompt = (normalized(item.system), item.prompt_key)
        for record in item.records:
            if isinstance(record, Labelled):
                judged = normalized(record.completion)
                better, worse = (judged, None) if record.label else (None, judged)
                having.setdefault((prompt, better, worse), set()).add(place)
            elif isinstance(record, Ranking):
                completions = list(map(normalized, record.completions))
                for i, j, _ in record.pairs():
                    having.setdefault((prompt, completions[i], completions[j]), set()).add(place)
    for (prompt, better, worse), places in having.items():
        both = places | having.get((prompt, worse, better), places)
        if better != worse and (prompt, worse, better) in having and len(both) > 1:
            yield from ((items[place], "contradiction") for place in both)


def bad_tokens(items: Sequence[AnItem], tokenizer: Any) -> Found[AnItem]:
    """`unknown_token` and `round_trip`, of any text of the record."""
    written = [(item, text) for item in items for _, text in written_texts(item.raw)]
    return ((item, fault) for item, _, faults in tokenized(written, tokenizer) for fault in faults)


def tokenized(
    written: Sequence[tuple[Owner, str]], tokenizer: Any, desc: str = "Tokenizing"
) -> Iterator[tuple[Owner, int, list[str]]]:
    """For each text by itself, without template: whose it is, how many tokens it makes, and what is wrong with them."""
    for batch in _batches(written, desc):
        plain = [text.encode(errors="replace").decode() for _, text in batch]  # it takes no half characters
        rows = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
        back = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for (owner, text), ids, decoded in zip(batch, rows, back, strict=True):
            faults = {"unknown_token": tokenizer.unk_token_id in ids, "round_trip": decoded != text}
            yield owner, len(ids), [fault for fault, found in faults.items() if found]


def overlong(items: Sequence[AnItem], tokenizer: Any, max_length: int) -> Found[AnItem]:
    """`overlong`: the longest row of the record is."""
    return ((item, "overlong") for item, length in row_lengths(items, tokenizer) if length > max_length)


def row_lengths(items: Sequence[AnItem], tokenizer: Any, desc: str = "Tokenizing") -> Iterator[tuple[AnItem, int]]:
    """The tokens of each record's longest row in the chat template. A completion that isn't ranked makes none."""
    from kochat_trl.rows.encode import encode_dialogues, encode_prompts

    for batch in _batches(items, desc):
        rows: list[tuple[AnItem, Any]] = []
        for item in batch:
            for record in item.records:
                if isinstance(record, Ranking):
                    rows += [(item, record.messages(i)) for tier in record.tiers for i in tier]
                else:
                    rows.append((item, record.messages))
        inputs = [row for _, row in rows]
        if isinstance(batch[0].records[0], Prompt):
            lengths = [len(ids) for ids in encode_prompts(tokenizer, inputs)]
        else:
            lengths = [len(ids) for ids, _ in encode_dialogues(tokenizer, inputs)]
        longest = dict.fromkeys(batch, 0)
        for (item, _), length in zip(rows, lengths, strict=True):
            longest[item] = max(length, longest[item])
        yield from longest.items()


def _batches(rows: Sequence[Any], desc: str) -> Iterator[Sequence[Any]]:
    for start in tqdm(range(0, len(rows), BATCH), desc=desc, delay=2, leave=False):
        yield rows[start : start + BATCH]
