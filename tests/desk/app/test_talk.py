"""What becomes of a question to several models: pieces of text, ends, errors, and a person who has read enough."""

import time
from threading import Event
from threading import enumerate as threads

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import Response, decoding
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.desk.app.talk import presets, talk
from kochat_trl.errors import UserError

import pytest

PROMPT = Prompt("반가워요", "존댓말로 답해.")
LONG = {"max_new_tokens": 60, "min_new_tokens": 60}


def ended(seconds=10):
    """Whether no thread of `talk` is left, or soon is."""
    until = time.monotonic() + seconds
    while any(thread.name == "talk" for thread in threads()) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(thread.name == "talk" for thread in threads())


class Slow(HeldModels):
    """It says what it was asked, and takes its time over each piece."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def answer(self, path, prompt, settings, seed, show, stop):
        def slowly(text):
            show(text)
            time.sleep(0.03)

        self.answers.append((path, super().answer(path, prompt, settings, seed, slowly, stop)))
        return self.answers[-1][1]


@pytest.mark.parametrize("preset", ["sample", "course"])
def test_a_question_is_put_to_one_model_after_another(tiny_base, tiny_sft, tiny_reward, preset):
    models, paths = HeldModels(), [tiny_base, tiny_sft, tiny_base]
    events = [event for event in talk(models, paths, PROMPT, preset, LONG, 7, tiny_reward) if event]
    assert [event["model"] for event in events] == sorted(event["model"] for event in events)
    assert ended()
    for i, path in enumerate(paths):
        *pieces, last = [event for event in events if event["model"] == i]
        answer = models.answer(path, PROMPT, decoding(preset, **LONG), 7)
        assert last == {
            "model": i, "done": True, "text": answer.text, "ended": False, "tokens": 60,
            "score": models.score(tiny_reward, path, PROMPT, answer),
        }  # fmt: skip
        assert all(piece.keys() == {"model", "text"} for piece in pieces)
        assert "".join(piece["text"] for piece in pieces) == answer.text
        assert len(pieces) == 1 if preset == "course" else len(pieces) > 3


def test_the_error_of_one_model_leaves_the_others_theirs(tiny_base, tiny_sft, tmp_path):
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / "empty"), tiny_sft, "outputs/nothing/there", tiny_base]
    events = [event for event in talk(HeldModels(), paths, PROMPT, "greedy", {"max_new_tokens": 4}, 0) if event]
    ends = [event for event in events if event.keys() != {"model", "text"}]
    assert [(event["model"], event.get("done", False)) for event in ends] == [
        (0, False), (1, True), (2, False), (3, True)
    ]  # fmt: skip
    assert "no tokenizer at" in ends[0]["error"]
    assert ends[1]["score"] is None
    assert ended()


def test_what_fits_no_model_is_told_for_each(tiny_base, tiny_sft):
    events = [
        event for event in talk(HeldModels(), [tiny_base, tiny_sft], Prompt("반가워요 " * 90), "greedy", {}, 0) if event
    ]
    assert [event["model"] for event in events] == [0, 1]
    assert all("don't fit the model's 128 positions" in event["error"] for event in events)


def test_a_bad_setting_is_told_before_anything_is_asked(tiny_base):
    for settings, message in (({"num_beams": -1}, "num_beams: found -1"), ({"no_such_field": 1}, "no_such_field")):
        with pytest.raises(UserError, match=message):
            talk(HeldModels(), [tiny_base], PROMPT, "sample", settings, 0)
    with pytest.raises(UserError, match="no preset 'x'"):
        talk(HeldModels(), [tiny_base], PROMPT, "x", {}, 0)
    assert ended(0)


def test_closing_it_ends_the_generation(tiny_base, tiny_sft, tiny_reward):
    models, scored = Slow(), []
    models.score = lambda *_: scored.append(0.0)
    events = talk(models, [tiny_sft, tiny_base], PROMPT, "sample", LONG, 0, tiny_reward)
    assert next(filter(None, events))["model"] == 0
    start = time.monotonic()
    events.close()
    assert time.monotonic() - start < 1
    assert ended()
    ((path, answer),) = models.answers
    assert path == tiny_sft
    assert len(answer.ids) < 30
    assert scored == []


def test_leaving_it_ends_the_generation(tiny_sft):
    models = Slow()
    for event in talk(models, [tiny_sft] * 2, PROMPT, "sample", LONG, 0):
        if event:
            break
    assert ended()
    assert len(models.answers) == 1


def test_what_nobody_foresaw_is_told_and_the_others_go_on(tiny_base):
    class Broken(HeldModels):
        def answer(self, path, *_):
            if path == "broken":
                raise ZeroDivisionError
            return super().answer(path, *_)

    events = [event for event in talk(Broken(), ["broken", tiny_base], PROMPT, "greedy", {}, 0) if event]
    assert events[0] == {"model": 0, "error": "broken can't answer: ZeroDivisionError()"}
    assert events[-1]["done"]
    assert ended()


def test_it_can_be_closed_while_a_model_says_nothing():
    seen = Event()

    class Silent(HeldModels):
        def answer(self, path, prompt, settings, seed, show, stop):
            if stop.wait(30):
                seen.set()
            return Response("", (), False)

    events = talk(Silent(), ["a"], PROMPT, "greedy", {}, 0)
    start = time.monotonic()
    assert next(events) == {}
    events.close()
    assert seen.wait(5)
    assert time.monotonic() - start < 5


def test_presets_set_every_slider():
    found = presets()
    assert found["sample"] == {
        "max_new_tokens": 64, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "repetition_penalty": 1.0, "num_beams": 1,
    }  # fmt: skip
    assert found["course"]["num_beams"] == 4
    for name, fields in found.items():
        assert decoding(name, **fields) == decoding(name)
