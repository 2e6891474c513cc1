"""Tiny bases with adapters for each role, and what a role or a model reads."""

from kochat_trl.models.loading import add_lora
from kochat_trl.ppo.roles import Role, load_roles, one_backbone
from kochat_trl.settings.keys import ModelArguments

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

VOCAB, PAD = 40, 0
SHAPES = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=PAD, num_labels=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=PAD, num_labels=1, initializer_range=0.2,
    ),
}  # fmt: skip
TARGETS = {
    "gpt2": {"sft": ["c_attn", "c_fc"], "reward": ["attn.c_proj", "c_fc"]},
    "llama": {"sft": ["q_proj", "up_proj"], "reward": ["v_proj", "up_proj"]},
}
ROLES = ("policy", "reference", "reward", "value")
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)})), eos_token="w1", pad_token="w0"
)
IDS = torch.tensor([[5, 9, 7, 30, 2, 11], [21, 4, 8, PAD, PAD, PAD]])  # padded on the right
MASK = (IDS != PAD).long()
INT8 = BitsAndBytesConfig(
    load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=["lm_head", "score"]
)  # threshold 0: no row depends on its neighbours


def arguments(**settings) -> ModelArguments:
    return ModelArguments(**({"dtype": "float32", "use_peft": True, "lora_dropout": 0.0} | settings))


def stir(parameters, seed, size=0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def save_adapter(base, folder, auto_class, targets, rank, seed, **settings) -> str:
    """A LoRA adapter with B other than 0, and the score head of a classifier."""
    made = arguments(lora_r=rank, lora_alpha=2 * rank, lora_target_modules=targets, **settings)
    model = add_lora(auto_class.from_pretrained(base), made)
    stir((p for p in model.parameters() if p.requires_grad), seed)
    model.save_pretrained(folder)
    return str(folder)


def save_base(folder, kind, seed=0) -> str:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(SHAPES[kind]).save_pretrained(folder)
    return str(folder)


class Folders:
    """A base, an SFT adapter and a reward adapter of another rank on other layers, and whole models."""

    def __init__(self, root, kind):
        self.kind = kind
        self.base = save_base(root / "base", kind)
        targets = TARGETS[kind]
        self.sft = save_adapter(self.base, root / "sft", AutoModelForCausalLM, targets["sft"], 4, 1)
        classifier = AutoModelForSequenceClassification
        self.reward = save_adapter(self.base, root / "reward", classifier, targets["reward"], 2, 2)
        self.other_base = save_base(root / "other", kind, seed=5)
        self.far_reward = save_adapter(self.other_base, root / "far", classifier, targets["reward"], 2, 3)
        torch.manual_seed(6)
        classifier.from_config(SHAPES[kind]).save_pretrained(root / "whole")
        self.whole_reward = str(root / "whole")

    def backbone(self, auto_class=AutoModelForCausalLM, loading="float32"):
        return auto_class.from_pretrained(self.base, quantization_config=INT8 if loading == "int8" else None)

    def roles(self, value_model="adapter", loading="float32"):
        return one_backbone(self.backbone(loading=loading), self.sft, self.reward, value_model)

    def load(self, sft=None, reward=None, value_model="adapter", share=True, **settings):
        made = arguments(**settings)
        return load_roles(sft or self.sft, reward or self.reward, made, TOKENIZER, value_model, share)


FOLDERS = {}


def folders_of(kind, tmp_path_factory) -> Folders:
    if kind not in FOLDERS:
        FOLDERS[kind] = Folders(tmp_path_factory.mktemp(kind), kind)
    return FOLDERS[kind]


loadings = pytest.mark.parametrize("loading", ["float32", "int8"])
gpt2 = pytest.mark.parametrize("folders", ["gpt2"], indirect=True)  # where the kind of model makes no difference
value_models = pytest.mark.parametrize("value_model", ["adapter", "shared"])


@torch.no_grad()
def read(role: Role):
    """Hidden states of the words, and what the head makes of them."""
    with role.active():
        hidden = role.hidden(IDS, MASK)
        return hidden[MASK.bool()], role.head(hidden)[MASK.bool()]


def read_all(roles):
    return {name: read(getattr(roles, name)) for name in ROLES}


@torch.no_grad()
def read_model(model):
    """The same of a model by itself, without roles."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = inner.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state
    head = inner.score if hasattr(inner, "score") else inner.lm_head
    return hidden[MASK.bool()], head(hidden)[MASK.bool()]


@torch.no_grad()
def scores_of(model):
    """A classifier's own score of each row."""
    return model(input_ids=IDS, attention_mask=MASK).logits


def equal(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def apart(one, other) -> bool:
    return all((x - y).abs().max() > 1e-2 for x, y in zip(one, other, strict=True))


def state(roles):
    """Which adapter each layer has on, and which weights are trained."""
    layers = [layer._active_adapter for layer in roles.policy.layers]
    return [str(x) for x in layers], {name: p.requires_grad for name, p in roles.named_parameters()}


def trained(roles) -> set[str]:
    return {name for name, parameter in roles.named_parameters() if parameter.requires_grad}


def gradients(roles):
    return {name: p.grad.clone() for name, p in roles.named_parameters() if p.grad is not None and p.grad.any()}


def belongs_to(name: str, adapter: str) -> bool:
    return name.endswith((f".{adapter}.weight", f".{adapter}")) or name == f"models.{adapter}_head.weight"
