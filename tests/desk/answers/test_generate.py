"""Decoding strategies against plain loops, and what a chat remembers."""

import copy
import io
import json
import shutil
import sys

from benchmarks.architectures import CHATML, byte_tokenizer
from kochat_trl.data.records import Prompt
from kochat_trl.desk.answers.generate import (
    PRESETS,
    Chat,
    Response,
    answer_ids,
    compare_decoding,
    decoding,
    generate_answers,
    mean_logprob,
    print_decodings,
)
from kochat_trl.desk.answers.likeness import distinct
from kochat_trl.errors import UserError
from kochat_trl.models.template import render, stop_ids
from kochat_trl.reward.score import load_scorer, score_ids
from kochat_trl.rows.encode import encode_prompt, encode_prompts

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

TEXTS = ["반가워요", "일본의 수도는 어디인가요? 그리고 중국의 수도도 알려 주세요.", "네", "반가워요"]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base).eval()


def greedy_loop(model, tokenizer, prompt, limit):
    """One prompt at a time, without cache, padding or generate()."""
    ids = encode_prompt(tokenizer, prompt.messages)
    found = []
    for _ in range(limit):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax().item()
        found.append(token)
        if token == tokenizer.eos_token_id:
            break
    return tuple(found)


def said(printed):
    """What a command printed, but for the progress bars of loading."""
    return "\n".join(line for line in printed.splitlines() if "Loading weights" not in line)


# --- Answers


def test_greedy_equals_a_loop(model, tiny_tokenizer):
    answers = generate_answers(model, tiny_tokenizer, PROMPTS, decoding("greedy", max_new_tokens=12), batch_size=2)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.ids == greedy_loop(model, tiny_tokenizer, prompt, 12)
        assert answer.ended == (answer.ids[-1] == tiny_tokenizer.eos_token_id)
        assert answer.text == tiny_tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
    assert answers[0] == answers[3] != answers[1]


@pytest.mark.parametrize("preset", ["beam", "course", "top_k", "top_p", "sample"])
def test_a_preset_is_what_generate_makes_of_its_fields(model, tiny_tokenizer, preset):
    answer = generate_answers(model, tiny_tokenizer, PROMPTS[:1], decoding(preset, max_new_tokens=8), seed=3)[0]
    ids = torch.tensor([encode_prompt(tiny_tokenizer, PROMPTS[0].messages)])
    torch.manual_seed(3)
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
        **{"top_k": 0, **PRESETS[preset]}, pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    found = expected[0, ids.shape[1] :].tolist()
    assert list(answer.ids) == found[: len(answer.ids)]
    assert set(found[len(answer.ids) :]) <= {tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id}


def test_nothing_leaks_from_a_saved_generation_config(tiny_base, model, tiny_tokenizer):
    bent = AutoModelForCausalLM.from_pretrained(tiny_base)
    bent.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=12,
        num_beams=3, max_new_tokens=3, bad_words_ids=[[i] for i in range(50, 500)],
    )  # fmt: skip
    own = bent.generation_config
    settings = decoding("greedy", max_new_tokens=12)
    plain = generate_answers(model, tiny_tokenizer, PROMPTS, settings)
    assert generate_answers(bent, tiny_tokenizer, PROMPTS, settings) == plain
    adapted = get_peft_model(bent, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert generate_answers(adapted, tiny_tokenizer, PROMPTS, settings) == plain
    assert bent.generation_config is own


def test_seeds(model, tiny_tokenizer):
    settings = decoding("sample", max_new_tokens=12)
    one, again, other = (generate_answers(model, tiny_tokenizer, PROMPTS, settings, seed=s) for s in (0, 0, 1))
    assert one == again != other
    assert one[0] != one[3]  # the same prompt, drawn twice


def test_no_room_for_an_answer(model, tiny_tokenizer):
    positions = model.config.max_position_embeddings
    with pytest.raises(UserError, match=f"answer of up to {positions} don't fit the model's {positions}"):
        generate_answers(model, tiny_tokenizer, PROMPTS, decoding("greedy", max_new_tokens=positions))


def test_no_prompts(model, tiny_tokenizer):
    assert generate_answers(model, tiny_tokenizer, [], decoding("greedy")) == []


# --- What is said of them


def test_mean_logprob(model, tiny_tokenizer):
    ids = encode_prompt(tiny_tokenizer, PROMPTS[1].messages)
    answer = Response("", (7, 9, 300, tiny_tokenizer.eos_token_id), True)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*ids, *answer.ids]])).logits[0].double()
    expected = 0.0
    for i, token in enumerate(answer.ids):
        row = logits[len(ids) - 1 + i]
        expected += (row[token] - row.exp().sum().log()).item() / 4
    assert mean_logprob(model, ids, answer) == pytest.approx(expected, abs=1e-5)


def test_comparison(model, tiny_tokenizer, tiny_reward):
    strategies = {name: decoding(name, max_new_tokens=6) for name in ("greedy", "beam")}
    scorer = load_scorer(tiny_reward, "float32", tiny_tokenizer)
    rows = compare_decoding(model, tiny_tokenizer, PROMPTS[:2], strategies, 0, scorer)
    assert [(row["prompt"], row["decoding"]) for row in rows] == [
        (prompt, name) for prompt in TEXTS[:2] for name in ("greedy", "beam")
    ]
    answers = {name: generate_answers(model, tiny_tokenizer, PROMPTS[:2], s) for name, s in strategies.items()}
    for i, prompt in enumerate(PROMPTS[:2]):
        for j, name in enumerate(strategies):
            row, answer = rows[2 * i + j], answers[name][i]
            ids = encode_prompts(tiny_tokenizer, [prompt.messages])[0]
            assert (row["completion"], row["ended"], row["tokens"]) == (answer.text, answer.ended, len(answer.ids))
            assert row["logprob"] == mean_logprob(model, ids, answer)
            assert row["distinct_2"] == distinct([answer.ids], 2)
            assert row["score"] == pytest.approx(score_ids(scorer, tiny_tokenizer, [[*ids, *answer.ids]])[0])
    assert "score" not in compare_decoding(model, tiny_tokenizer, PROMPTS[:1], strategies, 0)[0]


# --- Where an answer starts and ends, and system messages


class Scripted:
    """Says these ids, whatever it is asked, and keeps what it was asked."""

    config, generation_config, device = GPT2Config(n_positions=200), None, "cpu"

    def __init__(self, *ids):
        self.ids, self.asked = ids, []

    def eval(self):
        return self

    def generate(self, input_ids, generation_config, streamer=None, **_):
        self.asked += input_ids.tolist()
        self.stops = generation_config.eos_token_id
        if streamer:
            streamer.put(input_ids)
            for token_id in self.ids:
                streamer.put(torch.tensor([token_id]))
            streamer.end()
        return torch.tensor([[*row, *self.ids] for row in input_ids.tolist()])


@pytest.fixture
def thoughtful(tiny_tokenizer, monkeypatch):
    """A template that opens an answer with an empty thought, and closes it with <mask> and a newline."""
    answer = "'(멍멍)\\n\\n몰라\\n\\n' + message['content'] + '<mask>\\n'"
    template = tiny_tokenizer.chat_template.replace("message['content'] + eos_token", answer)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    return tiny_tokenizer


def test_an_answer_ends_where_the_template_ends_it_or_the_text_ends(thoughtful):
    end, eos = thoughtful.convert_tokens_to_ids(["<mask>", "</s>"])
    word = thoughtful.encode("네")[-1]
    cases = [([word, end, eos, word], 2, True), ([word, eos, end], 2, True), ([word, word], 2, False)]
    for ids, length, ended in cases:
        model = Scripted(*ids)
        (answer,) = generate_answers(model, thoughtful, PROMPTS[:1], decoding("greedy", max_new_tokens=4))
        assert (answer.ids, answer.ended) == (tuple(ids[:length]), ended)
        assert model.stops == [end, eos]


def test_an_answer_is_told_without_what_the_template_opens_it_with(thoughtful, capsys):
    settings = decoding("greedy", max_new_tokens=4)
    opening, words = "(멍멍)\n\n몰라\n\n", "저도 반가워요. 무엇을 도와드릴까요?"
    ids = thoughtful(f"{opening}{words}<mask>", add_special_tokens=False)["input_ids"]
    assert thoughtful.decode(ids) == f"{opening}{words}<mask>"
    (answer,) = generate_answers(Scripted(*ids), thoughtful, PROMPTS[:1], settings)
    assert answer.text == words
    chat = Chat(Scripted(*ids), thoughtful, settings)
    capsys.readouterr()
    for _ in range(2):
        assert chat.say("반가워요")[0] == words
        assert capsys.readouterr().out == f"{words}\n"
    for other in ("(멍멍)", "(멍멍) 하고 울어요."):  # not all of it, and something else
        ids = thoughtful(other, add_special_tokens=False)["input_ids"]
        assert Chat(Scripted(*ids), thoughtful, settings).say("네")[0] == other
        assert capsys.readouterr().out == f"{other}\n"


def chatml(kind):
    """A byte-level tokenizer, whose end of an answer is a special token, or an added one that decodes to text."""
    tokenizer, special = byte_tokenizer(CHATML, "<eos>", eos_token="<eos>", pad_token="<eos>"), kind == "special"
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=special)], special_tokens=special)
    return tokenizer


def shown(tokenizer, ids):
    """The pieces in which an answer of these ids, or of a text, is shown, and its text."""
    ids = tokenizer(ids, add_special_tokens=False)["input_ids"] if isinstance(ids, str) else ids
    pieces = []
    answer = answer_ids(Scripted(*ids), tokenizer, [5, 6, 7], decoding("greedy", max_new_tokens=90), pieces.append)
    return pieces, answer.text


@pytest.mark.parametrize("kind", ["special", "added"])
def test_an_answer_is_shown_a_token_at_a_time(kind):
    pieces, whole = shown(chatml(kind), "네 그래요.\n\n🙂 \n아 <|im_end|>")
    assert whole == "네 그래요.\n\n🙂 \n아"
    assert pieces == ["네", " 그", "래", "요", ".", "\n\n🙂", " \n아"]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("kind", ["tiny_tokenizer", "thoughtful", "special", "added"])
def test_whatever_is_shown_makes_up_the_answer(request, kind, data):
    """Broken characters, spaces at either end, and an opening that isn't whole among them."""
    tokenizer = chatml(kind) if kind in ("special", "added") else request.getfixturevalue(kind)
    opening = tokenizer("(멍멍)\n\n몰라\n\n", add_special_tokens=False)["input_ids"]
    ids = opening[: data.draw(st.integers(0, len(opening)))]
    ids += data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    stops = [i for i, token_id in enumerate(ids) if token_id in stop_ids(tokenizer)]
    pieces, whole = shown(tokenizer, ids[: stops[0] + 1] if stops else ids)
    assert "".join(pieces) == whole
    assert all(pieces)


def test_a_prompt_s_system_message_reaches_the_model(tiny_tokenizer):
    model, prompts = Scripted(5), [Prompt("네", "존댓말로 답해."), Prompt("네"), Prompt("네", "반말로 답해.")]
    settings = decoding("greedy", max_new_tokens=4)
    generate_answers(model, tiny_tokenizer, prompts, settings, batch_size=1)
    texts = [render(tiny_tokenizer, prompt.messages, prompt=True) for prompt in prompts]
    assert sorted(model.asked) == sorted(tiny_tokenizer(texts, add_special_tokens=False)["input_ids"])


def test_a_comparison_keeps_prompts_apart_by_their_system_message(model, tiny_tokenizer):
    prompts = [Prompt("네", "존댓말로 답해."), Prompt("네"), Prompt("네", "반말로 답해.")]
    strategies = {name: decoding(name, max_new_tokens=2) for name in ("greedy", "beam")}
    rows = compare_decoding(model, tiny_tokenizer, prompts, strategies)
    expected = [(p.system, name) for p in prompts for name in strategies]
    assert [(row.get("system"), row["decoding"]) for row in rows] == expected
    for row, prompt in zip(rows[::2], prompts, strict=True):
        answer = generate_answers(model, tiny_tokenizer, [prompt], strategies["greedy"])[0]
        assert row["logprob"] == mean_logprob(model, encode_prompt(tiny_tokenizer, prompt.messages), answer)
    console = Console(file=io.StringIO(), width=100)
    print_decodings(rows, console)
    assert console.file.getvalue().count("log p a token") == 3


def test_what_a_model_refuses_is_told_of(tiny_tokenizer):
    """As those do that know no beams."""

    class Refusing(Scripted):
        def generate(self, **_):
            raise ValueError("it cannot use beam search")

    with pytest.raises(UserError, match="it cannot use beam search"):
        generate_answers(Refusing(), tiny_tokenizer, PROMPTS[:1], decoding("beam"))


# --- Chat


@pytest.mark.parametrize("preset", ["greedy", "beam"])
def test_a_chat_remembers(model, tiny_tokenizer, capsys, preset):
    chat = Chat(model, tiny_tokenizer, decoding(preset, max_new_tokens=10))
    first, _ = chat.say("반가워요")
    assert capsys.readouterr().out.strip() == first
    second, forgotten = chat.say("네")
    assert forgotten == 0
    turns = [("user", "반가워요"), ("assistant", first), ("user", "네"), ("assistant", second)]
    assert [(m["role"], m["content"]) for m in chat.messages] == turns
    text = render(tiny_tokenizer, chat.messages[:3], prompt=True)
    ids = torch.tensor([tiny_tokenizer(text, add_special_tokens=False)["input_ids"]])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, **PRESETS[preset],
        pad_token_id=tiny_tokenizer.pad_token_id, eos_token_id=tiny_tokenizer.eos_token_id,
    )[0, ids.shape[1] :]  # fmt: skip
    assert second == tiny_tokenizer.decode(expected, skip_special_tokens=True).strip()
    chat.reset()
    assert chat.say("반가워요") == (first, 0)


def test_a_chat_forgets_the_oldest_first(model, tiny_tokenizer):
    positions = model.config.max_position_embeddings
    length = len(encode_prompt(tiny_tokenizer, Prompt("반가워요").messages))
    chat = Chat(model, tiny_tokenizer, decoding("greedy", max_new_tokens=positions - length - 4))
    for text in ("반가워요", "네"):
        chat.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "네"}]
    assert chat.say("반가워요")[1] == 2
    assert [m["content"] for m in chat.messages][:1] == ["반가워요"]
    assert len(chat.messages) == 2
    before = list(chat.messages)
    with pytest.raises(UserError, match="don't fit"):
        chat.say("반가워요 " * 50)
    assert chat.messages == before


def test_a_chat_keeps_its_system_message(tiny_tokenizer):
    """Also after a reset, and where it forgets the oldest exchanges."""
    model = Scripted(tiny_tokenizer.encode("네")[-1])
    chat = Chat(model, tiny_tokenizer, decoding("greedy", max_new_tokens=4), "무엇을 도와드릴까요?")
    alone = encode_prompt(tiny_tokenizer, Prompt("네", "무엇을 도와드릴까요?").messages)
    start = tiny_tokenizer.encode("무엇을 도와드릴까요?")
    assert alone[: len(start)] == start
    for text in ("반가워요", "네"):
        chat.say(text)
    chat.reset()
    chat.say("네")
    chat.messages *= 60
    assert chat.say("네")[1] > 0
    assert [ids[: len(start)] for ids in model.asked] == [start] * 4
    assert model.asked[2] == alone
    assert "도와드릴까요" not in str(chat.messages)


def test_chat_command(kochat, tiny_base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("반가워요\n\n/reset\n반가워요\n/exit\n네\n"))
    code, printed = kochat("chat", tiny_base, "--decoding", "greedy", "--set", "max_new_tokens=6", "min_new_tokens=6")
    assert code == 0, printed
    heading, first, nothing, reset, again, end = said(printed).split("> ")
    assert "/reset" in heading
    assert first == again
    assert first.strip()
    assert (nothing, reset, end) == ("", "", "")


def test_chat_says_what_does_not_fit_and_goes_on(kochat, tiny_base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("반가워요 " * 300 + "\n네\n"))
    code, printed = kochat("chat", tiny_base, "--decoding", "greedy", "--set", "max_new_tokens=6")
    assert code == 0
    assert "error: a prompt of" in printed
    assert len(said(printed).split("> ")) == 4  # said, error, said, end


def test_generate_command(kochat, tiny_base, model, tiny_tokenizer, write, tmp_path):
    """One prompt is answered with the answer alone; a file of them in lines, or into a file."""
    words = ["max_new_tokens=6", "min_new_tokens=6"]
    settings = ("--set", *words)
    expected = generate_answers(
        model, tiny_tokenizer, PROMPTS[:3], decoding("greedy", max_new_tokens=6, min_new_tokens=6)
    )
    code, printed = kochat("generate", tiny_base, "--prompt", TEXTS[0], *settings)
    assert (code, said(printed).strip()) == (0, expected[0].text)
    assert expected[0].text
    file = write("prompts.jsonl", json.dumps([{"prompt": prompt} for prompt in TEXTS[:3]]))
    code, printed = kochat("generate", tiny_base, "--file", file, *settings)
    assert code == 0
    for prompt, answer in zip(TEXTS[:3], expected, strict=True):
        assert f"{prompt}\n  → {answer.text}\n" in printed
    output = tmp_path / "answers.jsonl"
    assert kochat("generate", tiny_base, "--file", file, "--output", output, "--limit", 2, *settings)[0] == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"prompt": p, "completion": a.text, "ended": a.ended} for p, a in zip(TEXTS[:2], expected[:2], strict=True)
    ]


def test_a_system_message_for_all(kochat, tiny_base, model, tiny_tokenizer, write, tmp_path):
    """It goes before a record's own, which is used where none is given."""
    words = ["max_new_tokens=6", "min_new_tokens=6"]
    file = write("prompts.jsonl", json.dumps([{"prompt": "네", "system": "반말로 답해."}, {"prompt": "네"}]))
    for given, systems in (("존댓말로 답해.", ["존댓말로 답해."] * 2), (None, ["반말로 답해.", None])):
        output = tmp_path / f"{given}.jsonl"
        options = ("--system", given) if given else ()
        code, printed = kochat("generate", tiny_base, "--file", file, "--output", output, "--set", *words, *options)
        assert code == 0, printed
        prompts = [Prompt("네", system) for system in systems]
        answers = generate_answers(
            model, tiny_tokenizer, prompts, decoding("greedy", max_new_tokens=6, min_new_tokens=6)
        )
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert rows == [
            p.fields | {"completion": a.text, "ended": a.ended} for p, a in zip(prompts, answers, strict=True)
        ]


@pytest.mark.parametrize("words", [("chat",), ("generate", "--prompt", "네")])
def test_a_template_that_takes_no_system_message(kochat, tiny_base, tiny_tokenizer, tmp_path, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("네\n"))
    folder, tokenizer = shutil.copytree(tiny_base, tmp_path / "base"), copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("message['role'] == 'system' and loop.first", "false")
    tokenizer.save_pretrained(folder)
    command, *options = words
    assert kochat(command, folder, *options, "--set", "max_new_tokens=2")[0] == 0
    code, printed = kochat(command, folder, *options, "--set", "max_new_tokens=2", "--system", "친절하게")
    assert code == 1
    assert "error: the chat template takes no messages of system, user" in printed


def test_the_chat_command_takes_a_system_message(kochat, tiny_base, monkeypatch):
    asked = []
    monkeypatch.setattr(Chat, "say", lambda chat, text: asked.append([*chat.system, text]) or ("", 0))
    monkeypatch.setattr(sys, "stdin", io.StringIO("네\n"))
    assert kochat("chat", tiny_base, "--system", "친절하게")[0] == 0
    assert asked == [[{"role": "system", "content": "친절하게"}, "네"]]


def test_generate_compares_on_a_narrow_screen(kochat, tiny_base, tiny_reward):
    words = ("generate", tiny_base, "--prompt", TEXTS[0], "--compare", "greedy,beam,top_p", "--set", "max_new_tokens=6")
    code, printed = kochat(*words, "--reward-model", tiny_reward, width=60)
    assert code == 0, printed
    assert max(map(len, said(printed).splitlines())) <= 60
    assert all(word in printed for word in ("greedy", "beam", "top_p", "score"))


def test_generate_refusals(kochat, tiny_base, tiny_reward):
    code, printed = kochat("generate", tiny_base, "--prompt", "네", "--reward-model", tiny_reward)
    assert code == 1
    assert "kochat reward score" in printed
    code, printed = kochat("generate", tiny_base, "--prompt", "네", "--compare", "greedy,bem")
    assert code == 1
    assert "there is no preset 'bem'" in printed
