"""Quantization, LoRA and the score head, with real bitsandbytes on the CPU."""

import copy
import shutil

from kochat_trl.errors import UserError
from kochat_trl.models.loading import (
    add_lora,
    base_of_adapter,
    cast_trainable_to_float32,
    load_causal_lm,
    load_reward_model,
    new_reward_model,
    positions_of,
    require_stage_output,
)
from kochat_trl.rows.encode import encode_dialogue
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import adapted_modules

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

LOADING = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "int8-bfloat16": {"load_in_8bit": True, "dtype": "bfloat16"},
    "nf4": {"load_in_4bit": True},
}


def arguments(loading: str, **kwargs) -> ModelArguments:
    return ModelArguments(
        use_peft=True, lora_r=4, lora_dropout=0.0, **({"dtype": "float32"} | LOADING[loading]), **kwargs
    )


@pytest.fixture
def batch(tiny_tokenizer):
    """Two dialogues of different length, padded on the right."""
    rows = [
        encode_dialogue(tiny_tokenizer, ({"role": "user", "content": p}, {"role": "assistant", "content": a}))[0]
        for p, a in (("일본의 수도는 어디인가요?", "도쿄입니다."), ("반가워요", "네"))
    ]
    length = max(map(len, rows))
    pad = tiny_tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    assert mask.sum() < mask.numel()
    return {"input_ids": ids, "attention_mask": mask}


def nudge(model) -> None:
    """Move every trainable weight off its starting point (LoRA's B starts at 0)."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("loading", LOADING)
def test_causal_lm_is_quantized_adapted_and_trains(tiny_base, tiny_tokenizer, batch, loading):
    args = arguments(loading)
    model = add_lora(load_causal_lm(tiny_base, args, tiny_tokenizer), args)
    block = model.base_model.model.transformer.h[0]
    stored = block.attn.c_attn.base_layer.weight.dtype
    assert stored == {"int8": torch.int8, "int8-bfloat16": torch.int8, "nf4": torch.uint8}.get(
        loading, getattr(torch, args.dtype)
    )
    assert len(adapted_modules(model)) == 4 * model.config.n_layer  # c_attn, c_proj, c_fc, c_proj of each block
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 8 * model.config.n_layer
    assert {p.dtype for p in trainable.values()} == {torch.float32}

    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in trainable.items() if "lora_B" in n)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("loading", LOADING)
def test_reward_model_comes_back_with_its_head(tiny_base, tiny_tokenizer, batch, loading, tmp_path):
    args = arguments(loading)
    torch.manual_seed(0)
    model = add_lora(new_reward_model(tiny_base, args, tiny_tokenizer), args)
    assert len(adapted_modules(model)) == 4 * model.config.n_layer
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(**batch).logits.sum().backward()
    assert model.score.weight.grad.abs().max() > 0
    nudge(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].dtype == torch.float32

    torch.manual_seed(99)  # another random head would be drawn now
    frozen = load_reward_model(str(tmp_path), args, tiny_tokenizer)
    value = load_reward_model(str(tmp_path), args, tiny_tokenizer, trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {p.dtype for p in value.parameters() if p.requires_grad} == {torch.float32}
    # The same weights, copied in memory rather than through the files.
    control = add_lora(new_reward_model(tiny_base, args, tiny_tokenizer), args)
    set_peft_model_state_dict(control, get_peft_model_state_dict(model))
    with torch.no_grad():
        expected = control.eval()(**batch).logits
        assert torch.equal(frozen.eval()(**batch).logits, expected)
        assert torch.equal(value.eval()(**batch).logits, expected)
    assert base_of_adapter(str(tmp_path)) == (tiny_base, "main")


def test_merged_reward_model_as_value_model(tiny_base, tiny_tokenizer, batch, tmp_path):
    """Loaded in int8 it gets a new adapter, which starts from its scores; whole in float32, every weight is trained."""
    torch.manual_seed(0)
    model = new_reward_model(tiny_base, arguments("float32"), tiny_tokenizer)
    model.save_pretrained(tmp_path)
    for args in (arguments("int8"), ModelArguments(dtype="float32")):
        frozen = load_reward_model(str(tmp_path), args, tiny_tokenizer).eval()
        value = load_reward_model(str(tmp_path), args, tiny_tokenizer, trainable=True).eval()
        assert not any(p.requires_grad for p in frozen.parameters())
        assert value.score.weight.requires_grad
        assert len(adapted_modules(value)) == (8 if args.use_peft else 0)
        assert args.use_peft or all(p.requires_grad for p in value.parameters())
        with torch.no_grad():
            torch.testing.assert_close(value(**batch).logits, frozen(**batch).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loading", ["float32", "int8", "nf4"])
def test_scores_ignore_padding_and_neighbours(tiny_base, tiny_tokenizer, batch, loading):
    """Poison what is under the mask, add padding, score a row alone: nothing moves."""
    args = arguments(loading)
    torch.manual_seed(0)
    model = add_lora(new_reward_model(tiny_base, args, tiny_tokenizer), args).eval()
    nudge(model)

    def scores(ids, mask):
        with torch.no_grad():
            hidden = model.base_model.model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
            return model.score(hidden)[torch.arange(len(ids)), mask.sum(1) - 1].squeeze(-1)

    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = model(**batch).logits.squeeze(-1)
    torch.testing.assert_close(scores(ids, mask), expected, rtol=0, atol=1e-6)
    poisoned = torch.where(mask.bool(), ids, torch.full_like(ids, 77))
    torch.testing.assert_close(scores(poisoned, mask), expected, rtol=0, atol=1e-6)
    alone = ids[1:, : mask[1].sum()]
    # Another shape rounds differently in the last bit; int8 may then round an activation to the next step.
    tolerance = {"float32": 1e-5, "int8": 1e-3, "nf4": 1e-5}[loading]
    torch.testing.assert_close(scores(alone, torch.ones_like(alone)), expected[1:], rtol=0, atol=tolerance)


@pytest.mark.parametrize("loading", ["float32", "int8", "nf4"])
def test_gradients_ignore_padding(tiny_base, tiny_tokenizer, batch, loading):
    """Poison what is under the mask: no weight's gradient moves. (The tiny base has no dropout.)"""
    args = arguments(loading)
    torch.manual_seed(0)
    model = add_lora(new_reward_model(tiny_base, args, tiny_tokenizer), args).train()
    nudge(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def gradients(ids):
        hidden = model.base_model.model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        scores = model.score(hidden)[torch.arange(len(ids)), mask.sum(1) - 1]
        return torch.autograd.grad(scores.sum(), trainable)

    clean = gradients(ids)
    assert all(gradient.abs().max() > 0 for gradient in clean)
    poisoned = torch.where(mask.bool(), ids, torch.full_like(ids, 77))
    torch.testing.assert_close(gradients(poisoned), clean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loading", ["float32", "int8", "nf4"])
def test_gradients_are_the_same_after_a_pass_in_eval_mode(tiny_base, tiny_tokenizer, batch, loading):
    """PPO samples before it learns. bitsandbytes repacks nf4 weights in eval mode, on a CPU with AVX512-BF16."""
    args = arguments(loading)
    model = add_lora(load_causal_lm(tiny_base, args, tiny_tokenizer), args)
    nudge(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for _ in range(2):
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        gradients.append(torch.autograd.grad(loss, trainable))
        with torch.no_grad():
            model.eval()(**batch)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("loading", ["int8", "nf4"])
def test_a_quantized_model_lets_its_file_go(tiny_base, tiny_tokenizer, tmp_path, loading):
    """What stays a float would else be a view of the file, and hold all of its float32 weights in memory."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    model = load_causal_lm(str(base), arguments(loading), tiny_tokenizer)
    file = base / "model.safetensors"
    with file.open("r+b") as stream:  # in place: a view would see it
        stream.write(bytes(file.stat().st_size))
    floats = [p for p in model.parameters() if p.dtype == torch.float32 and p.dim() > 1]
    assert len(floats) == 2  # the embeddings of words and positions
    assert all(parameter.abs().max() > 0 for parameter in floats)
    assert model.transformer.wte.weight is model.lm_head.weight  # still tied


def test_all_linear_of_a_llama(tmp_path, tiny_tokenizer):
    config = LlamaConfig(
        vocab_size=3000, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    args = arguments("int8")
    model = add_lora(load_causal_lm(str(tmp_path), args, tiny_tokenizer), args)
    assert len(adapted_modules(model)) == 7 * 2  # q, k, v, o, gate, up, down
    assert not any("lm_head" in name for name in adapted_modules(model))


def test_kogpt2_s_true_shape_gets_48_adapted_modules(shared, tmp_path):
    from kochat_trl.models.tokenizer import load_tokenizer

    folder = shared / "kogpt2-tokenizer"
    GPT2LMHeadModel(GPT2Config.from_pretrained(folder)).save_pretrained(tmp_path)
    args = arguments("int8")
    model = add_lora(load_causal_lm(str(tmp_path), args, load_tokenizer(str(folder))), args)
    assert len(adapted_modules(model)) == 48


def test_trl_s_bfloat16_cast_is_undone(tiny_base, tiny_tokenizer):
    args = arguments("int8")
    model = add_lora(load_causal_lm(tiny_base, args, tiny_tokenizer), args)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # as TRL's trainers do on a quantized base
    before = {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    cast_trainable_to_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad} == before


def test_a_missing_head_is_refused(tiny_base, tiny_tokenizer, tmp_path):
    args = arguments("float32")
    torch.manual_seed(0)
    model = add_lora(new_reward_model(tiny_base, args, tiny_tokenizer), args)
    model.save_pretrained(tmp_path)
    weights = get_peft_model_state_dict(model)
    save_file(
        {n: w.contiguous() for n, w in weights.items() if "score" not in n}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="no score head there"):
        load_reward_model(str(tmp_path), args, tiny_tokenizer)
    with pytest.raises(UserError, match="no score head there"):
        load_reward_model(tiny_base, args, tiny_tokenizer)  # a language model, local or from the Hub
    with pytest.raises(UserError, match="there is no folder outputs/kogpt2/reward"):
        load_reward_model("outputs/kogpt2/reward", args, tiny_tokenizer)


def test_one_target_is_a_name_and_not_a_regex(tiny_base, tiny_tokenizer):
    args = arguments("float32", lora_target_modules=["c_attn"])
    model = add_lora(load_causal_lm(tiny_base, args, tiny_tokenizer), args)
    assert len(adapted_modules(model)) == model.config.n_layer


def test_what_can_not_be_trained_is_refused(tiny_base, tiny_tokenizer):
    whole = ModelArguments(load_in_8bit=True, dtype="float32")
    with pytest.raises(UserError, match="can't be trained whole: set `use_peft: true`"):
        add_lora(load_causal_lm(tiny_base, whole, tiny_tokenizer), whole)
    misnamed = arguments("float32", lora_target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"lora_target_modules: .*q_proj"):
        add_lora(load_causal_lm(tiny_base, misnamed, tiny_tokenizer), misnamed)


def test_an_adapter_moved_with_its_base_is_found(tiny_base, tiny_tokenizer, tmp_path):
    args = arguments("float32", model_revision="v2")
    model = load_causal_lm(tiny_base, args, tiny_tokenizer)
    folder = tmp_path / "ppo"
    base = folder / "sft_merged"
    copy.deepcopy(model).save_pretrained(base)
    adapted = add_lora(load_causal_lm(str(base), args, tiny_tokenizer), args)
    adapted.save_pretrained(folder)
    assert base_of_adapter(str(folder)) == (str(base), "v2")
    moved = folder.rename(tmp_path / "elsewhere")
    assert base_of_adapter(str(moved)) == (str(moved / "sft_merged"), "v2")


def test_a_saved_generation_config_does_not_leak(tiny_base, tiny_tokenizer, tmp_path):
    model = load_causal_lm(tiny_base, arguments("float32"), tiny_tokenizer)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), arguments("float32"), tiny_tokenizer).generation_config
    assert loaded.repetition_penalty in (None, 1.0)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 3)


def test_what_is_a_folder_and_what_a_hub_name():
    for folder in ("outputs/sft", "./sft", "/sft", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder"):
            require_stage_output(folder)
    for name in ("gpt2", "skt/kogpt2-base-v2"):
        require_stage_output(name)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(n_positions=77), 77),
        (Gemma3Config(text_config={"max_position_embeddings": 99}), 99),
        (BloomConfig(), None),
        (PreTrainedConfig(max_position_embeddings=None), None),
    ],
    ids=["own", "of the text part", "no limit", "null"],
)
def test_positions_are_read_from_any_config(config, positions):
    assert positions_of(config) == positions
