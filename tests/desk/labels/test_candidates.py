"""Answers of models and files to prompts: the same after a restart, and for the second annotator those of the first."""

import json

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import decoding
from kochat_trl.desk.answers.held import HeldModels
from kochat_trl.desk.labels.candidates import answers_to, judged_before
from kochat_trl.desk.labels.items import Item
from kochat_trl.desk.labels.journal import Judgement, State

PROMPTS = [Prompt("대한민국의 수도는 어디인가요?"), Prompt("반가워요", "짧게")]
SETTINGS = decoding("sample", max_new_tokens=12)


def test_files_and_models_answer_and_a_model_named_twice_answers_twice(tiny_sft, tmp_path):
    file = tmp_path / "answers.json"
    file.write_text(json.dumps([{"prompt": p.prompt, "completion": f"{p.prompt}!"} for p in PROMPTS]))
    sources = [str(file), tiny_sft, tiny_sft]
    find = answers_to(PROMPTS, sources, HeldModels(), SETTINGS, 0)
    found = [find(prompt) for prompt in PROMPTS]
    assert [answers[0] for answers in found] == [f"{prompt.prompt}!" for prompt in PROMPTS]
    assert len(found[1]) == 3  # the same model, and another draw
    again = answers_to(PROMPTS[::-1], sources, HeldModels(), SETTINGS, 0)  # another order, newly loaded
    assert [again(prompt) for prompt in PROMPTS] == found
    other = answers_to(PROMPTS, sources, HeldModels(), SETTINGS, 1)
    assert [other(prompt) for prompt in PROMPTS] != found


def test_what_was_judged_keeps_its_answers_but_not_those_of_talk():
    state = State()
    for prompt, answers, picked in ((PROMPTS[0], "가나", "order"), (PROMPTS[1], "다라", "talk")):
        item = Item(prompt, tuple(answers))
        state.add(Judgement(item, "skip", "a", "2026-01-31T09:30:00+00:00", 1.0, (0, 1), picked))
    assert judged_before(state, PROMPTS) == {PROMPTS[0]: Item(PROMPTS[0], ("가", "나"))}
    assert judged_before(State(), PROMPTS) == {}
