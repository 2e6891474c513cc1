"""PPOTrainer on tiny random models: the same updates however it is set up, and what they learn."""

from kochat_trl.models.heads import has_score_head
from kochat_trl.models.loading import ADAPTER_HEAD
from kochat_trl.ppo import guards
from kochat_trl.ppo.roles import switch_dropout_off
from tests.ppo.helpers import (
    ADAPTER,
    EOS,
    LENGTH,
    PAD,
    ROWS,
    VALUE,
    adapters_apart,
    assert_same_change,
    assert_same_logs,
    change,
    classifier,
    logs,
    on_one_backbone,
    output_of,
    prompts,
    samples,
    saved_change,
    tokenizer,
    whole_models,
)

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, GPT2LMHeadModel


@pytest.mark.parametrize("value_model", ["adapter", "shared"])
def test_one_backbone_learns_as_separate_models_do(build, folders, value_model):
    apart = build(adapters_apart, output="apart", value_model=value_model)
    together = build(on_one_backbone, output="together", value_model=value_model)
    for trainer in (apart, together):
        trainer.train()
        assert any(not sample["ended"] for update in (1, 2, 3) for sample in samples(trainer, update))
        assert sum(log["val/num_eos_tokens"] for log in logs(trainer)) > 0
        assert logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert logs(trainer)[2]["objective/kl"] != pytest.approx(0, abs=1e-4)
    assert_same_logs(together, apart)
    moved, expected = saved_change(together, folders), saved_change(apart, folders)
    assert_same_change(moved, expected)
    for file in (ADAPTER, VALUE):
        assert max(float(w.abs().max()) for name, w in moved.items() if name.startswith(file)) > 1e-3


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_under_bf16_all_layers_are_fused_and_the_first_ratio_is_1(build, folders, base, monkeypatch):
    """PEFT's own forward never runs; the policy that samples, scores and steps is one, within rounding."""
    apart, moved = [], []
    check = guards.check_equal_at_start
    monkeypatch.setattr(Linear, "forward", lambda *args: pytest.fail("PEFT's own layer"))
    monkeypatch.setattr(
        guards,
        "check_equal_at_start",
        lambda what, difference, exact: apart.append((difference, exact)) or check(what, difference, exact),
    )
    models = on_one_backbone(folders)
    for parameter in models["model"].models.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(base)
    trainer = build(models, bf16=True, total_episodes=ROWS, num_ppo_epochs=1)
    for name, weight in change(trainer).items():
        moved.append(weight.abs().max() > 0)
        assert weight.dtype == torch.float32, name
    assert len(apart) == 2  # from the reference, and from the rollout
    assert all(difference < guards.ROUNDED and not exact for difference, exact in apart)
    assert all(moved)


def test_reference_and_reward_stay_as_they_are(build):
    trainer = build()
    frozen = {n: p.detach().clone() for n, p in trainer.roles.named_parameters() if not p.requires_grad}
    assert {"reference", "reward"} <= {part for name in frozen for part in name.split(".")}
    trainer.train()
    for name, parameter in trainer.roles.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("value_model", ["adapter", "shared"])
def test_micro_batches_make_no_difference(build, size, value_model):
    whole = build(whole_models, output="whole", value_model=value_model)
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS // size}
    parts = build(whole_models, output="parts", value_model=value_model, **settings)
    expected, moved = change(whole), change(parts)
    lengths = {log["objective/response_tokens"] for log in logs(whole)}
    assert lengths != {LENGTH}  # ragged
    assert parts.args.micro_batch_size == size
    assert_same_change(moved, expected, 1e-6)
    assert_same_logs(parts, whole, 1e-6)


@pytest.mark.parametrize("models", [on_one_backbone, adapters_apart, whole_models])
@pytest.mark.parametrize("value_model", ["adapter", "shared"])
def test_gradient_checkpointing_makes_no_difference(build, models, value_model):
    calls, moved, trainers = {}, {}, {}
    for on in (False, True):
        trainer = build(models, output=str(on), gradient_checkpointing=on, value_model=value_model, total_episodes=ROWS)
        calls[on] = {name: 0 for name in ("policy", "value")}
        for name in calls[on]:

            def count(*unused, role=name, on=on):
                calls[on][role] += torch.is_grad_enabled()

            getattr(trainer.roles, name).backbone.h[0].attn.register_forward_pre_hook(count)
        moved[on], trainers[on] = change(trainer), trainer
    assert_same_change(moved[True], moved[False], 1e-5)
    assert_same_logs(trainers[True], trainers[False])
    for name, count in calls[False].items():
        assert calls[True][name] > count > 0  # activations were computed again


@pytest.mark.parametrize("models", [on_one_backbone, adapters_apart, whole_models])
def test_shared_value_learns_with_the_policy(build, models):
    trainer = build(models, value_model="shared")
    moved = change(trainer)
    heads = [weight for name, weight in moved.items() if "value_head" in name]
    assert len(heads) == 1
    assert heads[0].abs().max() > 1e-3
    assert max(float(weight.abs().max()) for name, weight in moved.items() if "value_head" not in name) > 1e-3
    trainer.save_model()
    file = "value/head.safetensors" if models is whole_models else VALUE
    name = "score.weight" if models is whole_models else ADAPTER_HEAD
    torch.testing.assert_close(load_file(output_of(trainer) / file)[name].to(heads[0].dtype), heads[0])  # from 0


def test_value_learns_to_predict_the_return(build):
    trainer = build(total_episodes=20 * ROWS, learning_rate=0.05, vf_coef=1.0, cliprange_value=10.0)
    trainer.train()
    losses = [log["loss/value_avg"] for log in logs(trainer)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_policy_learns_what_is_rewarded(build):
    scores = {}
    for rate in (0.01, 0.5):
        trainer = build(output=str(rate), total_episodes=30 * ROWS, learning_rate=rate, kl_coef=0.0, lam=1.0)
        trainer.train()
        scores[rate] = np.mean([log["objective/scores"] for log in logs(trainer)[15:]])
    assert scores[0.5] > scores[0.01] + 0.1


def test_a_mini_batch_need_not_divide_into_micro_batches(build):
    one = {"total_episodes": ROWS, "num_ppo_epochs": 1, "num_mini_batches": 1}
    whole = change(build(**one))
    ragged = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 1}
    trainer = build(output="ragged", **one | ragged)
    trainer.args.micro_batch_size = 3  # 3 + 3 + 2 rows
    for name, weight in change(trainer).items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5)


def test_saved_policy_and_value_load_with_peft(build, folders):
    trainer = build()
    trainer.train()
    trainer.save_model()
    folder = output_of(trainer)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    policy = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folders.base), folder).eval()
    value = PeftModel.from_pretrained(classifier(folders), folder / "value").eval()
    assert has_score_head(str(folder / "value"))
    with torch.no_grad(), trainer.roles.policy.active():
        expected = trainer.roles.policy.head(trainer.roles.policy.hidden(ids, mask))
        torch.testing.assert_close(policy(input_ids=ids).logits, expected)
    with torch.no_grad(), trainer.roles.value.active():
        expected = trainer.roles.value.head(trainer.roles.value.hidden(ids, mask))[:, -1]
        torch.testing.assert_close(value(input_ids=ids, attention_mask=mask).logits, expected)


def test_a_collator_and_the_pad_token_make_no_difference(build):
    """Also where the pad token is the end of text: rows are counted by length, not by token."""
    plain = build(output="plain")
    expected = change(plain)
    for name, pad in {"pad": PAD, "eos": EOS}.items():
        reader = tokenizer(pad)
        collated = build(output=name, processing_class=reader, data_collator=DataCollatorWithPadding(reader))
        found = change(collated)
        assert logs(collated) == logs(plain)
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())
        assert sum(log["val/num_eos_tokens"] for log in logs(collated)) > 0


def test_a_prompt_may_hold_the_pad_token(build):
    """A collator pads on the left; what is under its mask goes, and nothing else."""
    data = Dataset.from_dict({"input_ids": [[PAD, 5, PAD, 7 + i % 3] if i % 2 else [9, PAD] for i in range(2 * ROWS)]})
    plain = build(output="plain", train_dataset=data)
    collated = build(output="collated", train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer()))
    expected, found = change(plain), change(collated)
    assert logs(collated) == logs(plain)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_dropout_is_off(build, folders):
    made = whole_models(folders)
    assert any(m.p > 0 for m in made["model"].modules() if isinstance(m, torch.nn.Dropout))
    trainer = build(made)
    assert {m.p for m in trainer.roles.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_each_pass_sees_each_prompt_once_in_a_new_order(build):
    trainer = build(total_episodes=4 * ROWS, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    passes = [[s["prompt"] for u in range(4 * i + 1, 4 * i + 5) for s in samples(trainer, u)] for i in (0, 1)]
    texts = tokenizer().batch_decode(list(prompts()["input_ids"]), skip_special_tokens=True)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(texts)
    assert passes[0] != passes[1]


def test_another_seed_is_another_run(build):
    runs = [build(output=str(i), seed=seed, total_episodes=ROWS) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        run.train()
    text = [(output_of(run) / "samples.jsonl").read_bytes() for run in runs]
    assert text[0] == text[1] != text[2]


@pytest.mark.parametrize("room", [0, 1])
def test_the_longest_that_fits(build, room):
    """The longest prompt has 5 tokens and the model 32 positions."""
    build(response_length=27 - room, total_episodes=ROWS, stop_token=None).train()


def test_rates_of_dropout_kept_as_numbers_are_switched_off():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.layerdrop, self.resid_pdrop, self.scale = 0.1, 0.2, 0.3, 0.5

    module = torch.nn.Sequential(Layer(), torch.nn.Dropout(0.4))
    switch_dropout_off(module)
    assert [module[0].attention_dropout, module[0].layerdrop, module[0].resid_pdrop, module[1].p] == [0.0] * 4
    assert module[0].scale == 0.5
