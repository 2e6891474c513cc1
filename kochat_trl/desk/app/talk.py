"""Talk: one question to several models, whose answers come as they are generated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import PRESETS, decoding
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.errors import UserError

SILENT = 0.2  # seconds
SLIDERS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")


def presets() -> dict[str, dict[str, Any]]:
    """What the page's sliders are set to by each preset."""
    return {name: {field: decoding(name)[field] for field in SLIDERS} for name in PRESETS}


def talk(
    models: HeldModels,
    paths: Sequence[str],
    prompt: Prompt,
    preset: str,
    settings: Mapping[str, Any],
    seed: int,
    reward_model: str | None = None,
) -> Iterator[dict[str, Any]]:
    """What becomes of a question to the models `paths`, one after another; `settings` are over the preset's.

    Of each, by its place `model`: any number of `text`, to be appended; then `done` with the whole `text`, whether it
    `ended`, its `tokens` and `score`; or else an `error`. Where nothing has come for a while, an event is empty: so the
    iterator can be closed soon, which ends the generation within a token, once a model that is being loaded is there.

    Raises `UserError`, before anything is generated, for a preset or settings that `decoding` refuses.
    """
    chosen = decoding(preset, **settings)
    stop, events = Event(), SimpleQueue[Any]()

    def ask(i: int, path: str) -> dict[str, Any]:
        def show(text: str) -> None:
            events.put({"model": i, "text": text})

        try:
            answer = models.answer(path, prompt, chosen, seed, show, stop)
            score = models.score(reward_model, path, prompt, answer) if reward_model and not stop.is_set() else None
        except UserError as error:
            return {"model": i, "error": str(error)}
        except Exception as error:  # of the libraries: memory that is full, logits that are no numbers
            return {"model": i, "error": f"{path} can't answer: {error!r}"}
        told = {"text": answer.text, "ended": answer.ended, "tokens": len(answer.ids), "score": score}
        return {"model": i, "done": True} | told

    def ask_all() -> None:
        try:
            for i, path in enumerate(paths):
                if not stop.is_set():
                    events.put(ask(i, path))
            events.put(None)
        except BaseException as error:
            events.put(error)

    return _events(ask_all, events, stop)


def _events(ask_all: Callable[[], None], events: SimpleQueue[Any], stop: Event) -> Iterator[dict[str, Any]]:
    """What `ask_all`, in a thread of its own, puts there until it puts None, or the error that it ends in."""
    Thread(target=ask_all, name="talk", daemon=True).start()
    try:
        while (event := _next(events)) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        stop.set()


def _next(events: SimpleQueue[Any]) -> Any:
    try:
        return events.get(timeout=SILENT)
    except Empty:
        return {}
