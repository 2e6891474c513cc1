"""What the planner counts, against sums by hand; against real steps it is measured in benchmarks/memory.py."""

import json

from kochat_trl.desk.workflow.memory import GB, GPU_EXTRA, Footprint, most_rows, plan_memory
from kochat_trl.desk.workflow.tracing import LiveBytes
from kochat_trl.errors import UserError

import pytest
import torch
import yaml
from transformers import Gemma3Config

VOCAB, WIDTH, LAYERS, RANK = 500, 32, 2, 4
MIB = 2**20


@pytest.fixture
def base(tmp_path):
    """A folder with a config.json and nothing else."""
    config = {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"n_positions": 128}))
    return tmp_path / "base"


@pytest.fixture
def configs(tmp_path, base):
    common = {"use_cpu": True, "use_peft": True, "gradient_checkpointing": False, "train_files": ["none"]}
    common |= {"per_device_train_batch_size": 4, "output_dir": "out"}
    trained = common | {"model_name_or_path": str(base), "lora_r": RANK, "max_length": 32}
    ppo = common | {"sft_model_path": "out/sft", "reward_model_path": "out/reward", "num_mini_batches": 1}
    ppo |= {"response_length": 10, "max_prompt_length": 20, "local_rollout_forward_batch_size": 4}
    preferred = common | {"sft_model_path": "out/sft", "max_length": 32}
    (tmp_path / "set").mkdir()
    for stage, values in {"sft": trained, "reward": trained, "ppo": ppo, "dpo": preferred, "kto": preferred}.items():
        (tmp_path / f"set/{stage}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "set"


# Matrices of a block, (inputs, outputs), each with a bias and under LoRA; and what isn't.
MATRICES = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
IN_MATRICES = LAYERS * sum(a * b for a, b in MATRICES)
BESIDE = LAYERS * (sum(b for _, b in MATRICES) + 4 * WIDTH) + 2 * WIDTH + (VOCAB + 128) * WIDTH
ADAPTER = LAYERS * RANK * sum(a + b for a, b in MATRICES)


def by_phase(found):
    return {footprint.phase: footprint.parts for footprint in found}


def test_weights_adapters_gradients_and_optimizer(configs):
    """Adam has two numbers for a weight, and one count for each of the tensors."""
    found = by_phase(plan_memory(configs))
    assert list(found) == ["SFT", "reward model", "PPO, update", "PPO, sampling"]
    adapters = {"SFT": ADAPTER, "reward model": ADAPTER + WIDTH, "PPO, update": 2 * ADAPTER + WIDTH}
    frozen = {"SFT": 0, "reward model": WIDTH, "PPO, update": 2 * ADAPTER + WIDTH}  # PEFT keeps the head it replaces
    for phase, adapter in adapters.items():
        parts = found[phase]
        assert parts["frozen weights, float32"] == 4 * (IN_MATRICES + BESIDE + frozen[phase])
        assert parts["trained weights"] == 4 * adapter
        assert 0 <= parts.get("gradients", 0) <= 4 * adapter
        assert 8 * adapter < parts["optimizer"] < 8 * adapter + 1000
    assert "gradients" not in found["PPO, sampling"]
    assert found["PPO, sampling"]["trained weights"] == found["PPO, update"]["trained weights"]


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_group_methods_have_no_value_adapter(configs, method):
    experiment = configs.parent / f"{method}.yaml"
    experiment.write_text(f"extends: set\nadvantages: {method}\nnum_generations: 2\n")
    found = by_phase(plan_memory(experiment))
    for phase in ("PPO, update", "PPO, sampling"):
        assert found[phase]["trained weights"] == 4 * ADAPTER
        assert found[phase]["frozen weights, float32"] == 4 * (IN_MATRICES + BESIDE + 2 * ADAPTER + WIDTH)
        assert 8 * ADAPTER < found[phase]["optimizer"] < 8 * ADAPTER + 1000


def test_dpo_and_kto_hold_two_adapters_on_one_base(configs):
    """A row is a pair, so that there are logits of twice as many; KTO's other answers have theirs one by one."""
    overrides = ["--load_in_8bit", "true"]
    found = {f.phase: f for f in plan_memory(configs, overrides, methods=["dpo", "kto"])}
    assert list(found) == ["SFT", "reward model", "DPO", "KTO"]
    scales = LAYERS * sum(b for _, b in MATRICES)
    logits = 4 * 4 * 32 * VOCAB  # float32, of 4 rows of 32 tokens
    for phase, rows in (("DPO", 8), ("KTO", 4)):
        parts = found[phase].parts
        assert parts["frozen weights, int8"] == IN_MATRICES
        assert parts["frozen weights, float32"] == 4 * (BESIDE + scales + ADAPTER)
        assert parts["trained weights"] == 4 * ADAPTER
        assert 3 * logits * rows / 4 < parts["logits"] < 8 * logits * rows / 4
    one = {f.phase: f.rows for f in plan_memory(configs, overrides, rows=1, methods=["dpo", "kto"])}
    assert (one["DPO"], one["KTO"]) == (1, 2)  # KTO's least


def test_a_base_whose_text_part_has_a_config_of_its_own(configs):
    """The sizes are those of the text part, also for PPO's heads."""
    text = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 128}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8})
    assert not hasattr(shape, "vocab_size")
    found = by_phase(plan_memory(configs, shape=shape))
    assert found["SFT"]["logits"] % VOCAB == 0
    assert len(found) == 4


def test_quantized_weights(configs):
    found = by_phase(plan_memory(configs, ["--load_in_8bit", "true"]))["SFT"]
    assert found["frozen weights, int8"] == IN_MATRICES
    scales = LAYERS * sum(b for _, b in MATRICES)
    assert found["frozen weights, float32"] == 4 * (BESIDE + scales)
    found = by_phase(plan_memory(configs, ["--load_in_4bit", "true"]))["SFT"]
    assert found["frozen weights, uint8"] == IN_MATRICES / 2
    found = by_phase(plan_memory(configs, ["--dtype", "bfloat16"]))["SFT"]
    assert found["frozen weights, bfloat16"] == 2 * (IN_MATRICES + BESIDE)


def test_keys_and_values_are_in_the_sampling(configs):
    """Those of 4 rows, for each token more."""

    def activations(length):
        path = configs / "ppo.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"response_length": length}))
        return by_phase(plan_memory(configs))["PPO, sampling"]["KV cache and activations"]

    a_token = 2 * LAYERS * WIDTH * 4 * 4
    few, many = activations(50), activations(100)
    assert many > 119 * a_token  # all but the last token, which is never read
    assert 50 * a_token <= many - few < 100 * a_token  # a layer's keys are copied to grow, and to be scaled


def test_a_gpu_computes_in_bfloat16_unless_the_config_says_otherwise(configs):
    for stage in ("sft", "reward", "ppo"):
        path = configs / f"{stage}.yaml"
        path.write_text(path.read_text().replace("use_cpu: true\n", ""))
    assert "frozen weights, bfloat16" in by_phase(plan_memory(configs))["SFT"]
    assert "frozen weights, bfloat16" not in by_phase(plan_memory(configs, ["--bf16", "false"]))["SFT"]


def test_a_gpus_attention_keeps_no_dropout_mask(configs, base):
    """GPT-2's config has attention dropout 0.1; on a CPU that costs (tokens × tokens) for each head."""
    path = base / "config.json"
    plain = json.loads(path.read_text())

    def activations(dropout):
        path.write_text(json.dumps(plain | {"attn_pdrop": dropout}))
        return by_phase(plan_memory(configs, ["--bf16", "false"]))["SFT"]["activations"]  # TRL trains RMs without

    assert activations(0.1) > activations(0.0) + 4 * LAYERS * 4 * 4 * 32**2  # float32, 4 heads, 4 rows, 32 tokens
    for stage in ("sft", "reward", "ppo"):
        config = configs / f"{stage}.yaml"
        config.write_text(config.read_text().replace("use_cpu: true\n", ""))
    assert activations(0.1) == activations(0.0)


def test_gradient_checkpointing_and_rows(configs):
    plain, few, checkpointed = (
        {footprint.phase: footprint for footprint in plan_memory(configs, overrides, rows=rows)}
        for overrides, rows in (([], 8), ([], 2), (["--gradient_checkpointing", "true"], 8))
    )
    for phase in ("SFT", "reward model", "PPO, update"):
        assert checkpointed[phase].parts["activations"] < 0.8 * plain[phase].parts["activations"]
        assert few[phase].rows == 2
        assert few[phase].parts["activations"] == pytest.approx(plain[phase].parts["activations"] / 4, rel=0.25)


def test_whole_models(configs):
    """Without LoRA each of PPO's models is its own, and two of them are trained."""
    found = by_phase(plan_memory(configs, ["--use_peft", "false"]))
    model = 4 * (IN_MATRICES + BESIDE)
    assert found["SFT"]["trained weights"] == model
    assert all(size > 0 for parts in found.values() for size in parts.values())
    assert found["PPO, update"]["trained weights"] == 2 * model + 4 * WIDTH
    assert found["PPO, update"]["frozen weights, float32"] == 2 * model + 4 * WIDTH


def test_nothing_is_written_and_no_weight_is_read(configs, base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan_memory(configs)
    assert sorted(tmp_path.rglob("*")) == before
    assert [path.name for path in base.iterdir()] == ["config.json"]


def test_no_such_base(configs, base):
    (base / "config.json").unlink()
    with pytest.raises(UserError, match="no model at"):
        plan_memory(configs)


def test_most_rows_by_hand():
    """2 GB and 0.5 GB a row: an 8 GB card less 1 GB has room for 10 rows; a 3 GB card for none."""
    one, four, eight = (Footprint("SFT", n, {"weights": 2 * GB, "activations": n * GB // 2}) for n in (1, 4, 8))
    assert GPU_EXTRA == GB
    assert [most_rows(one, four, eight, card) for card in (8, 4, 3.5, 3, 1)] == [10, 2, 1, 0, 0]
    optimizer = Footprint("SFT", 1, {"weights": 2 * GB, "optimizer": 3 * GB})  # the fullest moment of one row
    assert [most_rows(optimizer, four, eight, card) for card in (8, 6, 5.9)] == [10, 6, 0]
    assert most_rows(one, one, Footprint("SFT", 8, one.parts), 4) > 1000


def test_a_gpu_on_the_machine_is_not_touched(configs, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    for stage in ("sft", "reward", "ppo"):
        path = configs / f"{stage}.yaml"
        path.write_text(path.read_text().replace("use_cpu: true\n", "fp16: true\n"))
    assert "frozen weights, bfloat16" in by_phase(plan_memory(configs))["SFT"]  # of float16's size


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("ppo", {"engine": "trl"}, "engine: trl"),
        ("ppo", {"use_peft": False}, "LoRA in all stages, or in none"),
        ("ppo", {"max_prompt_length": None}, "max_prompt_length of ppo is not set"),
        ("reward", {"max_length": None}, "max_length of reward is not set"),
        ("dpo", {"max_length": None}, "max_length of dpo is not set"),
        ("dpo", {"use_peft": False}, "LoRA in all stages, or in none"),
    ],
)
def test_what_is_not_planned(configs, stage, change, message):
    path = configs / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        plan_memory(configs, methods=["dpo" if stage == "dpo" else "ppo"])


def test_dpo_without_lora_is_not_planned(configs):
    with pytest.raises(UserError, match="use_peft: planned is dpo with LoRA"):
        plan_memory(configs, ["--use_peft", "false"], methods=["dpo"])


def test_a_quantized_base_is_not_trained_whole(configs):
    with pytest.raises(UserError, match="a quantized base can't be trained whole"):
        plan_memory(configs, ["--use_peft", "false", "--load_in_8bit", "true"])


def test_live_bytes_are_those_of_real_tensors():
    """Views are no bytes, what is gone is none, and the peak stays."""
    live, a_weight = LiveBytes(vocab_size=10), torch.zeros(10)
    with live:
        a = torch.zeros(MIB // 4)
        b = a.view(2, -1) + 1
        assert (live.now, live.peak) == (2 * MIB, 2 * MIB)
        del a
        assert (live.now, live.peak) == (MIB, 2 * MIB)
        live.restart()
        assert live.peak == MIB
        c = torch.zeros(100, 10)
        assert live.logits_at_peak == 4000
        live.note_gradient(a_weight)
        live.note_gradient(a_weight)
        assert (live.gradients, live.gradients_at_peak) == (40, 0)
        del c
        b.add_(1)
        assert (live.now, live.logits, live.logits_at_peak) == (MIB, 0, 4000)


def test_the_peak_of_a_real_step_by_hand():
    """y = tanh(x) keeps y for its gradient, and sum's gradient is expanded, not made: x, y, then x's gradient."""
    x = torch.zeros(MIB // 4, requires_grad=True)
    live = LiveBytes(vocab_size=1)
    live.add([x])
    with live:
        torch.tanh(x).sum().backward()
    assert live.now == 2 * MIB
    assert live.peak == pytest.approx(3 * MIB, abs=100)
