"""`kochat label`: from answers to a file that reward training takes, and what is refused."""

import io
import json
import socket
import sys

from kochat_trl.rows.rows import build_dataset
from tests.tiny import PAIRS, parsed

import pytest


@pytest.fixture
def typing(kochat, monkeypatch):
    """Run `kochat label …` while somebody types these lines."""

    def run(lines, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return kochat("label", *words)

    return run


@pytest.fixture
def judged(typing, kochatgpt_files, tmp_path):
    """A journal: 지은 judged four of six items, 민지 those and one more."""
    journal = tmp_path / "labels.jsonl"
    for name, lines in (("지은", ["123", "2>1=3", "x", "s", "321", "q"]), ("민지", ["123", "213", "3>1=2", "q"])):
        command = (kochatgpt_files["reward"], "--as", name, "--to", journal, "--overlap", "1", "--lang", "ko")
        code, printed = typing(lines, *command)
        assert code == 0, printed
    return journal


def test_what_was_judged_is_what_reward_training_takes(kochat, judged, tmp_path, tiny_tokenizer, kochatgpt_files):
    out = tmp_path / "rankings.jsonl"
    code, printed = kochat("label", "--export", out, "--to", judged)
    assert code == 0, printed
    assert f"6 rankings, written to {out}. Without one: all bad 1, skipped 1, all tied 0." in printed
    records = json.loads(out.read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in judged.read_text(encoding="utf-8").splitlines()]
    judgements = [line for line in lines if isinstance(line["verdict"], list)]
    assert [(r["annotator"], r["judged_at"]) for r in records] == [(j["annotator"], j["judged_at"]) for j in judgements]
    assert [[list(tier) for tier in it.tiers] for it in parsed(out, "preference")] == [j["verdict"] for j in judgements]
    dataset, report = build_dataset([str(out)], "reward", tiny_tokenizer)
    assert (len(dataset), report.left_out) == (6, [])
    assert kochat("data", "check", out)[0] == 0
    code, printed = kochat("label", "--export", out, "--to", judged)
    assert code == 1
    assert "exists already" in printed


def test_agreement_of_people_and_of_a_reward_model(kochat, judged, tiny_reward):
    code, printed = kochat("label", "--agreement", "--to", judged)
    assert code == 0, printed
    assert "2 items ranked by two people or more" in printed
    assert "민지, 지은" in printed
    assert "Krippendorff's alpha" in printed
    assert "the reward model" not in printed
    code, printed = kochat("label", "--agreement", "--to", judged, "--reward-model", tiny_reward)
    assert code == 0, printed
    assert [line.split(",")[0] for line in printed.splitlines() if "the reward model" in line] == ["민지", "지은"]


def test_prompts_with_files_of_answers_in_a_drawn_order(typing, write, tmp_path):
    prompts = write("prompts.txt", "".join(f"{prompt}\n" for prompt, _, _ in PAIRS))
    answers = [
        write(f"{i}.json", json.dumps([{"prompt": pair[0], "completion": pair[i]} for pair in PAIRS])) for i in (1, 2)
    ]
    command = (prompts, "--answers", *answers, "--as", "a", "--to", tmp_path / "j", "--order", "random", "--seed", "3")
    code, printed = typing(["12"] * 6, *command, "--lang", "en")
    assert code == 0, printed
    lines = [json.loads(line) for line in (tmp_path / "j").read_text(encoding="utf-8").splitlines()]
    assert {line["picked"] for line in lines} == {"random"}
    asked = [line["prompt"] for line in lines]
    assert asked != [prompt for prompt, _, _ in PAIRS]
    assert sorted(asked) == sorted(prompt for prompt, _, _ in PAIRS)
    assert f"kochat label --export rankings.jsonl --to {tmp_path / 'j'}" in printed


def test_models_answer_while_somebody_judges_and_the_same_again(typing, write, tmp_path, tiny_sft, kochat):
    prompts = write("prompts.txt", "".join(f"{prompt}\n" for prompt, _, _ in PAIRS))
    command = (prompts, "--answers", tiny_sft, tiny_sft, "--set", "max_new_tokens=8", "--lang", "en")
    for name, journal, lines in (("a", "j", ["12", "12", "q"]), ("b", "k", ["12"] * 6)):
        code, printed = typing(lines, *command, "--as", name, "--to", tmp_path / journal)
        assert code == 0, printed
    code, printed = typing(["12", "q"], *command, "--as", "b", "--to", tmp_path / "j", "--overlap", "1")
    one, two = (
        [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()] for name in "jk"
    )
    assert [line["answers"] for line in one] == [two[i]["answers"] for i in (0, 1, 0)]
    assert [line["annotator"] for line in one] == ["a", "a", "b"]
    asked = [prompt for prompt, _, _ in PAIRS]
    assert sorted((line["prompt"] for line in two), key=asked.index) == [line["prompt"] for line in two]
    for more, says in ((["--order", "uncertain"], "needs the --reward-model"), (["--decoding", "best"], "no preset")):
        code, printed = kochat("label", *command, "--as", "a", "--to", tmp_path / "l", *more)
        assert (code, says in printed) == (1, True)


def test_the_order_of_a_reward_model(typing, kochatgpt_files, tmp_path, tiny_reward):
    command = (kochatgpt_files["reward"], "--as", "a", "--to", tmp_path / "j", "--order", "uncertain")
    code, printed = typing(["123"], *command, "--reward-model", tiny_reward)
    assert code == 0, printed
    (line,) = (tmp_path / "j").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["picked"] == "uncertain"


def test_what_is_left_out_is_named(typing, write, tmp_path):
    prompts = write("prompts.txt", "가\n나\n")
    rows = [[("가", "1"), ("나", "2")], [("가", "3"), ("나", "2")]]
    answers = [
        write(f"{i}.json", json.dumps([{"prompt": p, "completion": c} for p, c in its])) for i, its in enumerate(rows)
    ]
    code, printed = typing([], prompts, "--answers", *answers, "--as", "a", "--to", tmp_path / "j")
    assert code == 0, printed
    assert "left out, as it has no two different answers: '나'" in printed
    ranked = write("r.jsonl", '{"prompt": "가", "chosen": "1", "rejected": "2"}\n{"prompt": ""}')
    code, printed = typing([], ranked, "--as", "a", "--to", tmp_path / "j")
    assert (code, "1 of 2 records can't be used" in printed) == (1, True)
    code, printed = typing([], ranked, "--as", "a", "--to", tmp_path / "j", "--invalid-records", "skip")
    assert (code, "left out: " in printed) == (0, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give FILE… and --as NAME"),
        (["FILE"], "give FILE… and --as NAME"),
        (["--as", "a"], "give FILE… and --as NAME"),
        (["FILE", "--as", "a", "--reward-model", "m"], "give FILE… and --as NAME"),
        (["FILE", "--as", " "], "--as: found ' '"),
        (["FILE", "--as", "a", "--answers", "b"], "--answers takes two or more; of one model, name it twice"),
        (["FILE", "--as", "a", "--overlap", "2"], "overlap: found 2.0"),
        (["FILE", "--agreement"], "give them no FILE"),
        (["--export", "o", "--as", "a"], "give them no FILE"),
        (["--export", "o", "--reward-model", "m"], "give them no FILE"),
        (["--export", "o"], "can't be read: No such file"),
        (["--agreement"], "can't be read: No such file"),
    ],
)
def test_what_is_refused(words, says, typing, kochatgpt_files, tmp_path):
    words = [kochatgpt_files["reward"] if word == "FILE" else word for word in words]
    code, printed = typing([], *words, "--to", tmp_path / "j")
    assert code == 1
    assert says in printed
    assert not (tmp_path / "j").exists()


def test_a_journal_without_rankings_gives_none(kochat, typing, kochatgpt_files, tmp_path):
    typing(["x", "s", "1=2=3"], kochatgpt_files["reward"], "--as", "a", "--to", tmp_path / "j")
    code, printed = kochat("label", "--export", tmp_path / "o", "--to", tmp_path / "j")
    assert code == 1
    assert "no judgement prefers an answer (all bad 1, skipped 1, all tied 1)" in printed
    assert not (tmp_path / "o").exists()
    typing(["u", "q"], kochatgpt_files["reward"], "--as", "a", "--to", tmp_path / "j")
    code, printed = kochat("label", "--agreement", "--to", tmp_path / "j")
    assert code == 1
    assert "no judgement ranks answers" in printed


def test_the_page_without_what_it_needs_or_its_port_says_what_to_do(kochat, monkeypatch, kochatgpt_files, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        code, printed = kochat("app", "--port", port, "--outputs", tmp_path)
        assert (code, f"port {port} can't be opened" in printed) == (1, True)
    code, printed = kochat("app", "--port", 70_000)
    assert (code, "port 70000 can't be opened" in printed) == (1, True)
    code, printed = kochat("app", kochatgpt_files["reward"])
    assert (code, "--to JOURNAL is missing" in printed) == (1, True)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "kochat_trl.desk.app.server")
    code, printed = kochat("app")
    assert (code, "the page needs uvicorn: pip install 'kochat_trl[app]'" in printed) == (1, True)
