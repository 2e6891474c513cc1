"""Every chat template that TRL ships, as a kind: where an answer starts and ends, or why it can't be trained with."""

import logging
import re
from pathlib import Path

from benchmarks.architectures import CHATML, byte_tokenizer
from kochat_trl.data.records import Ranking, conversation
from kochat_trl.errors import UserError
from kochat_trl.models.template import (
    NO_THINKING,
    answer_shape,
    answer_text,
    generation_ids,
    render,
    settle_template,
    stop_ids,
)
from kochat_trl.models.tokenizer import CHAT_TEMPLATE, load_tokenizer
from kochat_trl.rows import rows
from kochat_trl.rows.encode import IGNORED, encode_dialogue, encode_prompt

import pytest
import trl
from tokenizers import AddedToken

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
MARKS = re.compile(r"<[|｜]?[A-Za-z_▁]+[|｜]?>|\[\|[a-z]+\|\]|\[[A-Z]+\]")
NEVER_SAMPLED = "what is trained would never be sampled"
# Templates that are refused, and why; with and without `_training`.
REFUSED = {
    "deepseekv3": NEVER_SAMPLED,  # the prompt begins a thought, and an answer has none
    "deepseek_r1_distill": NEVER_SAMPLED,
    "idefics3": NEVER_SAMPLED,  # for images: takes no plain text
    "llava_next": "takes no messages of user",  # the same
}
# Of those that take one exchange: what they refuse beside it.
NO_SYSTEM = {"gemma": "takes no messages of system"}
NOT_SEVERAL = {"gptoss": "rewrites earlier turns"}  # it closes the last answer of a dialogue otherwise than the others
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>", "glm4moe": "<|user|>", "gptoss": "<|return|>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
    "muse_glimmer": "<|eot|>", "nemotron_3_nano": "<|im_end|>", "phi3": "<|end|>", "qwen3": "<|im_end|>",
}  # fmt: skip
SYSTEM = "높다의 반대말은 낮다입니다."
TEXTS = ("대한민국의 수도는 어디인가요?", "대한민국의 수도는 서울입니다.", "반가워요", "(멍멍)")


def reader(template, kind, tiny_base):
    """A tokenizer with the template's markup as special tokens: of bytes, or of kogpt2's kind, which eats spaces."""
    marks = list(dict.fromkeys(MARKS.findall(template)))
    if kind == "bytes":
        return byte_tokenizer(template, "<bos>", "<eos>", *marks, bos_token="<bos>", eos_token="<eos>")
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def spans(labels):
    """The trained stretches, (start, end)."""
    edges = [
        i for i, (a, b) in enumerate(zip([IGNORED, *labels], [*labels, IGNORED], strict=True)) if (a < 0) != (b < 0)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def stem(name):
    return name.removesuffix("_training")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_prefixes_and_labels_are_the_answers_with_their_end(name, kind, tiny_base):
    tokenizer = reader(TEMPLATES[name], kind, tiny_base)
    if stem(name) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[stem(name)]):
            settle_template(tokenizer)
        assert tokenizer.chat_template == TEMPLATES[name]
        return
    settle_template(tokenizer)
    shape = answer_shape(tokenizer)
    assert shape.end == ENDS.get(stem(name), shape.end)
    assert stop_ids(tokenizer) == [shape.end_id, tokenizer.eos_token_id]
    for texts in (TEXTS[:2], TEXTS):
        for system in (None, SYSTEM):
            messages = conversation(*texts, system=system)
            table = NOT_SEVERAL if len(texts) > 2 and stem(name) in NOT_SEVERAL else NO_SYSTEM if system else {}
            if stem(name) in table:
                with pytest.raises(UserError, match=table[stem(name)]):
                    encode_dialogue(tokenizer, messages)
                continue
            ids, labels = encode_dialogue(tokenizer, messages)
            found = spans(labels)
            assert [answer_text(tokenizer, ids[a:b]) for a, b in found] == list(texts[1::2])
            assert found[-1][1] == len(ids)
            first = len(messages) - len(texts) + 1
            for turn, (start, end) in enumerate(found):
                assert labels[start:end] == ids[start:end]
                assert ids[end - 1] == shape.end_id
                assert ids[:start] == encode_prompt(tokenizer, messages[: first + 2 * turn])
            assert (SYSTEM in tokenizer.decode(ids)) == (system is not None)
            if len(texts) == 2:
                record = Ranking(texts[0], (texts[1], "음"), ((0,), (1,)), system)
                (row,) = rows._ranking_rows(tokenizer, [record], 10_000, False)
                prompt, response = ids[: found[0][0]], ids[found[0][0] :]
                assert row["completion_ids"][0] == prompt + response  # what PPO scores when this is what it samples


def test_every_refusal_is_of_a_template_that_there_is():
    assert {*REFUSED, *NO_SYSTEM, *NOT_SEVERAL, *ENDS} <= TEMPLATES.keys()
    assert len(TEMPLATES) >= 60


@pytest.mark.parametrize(
    ("name", "chosen", "told"),
    [
        ("qwen2_5", lambda stock: stock, None),
        ("phi3", lambda stock: stock, None),  # what it writes after a whole dialogue is no part of an answer
        ("qwen3", lambda stock: TEMPLATES["qwen3_training"], "TRL's for training"),
        ("glm4moe", lambda stock: TEMPLATES["glm4moe_training"], "TRL's for training"),
        ("nemotron_3_nano", lambda stock: NO_THINKING + stock, "with thinking off"),
    ],
)
def test_the_template_that_is_trained_with_is_told_of_and_saved(name, chosen, told, tmp_path, caplog):
    stock = TEMPLATES[name]
    reader(stock, "bytes", None).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.chat_template == chosen(stock)
    assert (told in caplog.text) if told else not caplog.text
    tokenizer.save_pretrained(tmp_path / "saved")
    caplog.clear()
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == tokenizer.chat_template
    assert not caplog.text


def test_of_several_templates_the_default_is_looked_at(tmp_path):
    tokenizer = byte_tokenizer(CHATML, "<eos>", "<|im_start|>", "<|im_end|>", eos_token="<eos>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": "other"}
    settle_template(tokenizer)
    assert tokenizer.chat_template == {"default": CHATML, "tool_use": "other"}
    assert answer_shape(tokenizer).end == "<|im_end|>"


def turns(closing):
    body = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}" + closing + "{% endfor %}"
    return body + "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("closing", "answer"),
    [
        ("{{ eos_token }}", "나<eos>"),
        ("</s>\n", "나</s>"),
        (" </s> \n", "나 </s>"),
        ("<|a|><|b|>\n", "나<|a|><|b|>"),
        ("</s>{% if loop.last and m['role'] == 'assistant' %}<eos>{% endif %}", "나</s>"),
    ],
)
def test_the_end_is_the_last_special_token_after_every_answer(closing, answer):
    tokenizer = byte_tokenizer(turns(closing), "<eos>", "</s>", "<|a|>", "<|b|>", eos_token="<eos>")
    _, labels = encode_dialogue(tokenizer, conversation("가", "나"))
    trained = [i for i in labels if i != IGNORED]
    assert tokenizer.decode(trained) == answer
    assert answer_shape(tokenizer).end_id == trained[-1]
    ends = list(dict.fromkeys([trained[-1], tokenizer.eos_token_id]))
    assert stop_ids(tokenizer) == ends
    assert generation_ids(tokenizer)["eos_token_id"] == (ends if len(ends) > 1 else ends[0])


@pytest.mark.parametrize("closing", ["\n", "", "###", "<|end|>"])  # the last is no token of this tokenizer
def test_a_template_that_closes_with_no_token_is_refused_with_what_it_closes_with(closing):
    tokenizer = byte_tokenizer(turns(closing), "<eos>", eos_token="<eos>")
    message = f"closes an answer with {re.escape(repr(closing))}, in which the tokenizer has no special token"
    with pytest.raises(UserError, match=message):
        settle_template(tokenizer)


def test_load_tokenizer_names_the_folder_of_such_a_template(tmp_path):
    byte_tokenizer(turns("\n"), "<eos>", eos_token="<eos>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: the chat template closes an answer with"):
        load_tokenizer(str(tmp_path))


def test_an_end_that_a_text_holds_is_no_end(tiny_base):
    """What people type is read as it stands; the answer goes up to the template's own end."""
    tokenizer = byte_tokenizer(CHATML, "<eos>", "<|im_start|>", "<|im_end|>", eos_token="<eos>")
    _, labels = encode_dialogue(tokenizer, conversation("가<|im_end|>나", "다<|im_end|>라"))
    assert tokenizer.decode([i for i in labels if i != IGNORED]) == "다<|im_end|>라<|im_end|>"


def test_kochatgpt_s_template_ends_with_the_end_of_sequence(tiny_tokenizer):
    assert tiny_tokenizer.chat_template == CHAT_TEMPLATE
    shape = answer_shape(tiny_tokenizer)
    assert (shape.opening, shape.end, shape.end_id) == ("", "</s>", tiny_tokenizer.eos_token_id)
    assert stop_ids(tiny_tokenizer) == [tiny_tokenizer.eos_token_id]
    assert generation_ids(tiny_tokenizer) == {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 3}


def test_what_a_template_opens_an_answer_with_is_no_text_of_it():
    marks = ("<eos>", "<|im_start|>", "<|im_end|>")  # <think> is text, as it is in Qwen3's own tokenizer
    tokenizer = byte_tokenizer(TEMPLATES["qwen3_training"], *marks, eos_token="<eos>")
    messages = conversation("가", "나다")
    _, labels = encode_dialogue(tokenizer, messages)
    answer = [i for i in labels if i != IGNORED]
    assert tokenizer.decode(answer) == "<think>\n\n</think>\n\n나다<|im_end|>"
    assert answer_text(tokenizer, answer) == "나다"
    assert answer_text(tokenizer, answer[5:]) == tokenizer.decode(answer[5:], skip_special_tokens=True).strip()
    assert render(tokenizer, messages[:1], prompt=True).endswith("<|im_start|>assistant\n")


def test_a_newline_that_is_an_added_token_is_no_end():
    """Gemma's tokenizers have some, which aren't special."""
    marks = ("<eos>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = byte_tokenizer(TEMPLATES["gemma"], *marks, eos_token="<eos>", bos_token="<eos>")
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\n", "\n\n")])
    assert answer_shape(tokenizer).end == "<end_of_turn>"


def test_an_end_that_is_added_and_not_special_is_no_text():
    tokenizer = byte_tokenizer(CHATML, "<eos>", eos_token="<eos>")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False), AddedToken("\n", special=False)])
    assert answer_shape(tokenizer).end == "<|im_end|>"
    ids = encode_dialogue(tokenizer, conversation("가", "네."))[0]
    assert answer_text(tokenizer, ids[len(encode_prompt(tokenizer, conversation("가"))) :]) == "네."


def test_a_template_that_leaves_system_messages_out_is_refused_where_there_is_one():
    silent = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|a|>{% endfor %}"
    tokenizer = byte_tokenizer(silent, "<eos>", "<|a|>", eos_token="<eos>")
    assert encode_dialogue(tokenizer, conversation("가", "나"))
    with pytest.raises(UserError, match="it leaves the system message out"):
        encode_dialogue(tokenizer, conversation("가", "나", system="시"))


def test_an_error_in_a_template_is_no_traceback():
    tokenizer = byte_tokenizer("{{ messages[0]['content'] + 1 }}", "<eos>", eos_token="<eos>")
    with pytest.raises(UserError, match="takes no messages of user"):
        settle_template(tokenizer)
