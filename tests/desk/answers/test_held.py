"""Held models answer and score as those do that are loaded anew, whoever asked what before."""

import shutil
from pathlib import Path
from threading import Event, Thread

from benchmarks.architectures import CHATML, byte_tokenizer
from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers import held
from kochat_trl.desk.answers.generate import compare_decoding, decoding, generate_answers
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.errors import UserError
from kochat_trl.models.loading import ADAPTER_WEIGHTS, load_causal_lm, load_policy
from kochat_trl.models.template import answer_text
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.score import LOADING, load_scorer
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import random_adapter

import pytest
from peft import LoraConfig, get_peft_model

PROMPT, SYSTEM = Prompt("반가워요"), Prompt("네", "존댓말로 답해.", ("반가워요", "저도 반가워요."))
SAMPLE, BEAM = decoding("sample", max_new_tokens=12), decoding("course", max_new_tokens=6)
ENDLESS = decoding("sample", max_new_tokens=80, min_new_tokens=80)


@pytest.fixture(scope="module")
def tiny_ppo(tiny_base, tiny_tokenizer, made_once):
    """Another adapter of the base of `tiny_sft`."""
    return str(made_once("held-ppo", random_adapter(load_causal_lm, tiny_base, tiny_tokenizer, seed=2)))


@pytest.fixture
def pissa(tiny_base, tiny_tokenizer, tmp_path):
    """An adapter that takes its first weights out of its base."""
    model = load_causal_lm(tiny_base, ModelArguments(dtype="float32"), tiny_tokenizer)
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa", r=4)
    get_peft_model(model, config).save_pretrained(tmp_path / "pissa")
    tiny_tokenizer.save_pretrained(tmp_path / "pissa")
    return str(tmp_path / "pissa")


def alone(path, prompt, settings, seed, loading="float32"):
    """What a model answers that is loaded for it."""
    tokenizer = load_tokenizer(path)
    model = load_policy(path, ModelArguments(dtype="float32", **LOADING[loading]), tokenizer)
    return generate_answers(model, tokenizer, [prompt], settings, seed=seed)[0]


@pytest.mark.parametrize("loading", ["float32", "int8"])
def test_an_answer_depends_on_nothing_that_was_asked_before(loading, tiny_base, tiny_sft, tiny_ppo):
    asked = [(path, PROMPT, SAMPLE, seed) for path in (tiny_base, tiny_sft, tiny_ppo) for seed in (0, 1)]
    asked += [(tiny_sft, SYSTEM, SAMPLE, 0), (tiny_ppo, PROMPT, BEAM, 0), (tiny_base, PROMPT, BEAM, 3)]
    expected = [alone(*each, loading) for each in asked]
    assert len(set(expected)) > 5
    models = HeldModels(loading)
    for order in (range(len(asked)), reversed(range(len(asked))), (4, 0, 2, 0, 8, 7)):
        for i in order:
            assert models.answer(*asked[i]) == expected[i]


def test_adapters_share_their_base_unless_they_change_it(tiny_base, tiny_sft, tiny_ppo, pissa, monkeypatch):
    loaded = []

    def counting(path, *rest):
        loaded.append(path)
        return load_causal_lm(path, *rest)

    monkeypatch.setattr(held, "load_causal_lm", counting)
    models = HeldModels()
    paths = [tiny_sft, tiny_base, pissa, tiny_ppo, tiny_base, pissa, tiny_sft]
    assert [models.answer(p, PROMPT, SAMPLE, 0) for p in paths] == [alone(p, PROMPT, SAMPLE, 0) for p in paths]
    assert loaded == [tiny_sft, pissa]


def test_an_answer_is_shown_as_it_comes_and_that_of_beams_at_its_end(tiny_sft):
    for settings in (ENDLESS, BEAM):
        pieces = []
        answer = HeldModels().answer(tiny_sft, PROMPT, settings, 0, pieces.append)
        assert "".join(pieces) == answer.text
        assert len(pieces) == 1 if settings is BEAM else len(pieces) > 3
        assert answer == alone(tiny_sft, PROMPT, settings, 0)


def test_an_answer_ends_once_it_is_stopped(tiny_sft, tiny_tokenizer):
    models = HeldModels()
    whole, pieces, stop = models.answer(tiny_sft, PROMPT, ENDLESS, 0), [], Event()

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            stop.set()

    part = models.answer(tiny_sft, PROMPT, ENDLESS, 0, show, stop)
    assert part.ids == whole.ids[: len(part.ids)]
    assert (part.ended, part.text) == (False, "".join(pieces))
    assert answer_text(tiny_tokenizer, part.ids[:-2]) == pieces[0]  # then came what was shown, and one more
    assert models.answer(tiny_sft, PROMPT, ENDLESS, 0, stop=Event()) == whole
    beams = ENDLESS | {"num_beams": 3}
    assert len(models.answer(tiny_sft, PROMPT, beams, 0, stop=Event()).ids) == 80
    assert models.answer("outputs/nothing", PROMPT, ENDLESS, 0, stop=stop).ids == ()  # not even loaded


def test_beams_end_once_they_are_stopped(tiny_sft):
    class Later(Event):
        """Set when it is asked for the fifth time."""

        asked = 0

        def is_set(self):
            self.asked += 1
            return self.asked >= 5

    answer = HeldModels().answer(tiny_sft, PROMPT, ENDLESS | {"num_beams": 3}, 0, stop=Later())
    assert 1 <= len(answer.ids) <= 5


def test_a_show_that_fails_ends_the_answer_and_the_model_goes_on(tiny_sft):
    models, shown = HeldModels(), []

    def show(piece):
        shown.append(piece)
        raise ConnectionError("nobody listens")

    whole = models.answer(tiny_sft, PROMPT, ENDLESS, 0)
    with pytest.raises(ConnectionError):
        models.answer(tiny_sft, PROMPT, ENDLESS, 0, show)
    assert len(shown) == 1
    assert models.answer(tiny_sft, PROMPT, ENDLESS, 0) == whole


def test_no_room_for_an_answer(tiny_sft):
    with pytest.raises(UserError, match="answer of up to 999 don't fit the model's 128 positions"):
        HeldModels().answer(tiny_sft, PROMPT, decoding("sample", max_new_tokens=999), 0)


def test_scores_are_those_of_a_comparison(tiny_base, tiny_reward, tiny_tokenizer):
    """Also of an answer that has no end."""
    model = load_policy(tiny_base, ModelArguments(dtype="float32"), tiny_tokenizer)
    scorer = load_scorer(tiny_reward, "float32", tiny_tokenizer)
    strategies = {"short": decoding("sample", max_new_tokens=3), "long": decoding("sample", max_new_tokens=90)}
    rows = compare_decoding(model, tiny_tokenizer, [PROMPT], strategies, 0, scorer)
    rows += compare_decoding(model, tiny_tokenizer, [SYSTEM], strategies, 0, scorer)
    assert {row["ended"] for row in rows} == {False, True}
    models = HeldModels()
    for row, prompt in zip(rows, [PROMPT, PROMPT, SYSTEM, SYSTEM], strict=True):
        answer = models.answer(tiny_base, prompt, strategies[row["decoding"]], 0)
        assert (answer.text, answer.ended) == (row["completion"], row["ended"])
        assert models.score(tiny_reward, tiny_base, prompt, answer) == row["score"]


def test_a_reward_model_of_another_vocabulary(tiny_sft, tiny_reward, tmp_path):
    other = str(shutil.copytree(tiny_reward, tmp_path / "other"))
    byte_tokenizer(CHATML, "<eos>", "<|im_end|>", eos_token="<eos>").save_pretrained(other)
    models = HeldModels()
    answer = models.answer(tiny_sft, PROMPT, SAMPLE, 0)
    with pytest.raises(UserError, match=f"{other} reads other tokens than {tiny_sft}"):
        models.score(other, tiny_sft, PROMPT, answer)
    with pytest.raises(UserError, match="no score head"):
        models.score(tiny_sft, tiny_sft, PROMPT, answer)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"\0" * 99)])
def test_what_cannot_be_loaded_is_told_until_it_is_mended(spoil, tiny_base, tiny_sft, tiny_ppo, tmp_path):
    """And those on the same base answer as before."""
    folder = shutil.copytree(tiny_sft, tmp_path / "sft")
    spoil(folder / ADAPTER_WEIGHTS)
    models = HeldModels()
    others = [models.answer(path, PROMPT, SAMPLE, 0) for path in (tiny_base, tiny_ppo)]
    for _ in range(2):
        with pytest.raises(UserError, match=f"{folder} can't be loaded"):
            models.answer(str(folder), PROMPT, SAMPLE, 0)
        assert [models.answer(path, PROMPT, SAMPLE, 0) for path in (tiny_base, tiny_ppo)] == others
    shutil.copy(Path(tiny_sft) / ADAPTER_WEIGHTS, folder)
    assert models.answer(str(folder), PROMPT, SAMPLE, 0) == models.answer(tiny_sft, PROMPT, SAMPLE, 0)


def test_who_asks_at_once_gets_what_each_would_get_alone(tiny_base, tiny_sft, tiny_ppo, tiny_reward):
    models, found = HeldModels(), {}

    def ask(path):
        answers = [models.answer(path, PROMPT, SAMPLE, seed) for seed in range(6)]
        found[path] = [(answer, models.score(tiny_reward, path, PROMPT, answer)) for answer in answers]

    paths = (tiny_base, tiny_sft, tiny_ppo)
    threads = [Thread(target=ask, args=[path]) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(found)
    for path in paths:
        ask(path)
    assert together == found
    assert [found[path][0][0] for path in paths] == [alone(path, PROMPT, SAMPLE, 0) for path in paths]


def test_who_waits_goes_before_one_who_comes_back(tiny_sft):
    """As one who talks, while answers to be ranked are sampled without a pause: they take turns."""
    models, enough, sampled, waited = HeldModels(), Event(), [], []

    def sample():
        while not enough.is_set() and len(sampled) < 200:
            sampled.append(models.answer(tiny_sft, PROMPT, SAMPLE, 0))

    models.answer(tiny_sft, PROMPT, SAMPLE, 0)
    thread = Thread(target=sample)
    thread.start()
    for _ in range(15):
        before = len(sampled)
        models.answer(tiny_sft, PROMPT, SAMPLE, 1)
        waited.append(len(sampled) - before)
    enough.set()
    thread.join()
    assert max(waited) <= 2
    assert sum(waited) >= 10
