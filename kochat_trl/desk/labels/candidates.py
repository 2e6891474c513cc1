"""Answers to judge that are made while people judge, by models; those of files stand beside them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.desk.curation.build import answers_in
from kochat_trl.desk.labels.items import Item, different
from kochat_trl.desk.labels.journal import State
from kochat_trl.desk.labels.queue import drawn


def answers_to(
    prompts: Sequence[Prompt], sources: Sequence[str], models: HeldModels, settings: dict[str, Any], seed: int
) -> Callable[[Prompt], tuple[str, ...]]:
    """A function from each of `prompts` to the different answers of `sources` to it: a file has them, a model (folder
    or Hub name) samples them with `settings` of `decoding`, each time the same ones. A model may be named twice.

    Raises as `answers_in` does, and if a model can't be loaded.
    """
    for model in {source for source in sources if not is_file(source)}:
        models.load(model)
    files = {
        source: dict(zip(prompts, answers_in(source, prompts), strict=True)) for source in sources if is_file(source)
    }

    def find(prompt: Prompt) -> tuple[str, ...]:
        own = int(drawn(f"{seed}/{prompt}") * 2**32)
        return different(
            files[source][prompt] if source in files else models.answer(source, prompt, settings, own + number).text
            for number, source in enumerate(sources)
        )

    return find


def judged_before(state: State, prompts: Sequence[Prompt]) -> dict[Prompt, Item]:
    """The items of a journal that ask one of `prompts`: another annotator sees the answers that the first saw."""
    asked = {judgement.item.prompt: judgement.item for judgement in state.standing if judgement.picked != "talk"}
    return {prompt: asked[prompt] for prompt in prompts if prompt in asked}


def is_file(source: str) -> bool:
    """Whether a source of answers is a file of them, as against a model."""
    return Path(source).is_file()
