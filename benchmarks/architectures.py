"""Random models of many architectures through SFT, reward model, PPO and merge: what runs, as a table.

    python benchmarks/architectures.py                  # all of them, in float32 and int8; two minutes
    python benchmarks/architectures.py gemma2 granite   # some

Two layers, 64 wide, weights large enough that a soft cap shows; a byte tokenizer with ChatML that pads with its end of
text, and an embedding that is larger than the tokenizer, as Qwen's is.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from kochat_trl.errors import UserError
from kochat_trl.models.heads import is_read_by_transformers
from kochat_trl.runs.merge import merge_adapter

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

EMBEDDING = 288  # rows; the tokenizer has 256 bytes and a few special tokens
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
# The type in config.json → who uses it, and what a tiny model of it needs beside SIZES.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("kogpt2, ko-gpt-trinity", {}),
    "gpt_neox": ("polyglot-ko", {}),
    "gptj": ("KoGPT (6B)", {"rotary_dim": 8}),
    "llama": ("Kanana, Mi:dm 2.0 Mini, HyperCLOVA X SEED 0.5B, 42dot, Llama 3", {}),
    "mistral": ("Mistral, Solar's kin", {}),
    "qwen2": ("Qwen2.5", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3 MoE", EXPERTS),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma 2", {"final_logit_softcapping": 5.0}),
    "gemma3_text": ("Gemma 3 1B", {}),
    "gemma3": ("Gemma 3 4B and larger: a text model inside another", {}),
    "gemma4_text": ("Gemma 4", {"final_logit_softcapping": 5.0}),
    "exaone4": ("EXAONE 4.0", {}),
    "exaone_moe": ("EXAONE MoE", EXPERTS),
    "hyperclovax": ("HyperCLOVA X SEED Think", {"logits_scaling": 0.25, "embedding_multiplier": 2.0}),
    "solar_open": ("Solar Open", EXPERTS),
    "phi3": ("Phi-3, Phi-4 mini", {}),
    "granite": ("Granite 3", {"logits_scaling": 8.0}),
    "cohere": ("Command R", {"logit_scale": 0.25}),
    "cohere2": ("Command R7B", {"logit_scale": 0.25}),
    "lfm2": ("LFM2", {"layer_types": ["conv", "full_attention"]}),
    "olmo2": ("OLMo 2", {}),
    "smollm3": ("SmolLM3", {}),
    "glm4": ("GLM-4", {}),
    "gpt_oss": ("GPT-OSS", EXPERTS),
    "opt": ("OPT", {"word_embed_proj_dim": 32}),
    "bloom": ("BLOOM", {"n_layer": 2, "n_head": 4}),
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 28, "patch_size": 14}
LOADINGS = {"float32": {}, "int8": {"load_in_8bit": True, "llm_int8_threshold": 0}}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = [("수도는?", "서울입니다.", "몰라"), ("반가워", "저도요.", "음"), ("하나에 둘을 더하면?", "셋이에요.", "다섯")]


def byte_tokenizer(template: str, *special: str, **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and `special` tokens; `roles` names some of them, such as eos_token."""
    words = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def make_config(name: str) -> Any:
    """The config of a tiny model; where the text's is inside another, that is what is tiny."""
    plain = CONFIG_MAPPING[name]()
    own = ARCHITECTURES[name][1] | {"vocab_size": EMBEDDING, "bos_token_id": 256, "eos_token_id": 256}
    own |= {"pad_token_id": 256}
    if "text_config" in plain.sub_configs:
        text = _sized(plain.text_config, own)
        return type(plain)(text_config=text, vision_config={**VISION}, pad_token_id=256)
    return _sized(plain, own)


def _sized(plain: Any, own: dict[str, Any]) -> Any:
    known = plain.to_dict().keys() | type(plain).attribute_map.keys()
    return type(plain)(**{key: value for key, value in SIZES.items() if key in known} | own)


def make_base(name: str, folder: Path, eos: str = "<|endoftext|>") -> None:
    """A random model of an architecture with its tokenizer, laid out as on the Hub."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(name)).save_pretrained(folder)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    byte_tokenizer(CHATML, *specials, eos_token=eos).save_pretrained(folder)


def write_set(folder: Path, base: Path, **settings: Any) -> Path:
    """Data, and a set of configs on `base` with two steps, or updates, a stage."""
    rows = {
        "sft": [{"prompt": p, "completion": good, "system": "짧게 답하세요."} for p, good, _ in PAIRS],
        "reward": [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in PAIRS],
        "ppo": [{"prompt": p} for p, _, _ in PAIRS],
    }
    common = {"use_cpu": True, "use_peft": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    common |= {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "seed": 0, "learning_rate": 1e-2}
    trained = common | {"model_name_or_path": str(base), "lora_r": 4, "max_steps": 2, "max_length": 128}
    ppo = common | {"num_mini_batches": 1, "total_episodes": 4, "response_length": 6, "max_prompt_length": 96}
    ppo |= {"sft_model_path": str(folder / "out/sft"), "reward_model_path": str(folder / "out/reward")}
    ppo |= {"temperature": 1.0, "num_sample_generations": 0, "num_ppo_epochs": 1, "stop_token": "eos"}
    (folder / "set").mkdir()
    for stage, values in {"sft": trained, "reward": trained, "ppo": ppo}.items():
        data = folder / f"{stage}.jsonl"
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[stage]), encoding="utf-8")
        values = values | settings | {"output_dir": str(folder / "out" / stage), "train_files": [str(data)]}
        (folder / f"set/{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder / "set"


def run_recipe(stage: str, *arguments: object) -> None:
    """What `python recipes/STAGE.py ARGUMENTS` does, in this process."""
    with patch.object(sys, "argv", [f"recipes/{stage}.py", *map(str, arguments)]):
        importlib.import_module(f"recipes.{stage}").main()


def run_stages(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """All stages and both merges of one architecture in `folder`.

    Returns PPO's history, and by how much a logit of each merged model differs from the unmerged one.
    """
    make_base(name, folder / "base")
    if ARCHITECTURES[name][1] is EXPERTS:
        settings["lora_dropout"] = 0.0  # PEFT's LoRA of experts, which are no linear layers, has none
    configs = write_set(folder, folder / "base", **settings)
    for stage in ("sft", "reward", "ppo"):
        run_recipe(stage, "--config", configs)
    out = folder / "out"
    differences = {kind: merge_adapter(str(out / kind), out / f"merged-{kind}") for kind in ("ppo", "reward")}
    return {"history": json.loads((out / "ppo/metrics.json").read_text())["history"], **differences}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    logging.disable(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print("| `model_type` | such as | float32 | int8 | its merged reward model in plain transformers |")
    print("| --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or ARCHITECTURES:
        cells = []
        for settings in LOADINGS.values():
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        found = run_stages(name, Path(folder), **settings)
                    first = found["history"][0]
                    exact = first["val/ratio"] == 1 and first["objective/kl"] == 0
                    cells.append("runs" if exact else f"ratio {first['val/ratio']}, KL {first['objective/kl']}")
                except (UserError, Exception) as error:
                    cells.append(f"{type(error).__name__}: {str(error)[:90]}")
        plain = "yes" if is_read_by_transformers(AutoConfig.for_model(name)) else "no: by `load_reward_model`"
        print(f"| {name} | {ARCHITECTURES[name][0]} | {' | '.join(cells)} | {plain} |", flush=True)


if __name__ == "__main__":
    main()
