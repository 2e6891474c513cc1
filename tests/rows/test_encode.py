"""Text → ids and labels: what a prompt is, what is trained on, and a template that would shift either."""

from kochat_trl.data.parse import parse
from kochat_trl.data.readers import read_records
from kochat_trl.data.records import Dialogue, conversation
from kochat_trl.desk.curation.convert import text_rows
from kochat_trl.errors import UserError
from kochat_trl.models.template import render
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.rows.encode import (
    IGNORED,
    encode_after,
    encode_dialogue,
    encode_dialogues,
    encode_prompt,
    encode_prompts,
    shorten_prompt,
)
from kochat_trl.settings.keys import DataArguments
from tests.tiny import parsed

import pytest


def test_a_template_that_rewrites_is_refused(tiny_tokenizer, monkeypatch):
    """One that puts something between prompt and answer would shift every answer that is taken out of its text."""
    thinking = tiny_tokenizer.chat_template + "{% if add_generation_prompt %}<think></think>{% endif %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", thinking)
    for use in (
        lambda: list(text_rows(Dialogue(("가", "나")), 0, DataArguments(), tiny_tokenizer)),
        lambda: encode_dialogue(tiny_tokenizer, conversation("가", "나")),
    ):
        with pytest.raises(UserError, match="the chat template lets an answer begin after '<think></think>'"):
            use()
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0]['content'] | upper }}")
    with pytest.raises(UserError, match="the chat template changes prompts"):
        shorten_prompt(tiny_tokenizer, conversation("abc " * 9), 5)


def test_ids_do_not_fuse_across_the_boundary(shared):
    """kogpt2 has a token for ':(': tokenizing the whole text would change the prompt's last token."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    prompt = encode_prompt(tokenizer, conversation("뭐라고 썼어?"))
    turns = conversation("뭐라고 썼어?", "(웃음) 그냥요.")
    assert tokenizer.encode(render(tokenizer, turns))[: len(prompt)] != prompt
    ids, labels = encode_dialogue(tokenizer, turns)
    assert ids[: len(prompt)] == prompt
    assert tokenizer.convert_ids_to_tokens(ids[len(prompt) :])[0] == "("  # and not "▁(", a new word
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    # A tokenizer that fuses `text` with everything is refused rather than trained on.
    with pytest.raises(UserError, match="fuses"):
        encode_after(_FusesEverything(), [""], ["가"])


class _FusesEverything:
    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[len(text) or 99] for text in texts]}


def test_every_real_record(shared):
    """On all real data: a prompt is a prefix of prompt + completion, and loss is on what the assistant says."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    data = shared / "data"
    sft = [*data.glob("mygpt/*instruction*"), *data.glob("kochatgpt/*SFT*")]
    dialogues = [record for path in sft for record in parsed(path, "sft")]
    rankings = [
        ranking
        for path in [*data.glob("mygpt/*rm*"), *data.glob("kochatgpt/*RM*")]
        for raw in read_records(path)
        if raw.fields.get("chosen") is None or raw.fields["chosen"] != raw.fields["rejected"]
        for ranking in parse(raw, "preference")
    ]
    chats = parsed(data / "chatbot/ChatbotData.csv", "sft")
    assert (len(dialogues), len(rankings), len(chats)) == (1041, 571 + 4, 11_823)
    assert sum(len(ranking.pairs()) for ranking in rankings) == 571 + 4 * 3
    dialogues += chats
    dialogues += [Dialogue((r.prompt, text)) for r in rankings for text in r.completions]
    encoded = encode_dialogues(tokenizer, [dialogue.messages for dialogue in dialogues])
    prompts = encode_prompts(tokenizer, [dialogue.messages[:1] for dialogue in dialogues])
    for dialogue, (ids, labels), first in zip(dialogues, encoded, prompts, strict=True):
        assert len(ids) == len(labels)
        # The prompt of each assistant turn, as inference would encode it, is a prefix.
        assert ids[: len(first)] == first
        # Each span of labels is one assistant turn and its </s>.
        spans, span = [], []
        for label in [*labels, IGNORED]:
            if label != IGNORED:
                span.append(label)
            elif span:
                spans.append(span)
                span = []
        answers = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        assert len(spans) == len(answers)
        for tokens, answer in zip(spans, answers, strict=True):
            assert tokens[-1] == tokenizer.eos_token_id
            prompt_text = render(tokenizer, dialogue.messages[:1], True)
            assert [tokens[:-1]] == encode_after(tokenizer, [prompt_text], [answer])


def test_labels_agree_with_trl_s_assistant_mask(shared):
    """TRL's own way, the template's generation block, marks the same tokens of every real dialogue."""
    tokenizer = load_tokenizer(str(shared / "kogpt2-tokenizer"))
    records = parsed(shared / "data/kochatgpt/kochatgpt_1_SFT_conversation.jsonl", "sft")
    assert len(records) == 439
    for record in records:
        ids, labels = encode_dialogue(tokenizer, record.messages)
        theirs = tokenizer.apply_chat_template(
            list(record.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == theirs["input_ids"]
        assert [int(label != IGNORED) for label in labels] == theirs["assistant_masks"]
