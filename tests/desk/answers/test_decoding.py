"""Presets, and what a person may set over them: any other value is told of, by a command and by the page alike."""

from contextlib import suppress
from types import SimpleNamespace

from kochat_trl.cli.options import fields_of
from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import FIELDS, PLAIN, PRESETS, decoding, generate_answers
from kochat_trl.errors import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

PROMPTS = [Prompt("반가워요"), Prompt("일본의 수도는 어디인가요?")]


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def test_presets():
    assert set(PRESETS) == {"greedy", "sample", "beam", "top_k", "top_p", "course"}
    for name, fields in PRESETS.items():
        assert set(fields) <= set(PLAIN)
        assert decoding(name) == PLAIN | fields
    assert decoding("course") == PLAIN | {
        "do_sample": True, "top_k": 50, "num_beams": 4, "repetition_penalty": 2.0, "no_repeat_ngram_size": 4,
        "early_stopping": True,
    }  # fmt: skip


def test_a_whole_number_is_a_number():
    found = decoding("sample", temperature=2)["temperature"]
    assert (found, type(found)) == (2.0, float)


def test_fields_of_a_command_are_read_as_yaml():
    words = ["temperature=0.7", "top_k=20", "do_sample=true", "max_new_tokens=5", "top_p={", "min_p=2026-13-45"]
    assert fields_of(SimpleNamespace(set=words)) == {
        "temperature": 0.7, "top_k": 20, "do_sample": True, "max_new_tokens": 5, "top_p": "{", "min_p": "2026-13-45"
    }  # fmt: skip
    with pytest.raises(UserError, match="--set: found 'temperature', expected FIELD=VALUE"):
        fields_of(SimpleNamespace(set=["temperature"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperatur": 1}, "Did you mean 'temperature'"),
        ({"num_return_sequences": 2}, "no 'num_return_sequences'; it has max_new_tokens, min_new_tokens"),
        ({"preset": "sample"}, "decoding has no 'preset'"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected a whole number from 1 to 32768"),
        ({"max_new_tokens": None}, "max_new_tokens: found None, expected a whole number"),
        ({"max_new_tokens": 4.0}, "max_new_tokens: found 4.0, expected a whole number"),
        ({"num_beams": -1}, "num_beams: found -1, expected a whole number from 1 to 64"),
        ({"num_beams": True}, "num_beams: found True, expected a whole number"),
        ({"temperature": 0}, "temperature: found 0, expected a number from 0.01 to 100.0"),
        ({"temperature": "x"}, "temperature: found 'x', expected a number"),
        ({"temperature": float("nan")}, "temperature: found nan, expected a number"),
        ({"top_p": 7}, "top_p: found 7, expected a number from 0.0 to 1.0"),
        ({"do_sample": 1}, "do_sample: found 1, expected true or false"),
    ],
)
def test_what_is_no_setting(fields, message):
    with pytest.raises(UserError, match=message):
        decoding("greedy", **fields)


def test_what_is_no_preset():
    with pytest.raises(UserError, match="there is no preset 'nucleus'; there are greedy, sample"):
        decoding("nucleus")


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=1),
)
ANY_FIELD = st.sampled_from(sorted({*PLAIN, *vars(GenerationConfig())}))


@settings(max_examples=150, deadline=None)
@given(preset=st.sampled_from(sorted(PRESETS)), fields=st.dictionaries(ANY_FIELD, HOSTILE, max_size=3))
def test_any_value_is_told_of_or_answered_with(model, tiny_tokenizer, preset, fields):
    with suppress(UserError):
        chosen = decoding(preset, **{"max_new_tokens": 2} | fields)
        assert len(generate_answers(model, tiny_tokenizer, PROMPTS, chosen)) == 2


BOUNDS = sorted((name, value) for name, (_, *bounds) in FIELDS.items() for value in bounds)


@pytest.mark.parametrize(("name", "value"), BOUNDS)
@pytest.mark.parametrize("preset", ["sample", "course"])
def test_whatever_is_within_the_bounds_is_answered_with(model, tiny_tokenizer, preset, name, value):
    """Or, of tokens, doesn't fit the model."""
    chosen = decoding(preset, **{"max_new_tokens": 3, name: value})
    if chosen["max_new_tokens"] > 3:
        with pytest.raises(UserError, match="don't fit"):
            generate_answers(model, tiny_tokenizer, PROMPTS, chosen)
    else:
        assert len(generate_answers(model, tiny_tokenizer, PROMPTS, chosen)) == 2


@pytest.mark.parametrize("word", ["num_beams=-1", "temperature={", "top_p=7", "no_such_field=1"])
def test_a_command_tells_of_a_bad_value(kochat, tiny_base, word):
    code, printed = kochat("generate", tiny_base, "--prompt", "네", "--set", word)
    assert code == 1
    assert word.partition("=")[0] in printed
    assert "Traceback" not in printed
