"""The making of data: prompts, rankings from several answers, grouped splits."""

import json

from kochat_trl.data.readers import read_records
from kochat_trl.data.records import Prompt, conversation
from kochat_trl.desk.curation.build import (
    answers_in,
    gather_answers,
    gather_scores,
    rank_answers,
    read_prompts,
    split_file,
)
from kochat_trl.errors import UserError
from kochat_trl.models.loading import add_lora, load_causal_lm, load_policy, new_reward_model
from kochat_trl.reward.score import load_scorer, score_dialogues
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import parsed

import pytest
import torch

FLOAT = ModelArguments(dtype="float32")


def prompts(*texts):
    return [Prompt(text) for text in texts]


def by_rank(record):
    """The texts of a ranking record, best tier first."""
    texts = [record[f"completion_{i}"] for i in range(len(record) - 2)]
    return [[texts[i] for i in (tier if isinstance(tier, list) else [tier])] for tier in record["ranking"]]


def test_prompts_of_every_shape(write):
    files = {
        "sft.jsonl": '[{"prompt": "가", "completion": "나"}]',
        "seed.txt": "가\n",
        "chat.csv": "Q,A\n가,나\n",
        "instruction.jsonl": '{"instruction": "가", "output": "나"}',
        "messages.jsonl": '{"messages": [{"role": "user", "content": "가"}, {"role": "assistant", "content": "나"}]}',
        "talk.jsonl": "<<start conversation>>\n<사람>: 가\n<챗봇>: 나\n",
    }
    for name, content in files.items():
        assert read_prompts(write(name, content)) == ([Prompt("가")], [])
    broken = write("broken.jsonl", '[{"prompt": "가"}, {"prompt": ""}]')
    assert read_prompts(broken, limit=1) == ([Prompt("가")], [])  # what is not asked for is not refused either
    with pytest.raises(UserError, match=r"1 of 2 records .*\n.*record 1\)"):
        read_prompts(broken)
    prompts, left_out = read_prompts(broken, skip_invalid=True)
    assert (prompts, [error.source.index for error in left_out]) == ([Prompt("가")], [1])


def test_rankings_in_the_order_of_the_sources():
    prompts = [Prompt(f"질문 {i}") for i in range(40)]
    answers = [[f"{source} {i}" for i in range(40)] for source in "상중하"]
    records, left_out = rank_answers(prompts, answers, seed=3)
    assert left_out == []
    assert [record["prompt"] for record in records] == [prompt.prompt for prompt in prompts]
    assert [by_rank(record) for record in records] == [[[f"상 {i}"], [f"중 {i}"], [f"하 {i}"]] for i in range(40)]
    places = {record["ranking"].index(0) for record in records}
    assert places == {0, 1, 2}  # completion 0 is not always the best: they are shuffled
    assert rank_answers(prompts, answers, seed=3)[0] == records
    assert rank_answers(prompts, answers, seed=4)[0] != records
    assert rank_answers(prompts[:9], [source[:9] for source in answers], seed=3)[0] == records[:9]


def test_rankings_by_score_with_ties_equal_and_empty_answers():
    answers = [["가", "가", "가", " "], ["나", "가", "나", "나"], ["다", "나", "가", "다"]]
    scores = [[0.0, -1.0, 5.0, 9.0], [2.0, 3.0, 1.0, 1.0], [2.0, 0.5, 9.0, 2.0]]
    records, left_out = rank_answers(prompts("1", "2", "3", "4"), answers, 0, scores)
    found = [[sorted(tier) for tier in by_rank(record)] for record in records]
    assert found == [[["나", "다"], ["가"]], [["가"], ["나"]], [["가"], ["나"]], [["다"], ["나"]]]
    assert left_out == []
    assert rank_answers(prompts("1", "2"), [["가", "나"], ["가", "나"]], 0) == ([], ["1", "2"])
    assert rank_answers(prompts("1"), [["가"], ["나"]], 0, [[1.0], [1.0]]) == ([], ["1"])  # nothing but a tie


def test_answers_come_from_a_file_or_a_model(write, tiny_base, tiny_tokenizer, tmp_path):
    path = write("answers.jsonl", '[{"prompt": "나", "completion": "둘"}, {"prompt": " 가", "completion": "하나"}]')
    assert gather_answers(path, prompts("가", "나"), 8, 1.0, 0) == ["하나", "둘"]
    with pytest.raises(UserError, match=r"no answer to 1 of 2 prompts, such as \['다'\]"):
        answers_in(path, prompts("가", "다"))
    empty = write("empty.jsonl", '[{"prompt": "가", "completion": ""}, {"prompt": "나", "completion": "둘"}]')
    assert answers_in(empty, prompts("나", "가")) == ["둘", ""]  # which the ranking then leaves out
    with pytest.raises(UserError, match=r"1 of 2 records .*\n.*record 1\).*field 'completion'"):
        answers_in(write("broken.jsonl", '[{"prompt": "가", "completion": "나"}, {"prompt": "다"}]'), prompts("가"))
    sampled = gather_answers(tiny_base, prompts("반가워요", "반가워요"), 8, 1.0, 0)
    assert sampled != gather_answers(tiny_base, prompts("반가워요", "반가워요"), 8, 1.0, 1)
    assert sampled == gather_answers(tiny_base, prompts("반가워요", "반가워요"), 8, 1.0, 0)
    greedy = gather_answers(tiny_base, prompts("반가워요", "반가워요"), 8, 0.0, 0)
    assert greedy[0] == greedy[1]


def test_scores_are_those_of_the_reward_model(tiny_base, tiny_tokenizer, tmp_path):
    """Whatever the lengths beside it in a batch, a score is the head's at the last token of the row alone."""
    torch.manual_seed(0)
    model = new_reward_model(tiny_base, FLOAT, tiny_tokenizer).eval()
    model.save_pretrained(tmp_path / "reward")
    tiny_tokenizer.save_pretrained(tmp_path / "reward")
    prompts, answers = (
        [Prompt("반가워요"), Prompt("높다의 반대말은 뭐야?", "반말로 해.")],
        [["저도 반가워요.", "낮다"], ["반가", "높다의 반대말은 낮다입니다."]],
    )
    found = gather_scores(str(tmp_path / "reward"), prompts, answers)
    for source, row in zip(answers, found, strict=True):
        for prompt, answer, score in zip(prompts, source, row, strict=True):
            text = f"### Instruction(명령어):\n{prompt.prompt}\n\n### Response(응답):{answer}</s>"
            text = f"{prompt.system}\n\n{text}" if prompt.system else text
            ids = torch.tensor([tiny_tokenizer.encode(text)])
            hidden = model.transformer(ids).last_hidden_state[0, -1].detach()
            assert score == pytest.approx(float(hidden @ model.score.weight[0].detach()), abs=1e-5)
    scorer = load_scorer(str(tmp_path / "reward"), "float32", tiny_tokenizer)  # in float64 on a CPU
    turns = [
        conversation(prompt.prompt, answer, system=prompt.system)
        for source in answers
        for prompt, answer in zip(prompts, source, strict=True)
    ]
    exact = pytest.approx(score_dialogues(scorer, tiny_tokenizer, turns, batch_size=1), abs=1e-12)
    assert [score for row in found for score in row] == exact


def test_an_adapter_answers_as_its_base_changed_by_it(tiny_base, tiny_tokenizer, tmp_path):
    lora = ModelArguments(dtype="float32", use_peft=True)
    adapted = add_lora(load_causal_lm(tiny_base, lora, tiny_tokenizer), lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([tiny_tokenizer.encode("반가워요")])
    with torch.no_grad():
        base = load_policy(tiny_base, FLOAT, tiny_tokenizer)(ids).logits
        found = load_policy(str(tmp_path / "adapter"), FLOAT, tiny_tokenizer)(ids).logits
        expected = adapted.eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-2)


def test_split_keeps_a_prompt_on_one_side(write, tmp_path):
    texts = [f"질문 {i % 60}" + " " * (i % 3) for i in range(150)]
    records = [{"prompt": text, "chosen": f"가 {i}", "rejected": "나"} for i, text in enumerate(texts)]
    path = write("rm.jsonl", "\n".join(json.dumps(record) for record in records))
    train, held_out = str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")
    assert split_file(path, train, held_out, 0.2, seed=1) == (120, 30)
    left, right = ([raw.fields for raw in read_records(file)] for file in (train, held_out))
    assert sorted(left + right, key=str) == sorted(records, key=str)
    assert not {r["prompt"].strip() for r in left} & {r["prompt"].strip() for r in right}
    assert left == [record for record in records if record in left]  # in the order of the file
    assert len(parsed(train, "preference")) == 120

    with pytest.raises(UserError, match="is named twice"):
        split_file(path, str(tmp_path / "new"), str(tmp_path / "." / "new"), 0.2, seed=1)
    with pytest.raises(UserError, match="exists already"):
        split_file(path, str(tmp_path / "new"), held_out, 0.2, seed=1)
    assert not (tmp_path / "new").exists()
    other = str(tmp_path / "other.jsonl")
    split_file(path, str(tmp_path / "a"), other, 0.2, seed=2)
    assert [raw.fields for raw in read_records(other)] != right
    for fraction in (0.0, 1.0):
        with pytest.raises(UserError, match="can't be split"):
            split_file(path, str(tmp_path / "b"), str(tmp_path / "c"), fraction, seed=2)


def test_split_keeps_the_shape(write, tmp_path):
    talk = "".join(f"<<start conversation>>\n<사람>: 질문 {i}\n<챗봇>: 답\n" for i in range(10))
    split_file(write("talk.txt", talk), str(tmp_path / "a"), str(tmp_path / "b"), 0.3, 0)
    texts = [(tmp_path / name).read_text(encoding="utf-8") for name in "ab"]
    assert [text.count("<<start conversation>>") for text in texts] == [7, 3]
    assert all(text.startswith("<<start conversation>>\n<사람>: 질문 ") for text in texts)
