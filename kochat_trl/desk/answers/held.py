"""Models that are loaded once and kept; they answer and score for whoever asks, one at a time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from threading import Event, Lock
from typing import Any

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import Response, answer_ids
from kochat_trl.errors import UserError
from kochat_trl.models.loading import base_of, is_adapter, load_adapter, load_causal_lm
from kochat_trl.models.tokenizer import check_same_tokens, load_tokenizer
from kochat_trl.reward.score import LOADING, Loading, load_scorer, score_ids
from kochat_trl.rows.encode import encode_prompt
from kochat_trl.settings.keys import ModelArguments

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel


def _telling(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load`, whose last argument is a path, with whatever goes wrong as a `UserError`."""

    @wraps(load)
    def load_or_tell(*args: Any) -> Any:
        try:
            return load(*args)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{args[-1]} can't be loaded: {error}") from error

    return load_or_tell


def _leaves_base(path: str) -> bool:
    """Whether the base of `path` stays as it is under it: biases change it, and LoRA that starts from a part of it."""
    config = PeftConfig.from_pretrained(path) if is_adapter(path) else LoraConfig()
    plain = isinstance(config, LoraConfig) and config.bias == "none" and config.kasa_config is None
    return plain and config.init_lora_weights is True


class HeldModels:
    """Policies and reward models, each loaded when it is first asked for, and kept; adapters of a base share it.

    Whoever asks, from any thread, waits for a turn: torch's generator is global, and so is which adapter of a base is
    on. A model is a folder or a name on the Hub. What can't be loaded is a `UserError` each time that it is asked for.
    """

    def __init__(self, loading: Loading = "float32"):
        self._model_args = ModelArguments(dtype="float32", **LOADING[loading])
        self._tokenizer = cache(_telling(load_tokenizer))
        self._scorer = cache(_telling(lambda path: load_scorer(path, loading, self._tokenizer(path))))
        self._policies: dict[tuple[str, ...], Any] = {}  # by what they share
        self._next, self._computing = Lock(), Lock()

    def load(self, path: str) -> None:
        """Load a model that answers. Raises `UserError` if it can't be."""
        with self.turn():
            self._tokenizer(path)
            self._policy(path)

    def answer(
        self,
        path: str,
        prompt: Prompt,
        settings: dict[str, Any],
        seed: int,
        show: Callable[[str], None] | None = None,
        stop: Event | None = None,
    ) -> Response:
        """The answer of the model `path` by `settings` of `decoding`: always the same one for the same arguments.

        `show` and `stop` are those of `answer_ids`, which says what is raised; what `show` raises ends the answer.
        """
        with self.turn():
            if stop and stop.is_set():
                return Response("", (), False)
            tokenizer, model = self._tokenizer(path), self._policy(path)
            ids = encode_prompt(tokenizer, prompt.messages)
            torch.manual_seed(seed)
            plain = isinstance(model, PeftModel) and not is_adapter(path)
            with model.disable_adapter() if plain else nullcontext():
                return answer_ids(model, tokenizer, ids, settings, show, stop)

    def score(self, reward_model: str, path: str, prompt: Prompt, response: Response) -> float:
        """The reward model's score of a response of the model `path`, as it was generated, also where it has no end.

        Raises `UserError` if their vocabularies differ, and as `score_ids` does.
        """
        with self.turn():
            tokenizer, own = self._tokenizer(path), self._tokenizer(reward_model)
            check_same_tokens(tokenizer, path, own, reward_model)
            ids = [*encode_prompt(tokenizer, prompt.messages), *response.ids]
            return score_ids(self._scorer(reward_model), tokenizer, [ids])[0]

    @_telling
    def _policy(self, path: str) -> Any:
        """The model `path`, or its base where that has adapters, with its own adapter on if it is one."""
        base, revision = base_of(path)
        shared = (os.path.realpath(base), revision, *([] if _leaves_base(path) else [path]))
        model = self._policies.pop(shared, None)  # until all has gone well: a broken adapter may be half on it
        if model is None:
            model = load_causal_lm(path, self._model_args, self._tokenizer(path)).to(PartialState().device)
        if is_adapter(path):
            name = path.encode().hex()  # of a module, so without dots
            if not (isinstance(model, PeftModel) and name in model.peft_config):
                model = load_adapter(model, path, name=name)
            model.set_adapter(name, inference_mode=True)
        self._policies[shared] = model
        return model

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else computes meanwhile."""
        with self._next:  # one who waits goes before one who comes back
            self._computing.acquire()
        try:
            yield
        finally:
            self._computing.release()
