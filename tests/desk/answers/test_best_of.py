"""The best of n answers: its KL, what is chosen, and the files made of a model's own answers."""

import json
import math

from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.best_of import best_of, kl_of_best, sample_answers
from kochat_trl.desk.answers.generate import decoding, generate_answers
from kochat_trl.desk.curation.build import gather_scores
from kochat_trl.errors import UserError
from kochat_trl.reward.score import load_scorer, score_ids
from kochat_trl.rows.encode import encode_prompt
from tests.tiny import parsed

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

PROMPTS = [
    Prompt("반가워요"),
    Prompt("네", "반말로 해."),
    Prompt("왜?", None, ("일본의 수도는?", "도쿄")),
    Prompt("네"),
]
SAMPLE = decoding("sample", max_new_tokens=5)


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


@pytest.fixture(scope="module")
def scorer(tiny_reward, tiny_tokenizer):
    return load_scorer(tiny_reward, "float32", tiny_tokenizer)


def best_of_discrete(probabilities, n):
    """P(the best of n draws is each), for outcomes in the order of their distinct rewards."""
    upto = np.cumsum(probabilities)
    return upto**n - (upto - probabilities) ** n


def drawn_kl(probabilities, n, draws=200_000):
    """The KL of the best of n by drawing it, and the standard error: rewards are the outcomes' numbers."""
    found = np.random.default_rng(0).choice(len(probabilities), (draws, n), p=probabilities).max(1)
    log_ratios = np.log(best_of_discrete(probabilities, n)[found] / probabilities[found])
    return log_ratios.mean(), log_ratios.std() / math.sqrt(draws)


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_kl_of_the_best_is_what_draws_find_and_a_bound_where_answers_repeat(n):
    fine = np.full(20_000, 1 / 20_000)  # hardly ever the same twice
    kl, error = drawn_kl(fine, n)
    assert kl == pytest.approx(kl_of_best(n), abs=5 * error + 1e-10)
    assert error < 0.003
    coarse = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    chosen = best_of_discrete(coarse, n)
    exact = float((chosen * np.log(chosen / coarse)).sum())
    kl, error = drawn_kl(coarse, n)
    assert kl == pytest.approx(exact, abs=5 * error + 1e-10)
    assert exact < kl_of_best(n) - 0.01 if n > 1 else exact == pytest.approx(kl_of_best(1), abs=1e-10)


def test_samples_of_a_prompt_are_its_own_and_come_back_by_seed(model, tiny_tokenizer):
    found = sample_answers(model, tiny_tokenizer, PROMPTS, SAMPLE, 3, batch_size=5, seed=1)
    assert [len(its) for its in found] == [3] * 4
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    assert [answer for its in found for answer in its] == generate_answers(
        model, tiny_tokenizer, repeated, SAMPLE, batch_size=5, seed=1
    )
    assert len({answer.ids for its in found for answer in its}) > 6
    assert sample_answers(model, tiny_tokenizer, PROMPTS, SAMPLE, 3, batch_size=5, seed=2) != found
    assert sample_answers(model, tiny_tokenizer, [], SAMPLE, 3) == []


def test_what_gives_n_equal_answers_is_refused(model, tiny_tokenizer):
    for preset in ("greedy", "beam"):
        settings = decoding(preset, max_new_tokens=2)
        with pytest.raises(UserError, match="without sampling all 2 answers to a prompt are equal"):
            sample_answers(model, tiny_tokenizer, PROMPTS, settings, 2)
        assert len(sample_answers(model, tiny_tokenizer, PROMPTS, settings, 1)) == 4
    with pytest.raises(UserError, match="found 0 answers"):
        sample_answers(model, tiny_tokenizer, PROMPTS, SAMPLE, 0)


def test_the_best_is_the_one_of_the_highest_score(model, tiny_tokenizer, scorer):
    """Of what was generated: read at its last token, an end among them or not."""
    best = best_of(model, tiny_tokenizer, PROMPTS, SAMPLE, 3, scorer, seed=1)
    answers = sample_answers(model, tiny_tokenizer, PROMPTS, SAMPLE, 3, seed=1)
    for prompt, its, (answer, score) in zip(PROMPTS, answers, best, strict=True):
        ids = encode_prompt(tiny_tokenizer, prompt.messages)
        scores = [score_ids(scorer, tiny_tokenizer, [[*ids, *each.ids]])[0] for each in its]
        assert score == pytest.approx(max(scores), abs=1e-9)
        assert answer == its[scores.index(max(scores))]


def test_generate_prints_the_best_with_its_score_and_kl(
    kochat, tiny_base, tiny_reward, model, tiny_tokenizer, scorer, tmp_path
):
    words = ("generate", tiny_base, "--prompt", "반가워요", "네", "--set", "max_new_tokens=5")
    best = ("--best-of", 4, "--reward-model", tiny_reward)
    expected = best_of(model, tiny_tokenizer, [Prompt("반가워요"), Prompt("네")], SAMPLE, 4, scorer)
    code, printed = kochat(*words, *best)
    assert code == 0, printed
    for (answer, score), text in zip(expected, ("반가워요", "네"), strict=True):
        assert f"{text}\n  → {answer.text}  (score {score:.2f})\n" in printed
    assert "The best of 4: KL of at most 0.64 nats" in printed
    assert kochat(*words, *best, "--output", tmp_path / "best.jsonl")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([score for _, score in expected])
    for wrong, message in {
        (*best, "--decoding", "greedy"): "all 4 answers to a prompt are equal",
        (*best, "--compare", "greedy,top_p"): "needs --reward-model, which chooses, and one --decoding",
        ("--best-of", 4): "needs --reward-model",
    }.items():
        code, printed = kochat(*words, *wrong)
        assert code == 1
        assert message in printed


@pytest.fixture
def sampled(kochat, write, tiny_base, tiny_reward, tmp_path):
    """`kochat data sample` on PROMPTS: its exit code, what it printed, and the file."""
    lines = [json.dumps(prompt.fields, ensure_ascii=False) for prompt in PROMPTS]
    file = write("prompts.jsonl", "\n".join(lines))

    def sample(name, *options):
        output = tmp_path / name
        words = ("data", "sample", tiny_base, file, "--reward-model", tiny_reward, "--output", output)
        code, printed = kochat(*words, "--set", "max_new_tokens=5", "--n", 4, *options)
        return code, printed, output

    return sample


def test_sampled_answers_become_rankings_the_best_and_pairs(sampled, model, tiny_tokenizer, tiny_reward):
    """All read back as records with the system message and the history of their prompt."""
    found = sample_answers(model, tiny_tokenizer, PROMPTS, SAMPLE, 4)
    scores = gather_scores(tiny_reward, PROMPTS, [[its[i].text for its in found] for i in range(4)])
    by_prompt = [
        sorted({(round(row[p], 6), its[s].text) for s, row in enumerate(scores) if its[s].text}, reverse=True)
        for p, its in enumerate(found)
    ]
    assert min(map(len, by_prompt)) >= 2
    files = {}
    for kind in ("ranking", "sft", "preference"):
        code, printed, files[kind] = sampled(kind, "--to", kind)
        assert code == 0, printed
    mean, best = np.mean(scores), np.mean(np.max(scores, axis=0))
    assert f"Mean score of all answers {mean:.2f}, of the best of 4 {best:.2f}" in printed.replace("\n", " ")
    rankings, pairs = (parsed(files[kind], "preference") for kind in ("ranking", "preference"))
    for prompt, its, ranking, pair, dialogue in zip(
        PROMPTS, by_prompt, rankings, pairs, parsed(files["sft"], "sft"), strict=True
    ):
        texts = [text for _, text in its]
        assert ranking.asked == pair.asked == prompt
        assert [ranking.completions[i] for tier in ranking.tiers for i in tier] == texts
        assert (pair.completions, pair.tiers) == ((texts[0], texts[-1]), ((0,), (1,)))
        assert dialogue.messages == [*prompt.messages, {"role": "assistant", "content": texts[0]}]
    assert len(json.loads(files["ranking"].read_text(encoding="utf-8"))) == 4
    code, printed, _ = sampled("ranking")
    assert code == 1
    assert "exists already" in printed


def test_a_prompt_without_a_better_answer_is_named_and_counted(sampled, monkeypatch):
    equal = ("--set", "max_new_tokens=5", "top_k=1")  # four times one answer, which to the first prompt is empty
    code, printed, output = sampled("none", *equal)
    assert code == 1
    assert "no prompt is left: no answer to it is better than another" in printed
    assert not output.exists()
    code, printed, output = sampled("best", *equal, "--to", "sft")
    assert code == 0, printed
    assert "left out, as every answer to it is empty: '반가워요'" in printed
    assert [dialogue.messages[:-1] for dialogue in parsed(output, "sft")] == [p.messages for p in PROMPTS[1:]]
    tied = [[0.0, 1.0, 1.0, 0.0], *[[0.0, 0.0, 0.0, 2.0]] * 3]
    monkeypatch.setattr("kochat_trl.cli.data.gather_scores", lambda *_: tied)
    code, printed, output = sampled("some")
    assert code == 0, printed
    assert printed.count("left out, as no answer to it is better than another: '반가워요'") == 1
    assert "3 records, written to" in printed
    assert "Prompts left out: 1." in printed
    assert [ranking.asked for ranking in parsed(output, "preference")] == PROMPTS[1:]
    code, printed, _ = sampled("one", "--n", 1)
    assert code == 1
    assert "two answers or more can be ranked" in printed


@pytest.mark.parametrize("place", ["cli.data.gather_scores", "desk.writers._indented"])
def test_what_is_interrupted_leaves_nothing(sampled, tmp_path, monkeypatch, place):
    """While answers are scored, and while the file is written."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"kochat_trl.{place}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sampled("cut")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
