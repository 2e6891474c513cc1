"""Roles from folders and back: which bases are shared, what is saved, and that it is read again as it was."""

import json
import shutil
from pathlib import Path

from kochat_trl.errors import UserError
from kochat_trl.models import loading
from kochat_trl.models.loading import load_adapter, load_policy, load_reward_model
from kochat_trl.ppo.roles import separate_models
from tests.ppo.role_helpers import (
    ROLES,
    SHAPES,
    TOKENIZER,
    Folders,
    apart,
    arguments,
    equal,
    folders_of,
    gpt2,
    read,
    read_all,
    read_model,
    stir,
    trained,
    value_models,
)

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification


@pytest.fixture(params=SHAPES)
def folders(request, tmp_path_factory) -> Folders:
    return folders_of(request.param, tmp_path_factory)


# Loading.


def test_adapters_of_one_base_share_a_backbone(folders):
    roles = folders.load()
    assert set(roles.models) == {"policy", "reward_head", "value_head"}
    assert len({id(getattr(roles, name).backbone) for name in ROLES}) == 1
    assert [getattr(roles, name).adapter for name in ROLES] == list(ROLES)
    assert not roles.value_reads_policy
    assert roles.config is roles.policy.backbone.config
    expected = read_all(folders.roles())
    for name, numbers in read_all(roles).items():
        torch.testing.assert_close(numbers, expected[name], rtol=0, atol=1e-5)  # GELU is fused here


SEPARATE = {
    "another base": (lambda folders: {"reward": folders.far_reward}),
    "not shared": (lambda folders: {"share": False}),
    "whole reward model": (lambda folders: {"reward": folders.whole_reward}),
    "whole SFT model": (lambda folders: {"sft": folders.base}),
    "whole models, trained whole": (
        lambda folders: {"sft": folders.base, "reward": folders.whole_reward, "use_peft": False}
    ),
}


@value_models
@pytest.mark.parametrize("case", SEPARATE.values(), ids=SEPARATE)
def test_other_models_stay_separate(folders, case, value_model):
    chosen = case(folders)
    roles = folders.load(**chosen, value_model=value_model)
    whole = chosen.get("use_peft") is False
    assert roles.reward.backbone is not roles.policy.backbone
    assert roles.value_reads_policy == (value_model == "shared")
    assert (roles.reference.backbone is roles.policy.backbone) == (not whole)
    assert len({id(p) for p in roles.parameters()}) == len(list(roles.parameters()))

    sft, reward = chosen.get("sft", folders.sft), chosen.get("reward", folders.reward)
    policy = read_model(load_policy(sft, arguments(), TOKENIZER))
    scored = read_model(load_reward_model(reward, arguments(), TOKENIZER))
    expected = {"policy": policy, "reference": policy, "reward": scored, "value": scored}
    if value_model == "shared":
        expected["value"] = (policy[0], torch.zeros(len(policy[0]), 1))
    for name, numbers in read_all(roles).items():
        torch.testing.assert_close(numbers, expected[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    groups = {name.split(".")[1] for name in trained(roles)}
    assert groups == {"policy", "value" if value_model == "adapter" else "value_head"}
    for group in groups - {"value_head"}:
        names = {n for n, _ in roles.named_parameters() if n.startswith(f"models.{group}.")}
        if not whole:
            names = {n for n in names if ("lora_" in n or "modules_to_save" in n) and ".reference." not in n}
        assert {n for n in trained(roles) if n.startswith(f"models.{group}.")} == names

    # Training moves policy and value, and leaves reference and reward as they are.
    before = read_all(roles)
    stir((p for p in roles.parameters() if p.requires_grad), 3)
    after = read_all(roles)
    for name in ROLES:
        assert equal(after[name], before[name]) == (name in ("reference", "reward"))
        assert equal(after[name], before[name]) or apart(after[name], before[name])


@gpt2
def test_the_same_base_by_another_path_is_shared(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders.base)
    reward = tmp_path / "reward"
    reward.mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (reward / file).write_bytes((Path(folders.reward) / file).read_bytes())
    config = json.loads((reward / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "link")
    (reward / "adapter_config.json").write_text(json.dumps(config))
    assert "reward" not in folders.load(reward=str(reward)).models
    config["revision"] = "v2"
    (reward / "adapter_config.json").write_text(json.dumps(config))
    assert "reward" in folders.load(reward=str(reward)).models


@gpt2
@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_r", 8), ("lora_alpha", 5), ("lora_target_modules", ["c_fc"]), ("use_rslora", True), ("use_dora", True)],
)
def test_lora_keys_beside_an_sft_adapter_are_refused(folders, key, value):
    with pytest.raises(UserError, match=f"^{key}: has no effect"):
        folders.load(**{key: value})


# Saving.


def kept(roles, folder):
    """Train a little, save, and return what was saved, read by the roles."""
    stir((p for p in roles.parameters() if p.requires_grad), 4)
    TOKENIZER.save_pretrained(folder)
    roles.save_pretrained(folder)
    return read(roles.policy), read(roles.value)


def assert_loads_the_same(folder, policy, value, **settings) -> None:
    found = read_model(load_policy(str(folder), arguments(**settings), TOKENIZER))
    torch.testing.assert_close(found, policy, rtol=0, atol=1e-6)
    if value is not None:
        found = read_model(load_reward_model(str(folder / "value"), arguments(**settings), TOKENIZER))
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6)


@value_models
@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True, "llm_int8_threshold": 0.0}], ids=["float32", "int8"])
def test_adapters_come_back_as_they_were(folders, value_model, settings, tmp_path):
    roles = folders.load(value_model=value_model, **settings)
    policy, value = kept(roles, tmp_path)
    assert apart(policy, read(roles.reference))
    assert_loads_the_same(tmp_path, policy, value, **settings)
    alone = load_adapter(folders.load(**settings).models["policy"].unload(), str(tmp_path))
    torch.testing.assert_close(read_model(alone), policy, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


@gpt2
@pytest.mark.parametrize("case", SEPARATE.values(), ids=SEPARATE)
def test_separate_models_come_back_as_they_were(folders, case, tmp_path):
    roles = folders.load(**case(folders))
    assert_loads_the_same(tmp_path, *kept(roles, tmp_path))


def test_a_new_adapter_is_saved_for_inference(folders, tmp_path):
    """As PEFT saves one: an adapter that is loaded is frozen unless asked."""
    kept(folders.load(sft=folders.base, reward=folders.whole_reward), tmp_path)
    for folder in (tmp_path, tmp_path / "value"):
        assert json.loads((folder / "adapter_config.json").read_text())["inference_mode"] is True


def test_the_saved_name_the_base_that_was_loaded(folders, tmp_path):
    """The folder of an SFT adapter was moved, with its base in it; what PPO writes finds that base."""
    moved = shutil.copytree(folders.sft, tmp_path / "moved")
    shutil.copytree(folders.base, moved / "base")
    path = moved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/base"}))
    kept(folders.load(sft=str(moved)), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved / "base")


@gpt2
def test_the_base_is_loaded_in_the_adapters_revision(folders, tmp_path, monkeypatch):
    sft = shutil.copytree(folders.sft, tmp_path / "sft")
    path = sft / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v2"}))
    asked = []
    inner = loading.load_config
    monkeypatch.setattr(loading, "load_config", lambda *args: asked.append(args[1]) or inner(*args))
    folders.load(sft=str(sft))
    assert asked[0] == "v2"


@gpt2
def test_a_head_saved_in_bfloat16_is_float32_here(folders, tmp_path):
    reward = shutil.copytree(folders.reward, tmp_path / "reward")
    weights = load_file(reward / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, reward / "adapter_model.safetensors")
    roles = folders.load(reward=str(reward))
    assert {roles.reward.head.weight.dtype, roles.value.head.weight.dtype} == {torch.float32}


@gpt2
def test_a_head_that_peft_trains_whole_is_the_policys_alone(folders):
    """The reference is the model with its adapter off, and its head as it was."""
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    model = get_peft_model(folders.backbone(), config)
    stir((p for p in model.parameters() if p.requires_grad), 3)
    reward = AutoModelForSequenceClassification.from_pretrained(folders.whole_reward)
    roles = separate_models(model, None, reward, None)
    assert equal(read(roles.reference), read_model(folders.backbone()))
    assert apart(read(roles.policy), read(roles.reference))


@gpt2
def test_the_policys_adapter_can_be_named(folders):
    model = PeftModel.from_pretrained(folders.backbone(), folders.sft, adapter_name="one", is_trainable=True)
    model.load_adapter(folders.sft, "two")
    reward = AutoModelForSequenceClassification.from_pretrained(folders.whole_reward)
    assert separate_models(model, None, reward, None).policy.adapter == "one"
    assert separate_models(model, None, reward, None, policy_adapter="two").policy.adapter == "two"


def test_the_saved_are_starting_points_again(folders, tmp_path):
    policy, value = kept(folders.load(), tmp_path)
    again = folders.load(sft=str(tmp_path), reward=str(tmp_path / "value"))
    assert "reward" not in again.models
    for name, expected in {"policy": policy, "reference": policy, "reward": value, "value": value}.items():
        torch.testing.assert_close(read(getattr(again, name)), expected, rtol=0, atol=1e-6)


def test_a_head_on_a_whole_policy_is_saved_alone(folders, tmp_path):
    chosen = {"sft": folders.base, "reward": folders.whole_reward, "use_peft": False, "value_model": "shared"}
    roles = folders.load(**chosen)
    policy, value = kept(roles, tmp_path)
    assert_loads_the_same(tmp_path, policy, None)
    weights = load_file(tmp_path / "value" / "head.safetensors")
    assert set(weights) == {"score.weight"}
    torch.testing.assert_close(policy[0] @ weights["score.weight"].T, value[1], rtol=0, atol=1e-6)
