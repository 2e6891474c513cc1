"""The tokenizer: kogpt2's own class and tokens, the template, and what is refused."""

import json
import unicodedata

from kochat_trl.data.readers import read_records
from kochat_trl.errors import UserError
from kochat_trl.models.template import render
from kochat_trl.models.tokenizer import CHAT_TEMPLATE, load_tokenizer
from kochat_trl.rows.encode import encode_dialogue
from tests.tiny import gpt2_config

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHECK = "안녕하세요. 한국어 GPT-2 입니다.😤:)l^o"
CHECK_TOKENS = ["▁안녕", "하", "세", "요.", "▁한국어", "▁G", "P", "T", "-2", "▁입", "니다.", "😤", ":)", "l^o"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def kogpt2(shared):
    return load_tokenizer(str(shared / "kogpt2-tokenizer"))


def test_kogpt2_reads_korean_and_not_bytes(kogpt2):
    assert kogpt2.tokenize(CHECK) == CHECK_TOKENS
    assert kogpt2.convert_ids_to_tokens(kogpt2.encode(CHECK)) == CHECK_TOKENS
    ids = {"bos": kogpt2.bos_token_id, "eos": kogpt2.eos_token_id, "pad": kogpt2.pad_token_id}
    assert ids == {"bos": 1, "eos": 1, "pad": 3}
    assert (kogpt2.unk_token_id, kogpt2.mask_token_id) == (5, 6)
    assert len(kogpt2) == 51_200  # nothing was added
    assert kogpt2.padding_side == "left"


def test_autotokenizer_still_falls_into_the_trap(shared):
    """If this fails, transformers has mended it, and load_tokenizer may be simpler."""
    assert AutoTokenizer.from_pretrained(shared / "kogpt2-tokenizer").tokenize(CHECK) != CHECK_TOKENS


def test_saved_kogpt2_opens_with_autotokenizer(kogpt2, tmp_path, shared):
    kogpt2.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((shared / "kogpt2-tokenizer/config.json").read_bytes())
    for reloaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert reloaded.tokenize(CHECK) == CHECK_TOKENS
        assert reloaded.chat_template == CHAT_TEMPLATE
        assert (reloaded.eos_token_id, reloaded.pad_token_id) == (1, 3)


def test_round_trip_of_every_real_prompt(kogpt2, shared):
    """Text comes back but for NFKC, for spaces beside added tokens, and where a character is unknown."""

    def folded(text: str) -> str:
        return "".join(unicodedata.normalize("NFKC", text).split())

    prompts = [r.fields["prompt"] for r in read_records(shared / "data/kochatgpt/kochatgpt_3_PPO.jsonl")]
    exact = unknown = 0
    for prompt in prompts:
        ids = kogpt2.encode(prompt)
        decoded = kogpt2.decode(ids)
        exact += decoded == prompt
        if kogpt2.unk_token_id in ids:
            unknown += 1
        else:
            assert folded(decoded) == folded(prompt)
    assert (len(prompts), len(prompts) - exact) == (12_000, 39)
    assert unknown == 28


def test_template_is_the_course_s_text(tiny_tokenizer):
    turns = [
        {"role": "user", "content": "안녕"},
        {"role": "assistant", "content": "반가워요."},
        {"role": "user", "content": "뭐해?"},
    ]
    assert render(tiny_tokenizer, turns[:1], prompt=True) == "### Instruction(명령어):\n안녕\n\n### Response(응답):"
    assert render(tiny_tokenizer, turns, prompt=True) == (
        "### Instruction(명령어):\n안녕\n\n### Response(응답):반가워요.</s>"
        "### Instruction(명령어):\n뭐해?\n\n### Response(응답):"
    )
    system = [{"role": "system", "content": "Below is an instruction"}, turns[0]]
    assert render(tiny_tokenizer, system).startswith("Below is an instruction\n\n### Instruction(명령어):\n안녕")
    with pytest.raises(Exception, match="unknown role"):
        render(tiny_tokenizer, [{"role": "tool", "content": "x"}])


@pytest.fixture
def chatml_folder(tmp_path):
    """A byte-level tokenizer with a template of its own, as Llama-, Qwen- and NeoX-style models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["안녕하세요 반갑습니다"] * 9, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def test_another_model_keeps_its_own_template(chatml_folder):
    tokenizer = load_tokenizer(str(chatml_folder))
    assert tokenizer.chat_template == CHATML
    assert tokenizer.pad_token == "<|im_end|>"  # it had none, and no token is added
    turns = ({"role": "user", "content": "안녕하세요"}, {"role": "assistant", "content": "\n반갑습니다"})
    ids, labels = encode_dialogue(tokenizer, turns * 2)
    answer = "\n반갑습니다<|im_end|>"  # the newline after it stands before the next turn
    assert tokenizer.decode([label for label in labels if label != -100]) == answer * 2
    assert tokenizer.decode(ids) == render(tokenizer, turns * 2).removesuffix("\n")


def test_refuses_more_entries_than_the_embedding(chatml_folder):
    entries = len(load_tokenizer(str(chatml_folder)))
    gpt2_config(entries - 1).save_pretrained(chatml_folder)
    with pytest.raises(UserError, match=rf"ids up to {entries - 1}, .* has {entries - 1} rows"):
        load_tokenizer(str(chatml_folder))
    gpt2_config(entries).save_pretrained(chatml_folder)
    load_tokenizer(str(chatml_folder))


def test_refuses_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))


def test_refuses_a_tokenizer_without_an_end(tmp_path, chatml_folder):
    config = json.loads((chatml_folder / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (chatml_folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no end-of-sequence token"):
        load_tokenizer(str(chatml_folder))
