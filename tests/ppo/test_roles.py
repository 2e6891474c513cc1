"""Four adapters on one backbone: each role is what its adapter is alone, and none leaks into another."""

from pathlib import Path

from kochat_trl.errors import UserError
from kochat_trl.models.loading import load_adapter
from kochat_trl.ppo.roles import Role, adapter_parameters, one_backbone, separate_models
from tests.ppo.role_helpers import (
    IDS,
    MASK,
    ROLES,
    SHAPES,
    TARGETS,
    Folders,
    apart,
    belongs_to,
    equal,
    folders_of,
    gpt2,
    gradients,
    loadings,
    read,
    read_all,
    read_model,
    save_adapter,
    scores_of,
    state,
    stir,
    trained,
    value_models,
)

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@pytest.fixture(params=SHAPES)
def folders(request, tmp_path_factory) -> Folders:
    return folders_of(request.param, tmp_path_factory)


# Each role by itself.


@loadings
def test_each_role_is_its_adapter_alone(folders, loading):
    roles = folders.roles(loading=loading)
    policy = read_model(load_adapter(folders.backbone(loading=loading), folders.sft))
    classifier = load_adapter(folders.backbone(AutoModelForSequenceClassification, loading), folders.reward)
    found, reward = read_all(roles), read_model(classifier)
    for name, expected in {"policy": policy, "reference": policy, "reward": reward, "value": reward}.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    bare = read_model(folders.backbone(loading=loading))
    assert apart(policy, bare)
    assert apart(reward[:1], bare[:1])
    assert apart(reward[:1], policy[:1])
    last = found["reward"][1][MASK.sum(1).cumsum(0) - 1]
    torch.testing.assert_close(last, scores_of(classifier), rtol=0, atol=1e-6)


@pytest.mark.parametrize("special", ["use_dora", "use_rslora"])
def test_adapters_of_other_kinds(folders, special, tmp_path):
    sft = save_adapter(
        folders.base, tmp_path, AutoModelForCausalLM, TARGETS[folders.kind]["sft"], 4, 1, **{special: True}
    )
    roles = one_backbone(folders.backbone(), sft, folders.reward)
    expected = read_model(load_adapter(folders.backbone(), sft))
    torch.testing.assert_close(read(roles.policy), expected, rtol=0, atol=1e-5)
    assert apart(expected, read_model(load_adapter(folders.backbone(), folders.sft)))
    found = {id(parameter) for parameter in adapter_parameters(roles, "policy")}
    assert found == {id(parameter) for name, parameter in roles.named_parameters() if belongs_to(name, "policy")}


def test_a_role_without_adapter_is_the_bare_model(folders):
    roles = folders.roles()
    bare = Role(roles.models["policy"], roles.policy.head, None)
    assert equal(read(bare), read_model(folders.backbone()))


def test_adapters_on_a_bfloat16_backbone_are_float32(folders):
    backbone = AutoModelForCausalLM.from_pretrained(folders.base, dtype="bfloat16")
    roles = one_backbone(backbone, folders.sft, folders.reward)
    dtypes = {p.dtype for name, p in roles.named_parameters() if "lora_" in name or "head" in name.split(".")[1]}
    assert dtypes == {torch.float32}
    assert roles.policy.head.linear.weight.dtype == torch.bfloat16
    hidden, values = read(roles.value)
    assert (hidden.dtype, values.dtype) == (torch.bfloat16, torch.float32)
    exact = read(folders.roles().value)
    torch.testing.assert_close(values, exact[1], rtol=0.1, atol=0.1)


# Switching.


def test_active_switches_the_adapter_and_nothing_else(folders):
    roles = folders.roles()
    before = state(roles)
    with roles.reward.active():
        assert state(roles) == (["['reward']"] * len(before[0]), before[1])
        with roles.policy.active():
            assert state(roles) == (["['policy']"] * len(before[0]), before[1])
            with roles.policy.active():
                pass
            assert state(roles) == (["['policy']"] * len(before[0]), before[1])
        assert state(roles) == (["['reward']"] * len(before[0]), before[1])
    assert state(roles) == before


def test_an_error_inside_leaves_all_as_it_was(folders):
    roles = folders.roles()
    before, expected = state(roles), read_all(roles)

    def fail():
        with roles.reward.active(), roles.policy.active():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state(roles) == before
    for name, numbers in read_all(roles).items():
        assert equal(numbers, expected[name])


def test_what_is_read_does_not_depend_on_the_role_before(folders):
    roles = folders.roles()
    expected = read_all(roles)
    for outer in ROLES:
        for name in ROLES:
            with getattr(roles, outer).active():
                assert equal(read(getattr(roles, name)), expected[name])


# What is trained.


@loadings
@value_models
def test_policy_and_value_are_trained_and_nothing_else(folders, value_model, loading):
    roles = folders.roles(value_model, loading)
    names = {name for name, _ in roles.named_parameters()}
    assert trained(roles) == {n for n in names if belongs_to(n, "policy") or belongs_to(n, "value")}
    assert "models.value_head.weight" in trained(roles)
    assert any(".lora_A.policy." in name for name in trained(roles))
    assert any(".value." in name for name in names) == (value_model == "adapter")


@pytest.mark.parametrize("poisoned", ROLES)
def test_an_adapter_changes_its_own_role_alone(folders, poisoned):
    roles = folders.roles()
    before = read_all(roles)
    for parameter in adapter_parameters(roles, poisoned):
        parameter.data.fill_(float("nan"))
    for name, numbers in read_all(roles).items():
        if name == poisoned:
            assert all(x.isnan().all() for x in numbers)
        else:
            assert equal(numbers, before[name])


@pytest.mark.parametrize(("changed", "still"), [("value", "reward"), ("reward", "value")])
def test_the_heads_of_value_and_reward_are_two(folders, changed, still):
    roles = folders.roles()
    before = read_all(roles)
    getattr(roles, changed).head.weight.data.fill_(float("nan"))
    after = read_all(roles)
    assert after[changed][1].isnan().all()
    assert equal(after[still], before[still])


def backward(role: Role) -> None:
    with role.active():
        hidden = role.hidden(IDS, MASK)
        (role.head(hidden)[MASK.bool()].log_softmax(0) ** 2).sum().backward()


@pytest.mark.parametrize("name", ["policy", "value"])
def test_gradients_go_to_the_role_s_own_adapter(folders, name):
    roles = folders.roles()
    backward(getattr(roles, name))
    assert set(gradients(roles)) == {n for n in trained(roles) if belongs_to(n, name)}


def test_gradients_of_a_shared_value_go_to_the_policy_s_adapter(folders):
    roles = folders.roles("shared")
    stir(roles.value.head.parameters(), 0)
    backward(roles.value)
    assert set(gradients(roles)) == trained(roles)


@loadings
def test_gradient_checkpointing_changes_no_gradient(folders, loading):
    """The forward pass that checkpointing repeats must be under the adapter of the first."""
    found, passes = [], []
    for checkpointing in (False, True):
        roles = folders.roles(loading=loading).train()
        if checkpointing:
            roles.policy.backbone.gradient_checkpointing_enable({"use_reentrant": False})
            roles.policy.backbone.enable_input_require_grads()
        blocks = roles.policy.backbone.h if folders.kind == "gpt2" else roles.policy.backbone.layers
        count = []
        blocks[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        with roles.reference.active():  # whatever was on before
            backward(roles.policy)
            backward(roles.value)
        found.append(gradients(roles))
        passes.append(len(count))
    assert passes == [2, 4]
    assert set(found[0]) == trained(roles)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@gpt2
def test_a_reward_model_is_frozen(folders):
    reward = AutoModelForSequenceClassification.from_pretrained(folders.whole_reward)
    separate_models(folders.backbone(), None, reward, None)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@loadings
def test_a_shared_value_is_zero_on_the_policy(folders, loading):
    roles = folders.roles("shared", loading)
    assert roles.value_reads_policy
    assert roles.value.backbone is roles.policy.backbone
    hidden, values = read(roles.value)
    assert torch.equal(hidden, read(roles.policy)[0])
    assert values.shape == (int(MASK.sum()), 1)
    assert not values.any()
    assert roles.value.head.weight.requires_grad


# Errors.


@gpt2
def test_a_reward_adapter_needs_a_head(folders):
    with pytest.raises(UserError, match="no score head"):
        one_backbone(folders.backbone(), folders.sft, folders.sft)


@gpt2
@pytest.mark.parametrize("broken", ["sft", "reward"])
@pytest.mark.parametrize("how", ["missing", "unknown"])
def test_weights_that_do_not_fit_are_refused(folders, broken, how, tmp_path):
    source = Path(getattr(folders, broken))
    weights = load_file(source / "adapter_model.safetensors")
    name = sorted(key for key in weights if "lora_A" in key)[0]
    tensor = weights.pop(name)
    if how == "unknown":
        weights |= {name: tensor, name.replace("lora_A", "lora_C"): tensor.clone()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    paths = {"sft_adapter": folders.sft, "reward_adapter": folders.reward} | {f"{broken}_adapter": str(tmp_path)}
    with pytest.raises(UserError, match=r"weights don't fit the base model, beginning with .*lora_"):
        one_backbone(folders.backbone(), **paths)


@gpt2
def test_an_adapter_of_another_kind_is_refused(folders, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "task_type": "CAUSAL_LM"}')
    with pytest.raises(UserError, match="only LoRA adapters"):
        one_backbone(folders.backbone(), str(tmp_path), folders.reward)


@gpt2
def test_a_model_without_its_head_is_refused(folders):
    with pytest.raises(UserError, match="no `score` head"):
        separate_models(folders.backbone(), None, folders.backbone(), None)
