"""Other bases through all stages: every architecture, one score for a text wherever it is read, where a run starts."""

import json
import shutil
import sys

from benchmarks.architectures import ARCHITECTURES, LOADINGS, make_base, run_recipe, run_stages, write_set
from kochat_trl.data.records import conversation
from kochat_trl.desk.workflow.memory import plan_memory
from kochat_trl.errors import UserError
from kochat_trl.models import remote
from kochat_trl.models.heads import SCORE
from kochat_trl.models.loading import load_policy, load_reward_model
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.ppo.roles import load_roles
from kochat_trl.ppo.rollout import Rollout
from kochat_trl.ppo.step import forward_reward
from kochat_trl.reward.score import load_scorer, score_dialogues
from kochat_trl.reward.trainer import RankingCollator
from kochat_trl.rows.encode import encode_dialogue, encode_prompt
from kochat_trl.rows.rows import build_dataset
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import adapted_modules

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FAST = {"gpt2", "gemma2", "hyperclovax", "cohere2"}  # the others are slow only in number
FLOAT32 = ModelArguments(dtype="float32")


@pytest.mark.parametrize("loading", LOADINGS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ARCHITECTURES])
def test_every_architecture_goes_through_all_stages(name, loading, tmp_path):
    found = run_stages(name, tmp_path, **LOADINGS[loading])
    first, second = found["history"]
    assert (first["val/ratio"], first["objective/kl"]) == (1, 0)
    assert second["objective/kl"] != 0
    assert max(found["ppo"], found["reward"]) < 1e-4
    for stage in ("sft", "reward", "ppo"):
        weights = load_file(tmp_path / f"out/{stage}/adapter_model.safetensors")
        moved = [name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 0]
        assert moved


GATED = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
NEOX = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
# Two of four heads have keys and values of their own: (inputs, outputs) of a block's matrices.
MATRICES = {"gpt_neox": [(64, 192), (64, 64), (64, 128), (128, 64)]}
MATRICES |= dict.fromkeys(("qwen2", "llama"), [(64, 64)] * 2 + [(64, 32)] * 2 + [(64, 128)] * 3)
QUANTIZED = {"int8": {"load_in_8bit": True, "llm_int8_threshold": 0}, "nf4": {"load_in_4bit": True}}


@pytest.mark.slow
@pytest.mark.parametrize("loading", QUANTIZED)
@pytest.mark.parametrize("name", MATRICES)
def test_all_linear_layers_are_adapted_and_quantized_and_no_more(name, loading, tmp_path):
    run_stages(name, tmp_path, **QUANTIZED[loading])
    targets = NEOX if name == "gpt_neox" else GATED
    for stage in ("sft", "ppo"):
        path = str(tmp_path / "out" / stage)
        model = load_policy(path, FLOAT32, load_tokenizer(path))
        assert {".".join(module.split(".")[-2:]) for module in adapted_modules(model)} == targets
        moved = [p for n, p in model.named_parameters() if "lora_B" in n and p.abs().max() > 0]
        assert len(moved) == 2 * len(targets)  # every one of both layers
    matrices = 2 * sum(a * b for a, b in MATRICES[name])
    stored, size = {"int8": ("int8", matrices), "nf4": ("uint8", matrices // 2)}[loading]
    for footprint in plan_memory(tmp_path / "set"):  # the heads stay as they are
        assert footprint.parts[f"frozen weights, {stored}"] == size


# One score for one text.

TEXT = ("수도는?", "서울입니다.")


def five_scores(folder, messages):
    """The score of an exchange from all places where one is read, by the outputs of a run in `folder`."""
    out, tokenizer = folder / "out", load_tokenizer(str(folder / "out/reward"))
    reward = load_reward_model(str(out / "reward"), FLOAT32, tokenizer).eval()
    rows, _ = build_dataset([str(folder / "reward.jsonl")], "reward", tokenizer)
    batch = RankingCollator(tokenizer.pad_token_id)(list(rows))
    ids = encode_dialogue(tokenizer, messages)[0]
    row = batch["input_ids"].tolist().index(ids + [tokenizer.pad_token_id] * (batch["input_ids"].shape[1] - len(ids)))
    found = {"training": reward(batch["input_ids"], batch["attention_mask"]).logits[row].item()}
    found["evaluation"] = score_dialogues(
        load_scorer(str(out / "reward"), "float32", tokenizer), tokenizer, [messages]
    )[0]

    roles = load_roles(str(out / "sft"), str(out / "reward"), FLOAT32, tokenizer).eval()
    prompt = encode_prompt(tokenizer, messages[:-1])
    answers = [ids[len(prompt) :], ids[len(prompt) : -3]]  # another one beside it, so that there is padding
    rollout = Rollout.of([prompt] * 2, answers, 64, [ids[-1]], False, "cpu")
    assert rollout.ended.tolist() == [True, False]
    found["PPO"] = forward_reward(roles.reward, rollout.micro_batch([0, 1]))[0].item()

    merge_adapter(str(out / "reward"), folder / "merged")
    merged = load_scorer(str(folder / "merged"), "float32", load_tokenizer(str(folder / "merged")))
    found["merged"] = score_dialogues(merged, tokenizer, [messages])[0]

    # As the card says it: plain transformers, right-padded in a batch with a longer text.
    card = (folder / "merged/README.md").read_text(encoding="utf-8").split("```")[1].strip().splitlines()
    assert card[0] == f'AutoModelForSequenceClassification.from_pretrained("{folder / "merged"}")'
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    reader = AutoTokenizer.from_pretrained(folder / "merged", padding_side="right")
    known = {"tokenizer": reader, "messages": list(messages)}
    exec("\n".join(line for line in card if line.startswith("text = ")), known)
    texts = [known["text"], known["text"].replace(TEXT[1], TEXT[1] * 3)]
    pads = reader(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    assert pads["attention_mask"][0].tolist().count(0) > 0
    found["plain transformers"] = plain(**pads).logits[0].item()
    return found


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@torch.no_grad()
def test_a_text_has_one_score_wherever_it_is_read(eos, tmp_path):
    """On a base with ChatML that pads with its end of sequence: which ends an answer, or is another token."""
    make_base("llama", tmp_path / "base", eos)
    configs = write_set(tmp_path, tmp_path / "base")
    with torch.enable_grad():
        for stage in ("sft", "reward", "ppo"):
            run_recipe(stage, "--config", configs)
    tokenizer = load_tokenizer(str(tmp_path / "out/reward"))
    assert tokenizer.pad_token == tokenizer.eos_token == eos
    scores = five_scores(tmp_path, conversation(*TEXT))
    assert max(scores.values()) - min(scores.values()) < 1e-5, scores
    longer = five_scores_of_other_places(tmp_path, tokenizer)
    assert min(abs(score - scores["PPO"]) for score in longer) > 1e-3  # so another place would show


def five_scores_of_other_places(folder, tokenizer):
    """The scores one token before the end, and one after it."""
    model = load_reward_model(str(folder / "out/reward"), FLOAT32, tokenizer).eval()
    ids = encode_dialogue(tokenizer, conversation(*TEXT))[0]
    after = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return [model(torch.tensor([other])).logits.item() for other in (ids[:-1], ids + after)]


# Where a run starts.


@pytest.fixture(scope="module")
def first_round(made_once):
    """A finished SFT on a tiny base, and the set that made it."""

    def fill(folder):
        make_base("llama", folder / "base")
        run_recipe("sft", "--config", write_set(folder, folder / "base"))

    return made_once("first-round", fill)


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_sft_goes_on_with_an_adapter(first_round, tmp_path):
    start = first_round / "out/sft"
    run_recipe(
        "sft", "--config", first_round / "set", "--model_name_or_path", start, "--output_dir", tmp_path / "sft",
        "--lora_r", 4, "--learning_rate", 0,
    )  # fmt: skip
    before, after = weights_of(start), weights_of(tmp_path / "sft")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "sft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first_round / "base")
    run_recipe("sft", "--config", first_round / "set", "--model_name_or_path", start, "--output_dir", tmp_path / "more")
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(tmp_path / "more").items())


def test_a_reward_model_starts_from_sft_and_ppo_has_one_backbone(first_round, tmp_path):
    start = str(first_round / "out/sft")
    flags = ("--model_name_or_path", start, "--output_dir", tmp_path / "reward")
    run_recipe("reward", "--config", first_round / "set", *flags, "--learning_rate", 0)
    before, after = weights_of(first_round / "out/sft"), weights_of(tmp_path / "reward")
    assert {name: None for name in after if SCORE not in name.split(".")}.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["base_model.model.score.weight"].abs().max() > 0
    tokenizer = load_tokenizer(start)
    roles = load_roles(start, str(tmp_path / "reward"), FLOAT32, tokenizer).eval()
    assert roles.policy.backbone is roles.reward.backbone is roles.value.backbone
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad(), roles.policy.active():
        policy = roles.policy.hidden(ids, torch.ones_like(ids))
    with torch.no_grad(), roles.reward.active():
        torch.testing.assert_close(roles.reward.hidden(ids, torch.ones_like(ids)), policy)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("sft", ["--lora_r", 8], "lora_r: has no effect: the run goes on with the adapter in .*, which has 4"),
        ("sft", ["--use_peft", "false"], "is an adapter; set `use_peft: true`, or merge it first"),
        ("reward", ["--lora_alpha", 5], "lora_alpha: has no effect"),
    ],
)
def test_what_an_adapter_has_settled_is_refused(stage, flags, message, first_round, tmp_path):
    start = ("--model_name_or_path", first_round / "out/sft", "--output_dir", tmp_path / "out")
    settled = () if "--lora_r" in flags or stage == "reward" else ("--lora_r", 4)
    with pytest.raises(UserError, match=message):
        run_recipe(stage, "--config", first_round / "set", *start, *settled, *flags)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_no_start_for_sft(tiny_reward, first_round, tmp_path):
    flags = ("--model_name_or_path", tiny_reward, "--output_dir", tmp_path / "out", "--lora_r", 4)
    with pytest.raises(UserError, match="is a reward model; start from a base, or from SFT's output"):
        run_recipe("sft", "--config", first_round / "set", *flags)


def test_an_adapter_of_other_layers_is_refused(first_round, tmp_path):
    start = shutil.copytree(first_round / "out/sft", tmp_path / "start")
    weights = weights_of(start)
    dropped = min(weights)
    save_file(
        {name: weight for name, weight in weights.items() if name != dropped}, start / "adapter_model.safetensors"
    )
    flags = ("--model_name_or_path", start, "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match=f"its weights don't fit the base model, beginning with {dropped}"):
        run_recipe("reward", "--config", first_round / "set", *flags)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_an_error_about_a_model_comes_before_any_data_is_read(stage, first_round, tmp_path, monkeypatch):
    def read(*args):
        raise AssertionError("data was read")

    monkeypatch.setattr(f"recipes.{stage}.build_datasets", read)
    broken = shutil.copytree(first_round / "base", tmp_path / "base")
    (broken / "config.json").write_text('{"model_type": "t5"}')
    flags = ("--model_name_or_path", broken)
    if stage == "ppo":
        flags = ("--sft_model_path", first_round / "out/sft", "--reward_model_path", broken)
    with pytest.raises(UserError, match="no causal language model of type 't5'"):
        run_recipe(stage, "--config", first_round / "set", *flags, "--output_dir", tmp_path / "out")


# Code that comes with a base.

REMOTE_CONFIG = """
from transformers import LlamaConfig

class OurConfig(LlamaConfig):
    model_type = "ours_of_{0}"
"""
REMOTE = """
from transformers import LlamaForCausalLM

from .configuration_ours import OurConfig

class OurForCausalLM(LlamaForCausalLM):
    config_class = OurConfig
    ran_code_of = "{0}"
"""


@pytest.fixture
def remote_base(tmp_path, monkeypatch):
    """A base of an architecture that its own folder defines."""
    monkeypatch.setattr(remote, "_allowed", False)
    make_base("llama", tmp_path / "base")
    (tmp_path / "base/modeling_ours.py").write_text(REMOTE.format(tmp_path.name))
    (tmp_path / "base/configuration_ours.py").write_text(REMOTE_CONFIG.format(tmp_path.name))
    path = tmp_path / "base/config.json"
    names = {"AutoConfig": "configuration_ours.OurConfig", "AutoModelForCausalLM": "modeling_ours.OurForCausalLM"}
    config = {"model_type": f"ours_of_{tmp_path.name}", "auto_map": names, "architectures": ["OurForCausalLM"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path / "base"


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_code_of_a_base_is_not_run_unless_a_config_says_so(stage, remote_base, tmp_path):
    configs = write_set(tmp_path, remote_base)
    with pytest.raises(UserError, match=r"brings code of its own.*`trust_remote_code: true` in the config"):
        run_recipe(stage, "--config", configs)
    assert not [name for name in sys.modules if name.endswith("modeling_ours") and tmp_path.name in name]


def test_code_that_is_trusted_is_logged_and_named_in_the_card(remote_base, tmp_path, caplog):
    configs = write_set(tmp_path, remote_base, trust_remote_code=True)
    for stage in ("sft", "reward", "ppo"):
        run_recipe(stage, "--config", configs)
        assert "trust_remote_code: true: code that comes with a model is run" in caplog.text
        caplog.clear()
        card = (tmp_path / "out" / stage / "README.md").read_text(encoding="utf-8")
        assert f"- code that comes with `{remote_base}`, which was trusted" in card
        assert yaml.safe_load((tmp_path / "out" / stage / "resolved.yaml").read_text())["trust_remote_code"] is True
    path = str(tmp_path / "out/ppo")
    model = load_policy(path, FLOAT32, load_tokenizer(path))
    assert model.get_base_model().ran_code_of == tmp_path.name
    for kind in ("ppo", "reward"):
        assert merge_adapter(str(tmp_path / "out" / kind), tmp_path / f"merged-{kind}") < 1e-4


# What one line of YAML changes.


@pytest.fixture(scope="module")
def stages_done(made_once):
    """A set whose SFT and reward model are there."""

    def fill(folder):
        make_base("gpt2", folder / "base")
        for stage in ("sft", "reward"):
            run_recipe(stage, "--config", folder / "set" if stage == "reward" else write_set(folder, folder / "base"))

    return made_once("stages-done", fill)


# The stage, the line, and what it does to the first loss (from `before` to `loss`) or to what else is there.
CHANGES = {
    "base": ("sft", "model_name_or_path: {other}", lambda run: run["base"].endswith("other")),
    "precision": ("sft", "load_in_8bit: true", lambda run: 0 < abs(run["loss"] - run["before"]) < 0.1),
    "loss": ("reward", "loss: listwise", lambda run: run["loss"] == pytest.approx(run["before"], abs=1e-6)),  # of pairs
    "margins": ("reward", "rank_margins: true", lambda run: run["loss"] > run["before"] + 0.3),
    "kl": ("ppo", "kl_estimator: k3", lambda run: run["history"][1]["objective/kl"] > 0),
    "engine": ("ppo", "engine: trl", lambda run: "objective/kl_coef" not in run["history"][0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_one_line_changes(name, stages_done, tmp_path):
    """The stage runs with the line and without it, and the change shows in what it leaves behind."""
    stage, line, shows = CHANGES[name]
    make_base("llama", tmp_path / "other")
    experiment = tmp_path / f"{name}.yaml"
    experiment.write_text(f"extends: {stages_done / 'set'}\n{line.format(other=tmp_path / 'other')}\n")
    found = {}
    for key, config in {"before": stages_done / "set", "loss": experiment}.items():
        run_recipe(stage, "--config", config, "--output_dir", tmp_path / key)
        found["history"] = json.loads((tmp_path / key / "metrics.json").read_text())["history"]
        found[key] = found["history"][0].get("loss")
    found["base"] = json.loads((tmp_path / "loss/adapter_config.json").read_text())["base_model_name_or_path"]
    assert shows(found), found
