"""How data files are read: keys of the configs, and flags of the commands."""

import codecs
from dataclasses import dataclass, field
from typing import Literal

from kochat_trl.data.rankings import RankingOrder
from kochat_trl.data.shapes import NAMES, role_of
from kochat_trl.errors import UserError


@dataclass(kw_only=True)
class ReadingOptions:
    """What files say about themselves is enough for most of them; this is for the others."""

    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Column → what it is: `{question: prompt, 답: completion}`, with `a.b` for a field of a field and "
            "`a[].b` for one of each item; `ignore` leaves it out."
        },
    )
    encoding: str = field(default="utf-8", metadata={"help": "Of text files: `cp949` for many Korean ones."})
    plain_text: bool = field(default=False, metadata={"help": "Read a file as prompts, one a line."})
    labels: Literal["refuse", "true_only"] = field(
        default="refuse",
        metadata={"help": "SFT on answers labelled true or false: refuse them, or take the true ones."},
    )
    ranking_order: RankingOrder = field(
        default="best_first",
        metadata={"help": "How `ranking` is read: indices, best first, or (KoChatGPT's trainer) ranks by index."},
    )

    def __post_init__(self) -> None:
        for column, target in self.columns.items():
            if target not in NAMES and role_of(target) is None:
                raise UserError(f"columns: '{column}': found '{target}', expected what it is: {', '.join(NAMES)}")
        try:
            "\n".encode(codecs.lookup(self.encoding).name)  # no codec from bytes to bytes, such as `hex`
        except (LookupError, ValueError):
            raise UserError(f"encoding: found '{self.encoding}', expected one such as utf-8, cp949, utf-16") from None


DEFAULTS = ReadingOptions()
