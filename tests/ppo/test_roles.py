"""Four adapters on one backbone: each role is what its adapter is alone, and none leaks into another."""

import json
import shutil
from pathlib import Path

from kochat_trl.errors import UserError
from kochat_trl.models.loading import add_lora, load_adapter, load_policy, load_reward_model
from kochat_trl.ppo import roles as adapters
from kochat_trl.ppo.roles import Role, adapter_parameters, load_roles, one_backbone, separate_models
from kochat_trl.settings.keys import ModelArguments

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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


@pytest.fixture(params=SHAPES)
def folders(request, tmp_path_factory) -> Folders:
    if request.param not in FOLDERS:
        FOLDERS[request.param] = Folders(tmp_path_factory.mktemp(request.param), request.param)
    return FOLDERS[request.param]


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
    assert roles.policy.head.weight.dtype == torch.bfloat16
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


def belongs_to(name: str, adapter: str) -> bool:
    return name.endswith((f".{adapter}.weight", f".{adapter}")) or name == f"models.{adapter}_head.weight"


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
    [("lora_r", 8), ("lora_alpha", 8), ("lora_target_modules", ["c_fc"]), ("use_rslora", True), ("use_dora", True)],
)
def test_lora_keys_beside_an_sft_adapter_are_refused(folders, key, value):
    with pytest.raises(UserError, match=f"^{key}: has no effect"):
        folders.load(**{key: value})


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
    inner = adapters.load_causal_lm
    monkeypatch.setattr(adapters, "load_causal_lm", lambda *args: asked.append(args[1].model_revision) or inner(*args))
    folders.load(sft=str(sft))
    assert asked == ["v2"]


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
