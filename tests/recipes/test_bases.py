"""Other architectures through all stages, and what one line of YAML changes."""

import json
import shutil
from pathlib import Path

from kochat_trl.desk.workflow.memory import plan_memory
from kochat_trl.models.loading import load_policy
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import adapted_modules

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
GATED = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
BASES = {
    "gpt_neox": (
        GPTNeoXConfig(**SIZES, rotary_pct=0.5),
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True), GATED),
    "llama": (LlamaConfig(**SIZES, num_key_value_heads=2), GATED),
}

# (inputs, outputs) of a block's matrices; two of four heads have keys and values of their own.
NEOX = [(64, 192), (64, 64), (64, 128), (128, 64)]
MATRICES = {"gpt_neox": NEOX} | dict.fromkeys(("qwen2", "llama"), [(64, 64)] * 2 + [(64, 32)] * 2 + [(64, 128)] * 3)


def write_set(folder, base, files):
    """A set of configs in float32 on `base`, two steps a stage."""
    common = {"use_cpu": True, "use_peft": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    common |= {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "seed": 0, "learning_rate": 1e-2}
    trained = common | {"model_name_or_path": str(base), "lora_r": 4, "max_steps": 2, "max_length": 64}
    ppo = common | {"num_mini_batches": 1, "total_episodes": 4, "response_length": 5, "max_prompt_length": 32}
    ppo |= {
        "max_prompt_length": 32,
        "sft_model_path": str(folder / "out/sft"),
        "reward_model_path": str(folder / "out/reward"),
    }
    ppo |= {"temperature": 1.0, "num_sample_generations": 0, "num_ppo_epochs": 1, "local_rollout_forward_batch_size": 2}
    (folder / "set").mkdir()
    for stage, values in {"sft": trained, "reward": trained, "ppo": ppo}.items():
        values = values | {"output_dir": str(folder / "out" / stage), "train_files": [files[stage]]}
        (folder / f"set/{stage}.yaml").write_text(yaml.safe_dump(values))
    return folder / "set"


def save_base(config, tiny_base, tiny_tokenizer, folder):
    """A random model of an architecture, in a folder as on the Hub, with the tiny base's tokenizer."""
    config.vocab_size, config.eos_token_id, config.pad_token_id = 2000, 1, 3
    config.bos_token_id = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(Path(tiny_base) / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("loading", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("name", BASES)
def test_all_stages_on_another_architecture(
    name, loading, tiny_base, tiny_tokenizer, kochatgpt_files, tmp_path, recipe
):
    config, targets = BASES[name]
    base = save_base(config, tiny_base, tiny_tokenizer, tmp_path / "base")
    write_set(tmp_path, base, kochatgpt_files)
    quantized = tmp_path / "quantized.yaml"
    quantized.write_text(f"extends: set\n{loading}: true\nllm_int8_threshold: 0\n")
    for stage in ("sft", "reward", "ppo"):
        recipe(stage, "--config", quantized)
    out = tmp_path / "out"
    history = json.loads((out / "ppo/metrics.json").read_text())["history"]
    assert len(history) == 2
    assert history[0]["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert history[0]["objective/kl"] == 0
    assert history[1]["objective/kl"] != 0

    for stage in ("sft", "ppo"):
        model = load_policy(str(out / stage), ModelArguments(dtype="float32"), tiny_tokenizer)
        adapted = {".".join(path.split(".")[-2:]) for path in adapted_modules(model)}
        assert adapted == targets
        moved = [p for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 0]
        assert len(moved) == 2 * len(targets)  # every one of both layers
    merge_adapter(str(out / "ppo"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    matrices = 2 * sum(a * b for a, b in MATRICES[name])
    stored = {"load_in_8bit": ("int8", matrices), "load_in_4bit": ("uint8", matrices // 2)}[loading]
    for footprint in plan_memory(quantized):  # and no more is quantized: the heads stay as they are
        assert footprint.parts[f"frozen weights, {stored[0]}"] == stored[1]


@pytest.fixture(scope="module")
def stages_done(tiny_base, kochatgpt_files, tmp_path_factory):
    """A set whose SFT and reward model are there."""
    folder = tmp_path_factory.mktemp("set")
    return write_set(folder, tiny_base, kochatgpt_files)


# The stage, the line, and what it does to the first loss (from `before` to `loss`) or to what else is there.
CHANGES = {
    "base": ("sft", "model_name_or_path: {other}", lambda run: run["base"].endswith("other")),
    "precision": ("sft", "load_in_8bit: true", lambda run: 0 < abs(run["loss"] - run["before"]) < 0.1),
    "pairs": ("reward", "pairs: best_vs_rest", lambda run: abs(run["loss"] - run["before"]) > 1e-6),
    "loss": ("reward", "loss: listwise", lambda run: run["loss"] > run["before"] + 0.3),  # log 6 in place of log 2
    "kl": ("ppo", "kl_estimator: k3", lambda run: run["history"][1]["objective/kl"] > 0),
    "engine": ("ppo", "engine: trl", lambda run: "objective/kl_coef" not in run["history"][0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_line_changes(name, stages_done, tiny_base, tiny_tokenizer, tmp_path, recipe):
    """The stage runs with the line and without it, and the change shows in what it leaves behind."""
    stage, line, shows = CHANGES[name]
    out = stages_done.parent / "out"
    for needed in ("sft", "reward") if stage == "ppo" else ():
        if not (out / needed).is_dir():
            recipe(needed, "--config", stages_done)
    save_base(BASES["llama"][0], tiny_base, tiny_tokenizer, tmp_path / "other")
    experiment = stages_done.parent / f"{name}.yaml"
    experiment.write_text(f"extends: set\n{line.format(other=tmp_path / 'other')}\n")
    found = {}
    for key, config in {"before": stages_done, "loss": experiment}.items():
        recipe(stage, "--config", config, "--output_dir", tmp_path / key)
        found["history"] = json.loads((tmp_path / key / "metrics.json").read_text())["history"]
        found[key] = found["history"][0].get("loss")
    found["base"] = json.loads((tmp_path / "loss/adapter_config.json").read_text())["base_model_name_or_path"]
    assert shows(found), found
