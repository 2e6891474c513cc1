"""TRL's interface: its scripts, callbacks, metrics, fields and defaults."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kochat_trl.ppo import PPOConfig, PPOTrainer
from kochat_trl.ppo import trainer as trainer_module
from tests.ppo.helpers import (
    EOS,
    LENGTH,
    LORA,
    PAD,
    ROWS,
    VOCAB,
    adapters_apart,
    classifier,
    logs,
    on_one_backbone,
    output_of,
    prompts,
    samples,
    trained,
    whole_models,
)
from tests.tiny import gpt2_config, word_tokenizer

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, TrainerCallback


class Events(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self, stop_at: int | None = None):
        self.events: list[str] = []
        self.logged: list[dict[str, float]] = []
        self.stop_at = stop_at

    def on_train_begin(self, args, state, control, **kwargs):
        assert kwargs["optimizer"] is not None
        assert kwargs["lr_scheduler"] is not None
        self.events.append(f"begin {state.global_step}/{state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(f"log {state.global_step}")
        self.logged.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step} epoch {state.epoch:g}")
        control.should_training_stop = state.global_step == self.stop_at

    def on_save(self, args, state, control, **kwargs):
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}/ppo.json").is_file()
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(f"end {state.global_step}")


def test_callbacks(build):
    events = Events()
    build(callbacks=[events], save_strategy="steps", save_steps=2).train()
    one, two, three = (["log 1", "step 1 epoch 0.5"], ["log 2", "step 2 epoch 1"], ["log 3", "step 3 epoch 1.5"])
    assert events.events == ["begin 0/3", *one, *two, "save 2", *three, "save 3", "end 3"]


def test_a_callback_stops_the_run(build):
    events = Events(stop_at=2)
    trainer = build(callbacks=[events], total_episodes=10 * ROWS)
    trainer.train()
    assert trainer.state.global_step == 2
    assert events.events[-1] == "end 2"
    assert not list(output_of(trainer).glob("checkpoint-*"))


def test_trls_metrics(build):
    stock = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 and later have no PPOTrainer")
    names = set(re.findall(r'metrics\["([^"]+)"\]', inspect.getsource(stock.PPOTrainer.train)))
    assert len(names) > 15
    events = Events()
    build(callbacks=[events]).train()
    assert all(names <= set(logged) for logged in events.logged)
    assert [logged["episode"] for logged in events.logged] == [8, 16, 24]
    assert all(logged["eps"] > 0 for logged in events.logged)
    first = events.logged[0]
    assert first["val/ratio"] == pytest.approx(1, abs=0.05)
    assert first["policy/entropy_avg"] > 0
    assert first["policy/approxkl_avg"] >= 0
    assert first["objective/response_tokens"] < LENGTH


def test_trls_fields_and_defaults():
    stock = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 and later have no PPOConfig")
    worked_out = {"world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size"}
    worked_out |= {"local_mini_batch_size", "mini_batch_size"}
    theirs = {field.name: field for field in dataclasses.fields(stock.PPOConfig)}
    ours = {field.name: field for field in dataclasses.fields(PPOConfig)}
    assert theirs.keys() - worked_out <= ours.keys()
    for name in theirs.keys() - worked_out:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].init, name
    one, other = PPOConfig(output_dir="x", use_cpu=True), stock.PPOConfig(output_dir="x", use_cpu=True)
    for name in theirs.keys() - worked_out - {"accelerator_config", "deepspeed_plugin", "distributed_state"}:
        assert getattr(one, name) == getattr(other, name), name
    assert not PPOConfig(output_dir="x", use_cpu=True, fp16=True).bf16


SCRIPT = """
from trl.experimental.ppo import PPOConfig, PPOTrainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
policy = AutoModelForCausalLM.from_pretrained(base)
ref_policy = AutoModelForCausalLM.from_pretrained(base) if peft_config is None else None
reward_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
value_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
config = PPOConfig(
    output_dir=output,
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_mini_batches=2,
    num_ppo_epochs=2,
    total_episodes=16,
    response_length=6,
    stop_token="eos",
    missing_eos_penalty=1.0,
    local_rollout_forward_batch_size=4,
    per_device_eval_batch_size=4,
    num_sample_generations=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    bf16=False,
)
trainer = PPOTrainer(
    args=config,
    processing_class=tokenizer,
    model=policy,
    ref_model=ref_policy,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model(output)
trainer.generate_completions()
"""
IMPORTS = {
    "trl": "from trl.experimental.ppo import PPOConfig, PPOTrainer",
    "kochat": "from kochat_trl.ppo import PPOConfig, PPOTrainer",
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("engine", IMPORTS)
def test_a_script_for_trl_runs_with_the_import_changed(folders, tmp_path, monkeypatch, capsys, engine, lora):
    if engine == "trl":
        pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 and later have no PPOTrainer")
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    assert IMPORTS["trl"] in SCRIPT
    monkeypatch.setenv("COLUMNS", "120")
    names: dict[str, Any] = {"base": str(folders.base), "output": str(tmp_path / "out"), "dataset": prompts()}
    names["peft_config"] = LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None
    exec(SCRIPT.replace(IMPORTS["trl"], IMPORTS[engine]), names)
    assert names["trainer"].state.global_step > 0
    printed = capsys.readouterr().out
    assert "score" in printed
    assert (tmp_path / "out/adapter_config.json").exists() == lora

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = policy(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(folders.base)(input_ids=ids).logits
        live = names["policy"].eval()(input_ids=ids).logits
    assert not torch.allclose(logits, start, atol=1e-3)
    torch.testing.assert_close(logits, live, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_generate_completions(build, folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = prompts(6)
    settings = {"num_sample_generations": 2, "per_device_eval_batch_size": 2, "total_episodes": 4 * ROWS}
    trainer = build(eval_dataset=data, **settings)
    trainer.train()
    assert capsys.readouterr().out.count("prompt ") == 2  # a table after every second update

    temperatures = []

    def answer(policy, prompts, seeds, length, temperature, *unused):
        temperatures.append(temperature)
        return [[7 + row] * (row + 1) for row, _ in enumerate(prompts)]

    monkeypatch.setattr(trainer_module, "sample_responses", answer)
    before = trained(trainer)
    trainer.generate_completions()
    rows = re.findall(r"│ (w[w\d ]*?) *│ (w[w\d ]*?) *│ (-?\d+\.\d\d) *│", capsys.readouterr().out)
    reward = adapters_apart(folders)["reward_model"].eval()
    assert len(rows) == 5
    assert set(temperatures) == {0}
    for i, (prompt, response, score) in enumerate(rows):
        ids = data[i]["input_ids"]
        assert prompt == " ".join(f"w{token}" for token in ids)
        assert response == " ".join([f"w{7 + i}"] * (i + 1))
        joined = torch.tensor([ids + [7 + i] * (i + 1)])
        with torch.no_grad():
            expected = reward(input_ids=joined, attention_mask=torch.ones_like(joined)).logits.item()
        assert float(score) == pytest.approx(expected, abs=0.0051)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(trainer).items())
    build(output="no table").generate_completions()
    assert capsys.readouterr().out == ""


def test_answers_that_look_like_markup_are_printed(build, monkeypatch, capsys):
    trainer = build(eval_dataset=prompts())
    monkeypatch.setattr(trainer.processing_class, "decode", lambda *_, **__: "[/INST]")
    trainer.generate_completions(sampling=True)
    assert "[/INST]" in capsys.readouterr().out


# TRL's own cases: what its tests ask of its trainer, asked of ours


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    return {name for name, weight in before.items() if not torch.equal(after[name], weight)}


def loaded(folders: SimpleNamespace) -> dict[str, Any]:
    """Four models as scripts for TRL load them."""
    policy, reference = (GPT2LMHeadModel.from_pretrained(folders.base) for _ in range(2))
    return {"model": policy, "ref_model": reference, "reward_model": classifier(folders)} | {
        "value_model": classifier(folders)
    }


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., PPOTrainer]:
    """A trainer as in a script for TRL: few settings, and all others at their defaults."""

    def make_trainer(models: dict[str, Any], reader: Any = None, data: Dataset | None = None, **settings: Any) -> Any:
        values = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"} | settings
        peft_config = values.pop("peft_config", None)
        return PPOTrainer(
            args=PPOConfig(**values),
            processing_class=reader or word_tokenizer(VOCAB, EOS, PAD),
            train_dataset=data or prompts(ROWS),
            eval_dataset=prompts(2),
            peft_config=peft_config,
            **models,
        )

    return make_trainer


SHORT = {"per_device_train_batch_size": 4, "num_ppo_epochs": 2, "response_length": LENGTH, "learning_rate": 1e-2}


def test_basic_training_moves_policy_and_value(script, folders):
    models = loaded(folders)
    trainer = script(models, **SHORT)
    policy, value, reward = (
        weights(m) for m in (trainer.model.policy, trainer.model.value_model, trainer.reward_model)
    )
    trainer.train()
    assert moved(trainer.model.policy, policy) >= {"transformer.wte.weight", "transformer.h.1.mlp.c_proj.weight"}
    assert "score.weight" in moved(trainer.model.value_model, value)
    assert not moved(trainer.reward_model, reward)
    assert not moved(trainer.ref_model, policy)


def test_lora_is_trained_and_what_it_is_on_is_not(script, folders):
    trainer = script(loaded(folders) | {"ref_model": None}, peft_config=LoraConfig(), **SHORT)
    policy, value = weights(trainer.model.policy), weights(trainer.model.value_model)
    trainer.train()
    assert moved(trainer.model.policy, policy) == {name for name in policy if "lora_" in name} != set()
    assert "score.weight" in moved(trainer.model.value_model, value)


def test_training_with_every_setting_at_its_default(script, folders):
    """53 tokens a response, 4 epochs of one mini-batch, activations computed twice, tables of answers."""
    models = {}
    for seed, (name, model) in enumerate(loaded(folders).items()):
        torch.manual_seed(seed)
        models[name] = type(model)(gpt2_config(VOCAB, n_positions=64, pad_token_id=PAD, num_labels=1))
    trainer = script(models)
    policy, value = weights(models["model"]), weights(models["value_model"])
    trainer.train()
    assert trainer.state.global_step == 3  # passes over the prompts
    assert trainer.state.log_history[-1]["objective/response_tokens"] == 53
    assert moved(models["model"], policy)
    assert moved(models["value_model"], value)


def test_an_added_pad_token_changes_nothing(script, folders):
    """Scripts add one and leave the embeddings as they are: no model ever reads its id."""
    reader = word_tokenizer(VOCAB, EOS, PAD)
    reader.add_special_tokens({"pad_token": "[PAD]"})
    assert reader.pad_token_id == VOCAB
    runs = [script(loaded(folders), given, stop_token="eos", **SHORT) for given in (None, reader)]
    for trainer in runs:
        trainer.train()
    assert logs(runs[0]) == logs(runs[1]) != []
    assert any(log["val/num_eos_tokens"] for log in logs(runs[0]))  # shorter rows were padded


def test_an_added_pad_token_with_an_embedding_of_its_own(script, folders):
    reader, models = word_tokenizer(VOCAB, EOS, PAD), loaded(folders)
    reader.add_special_tokens({"pad_token": "[PAD]"})
    for model in models.values():
        model.resize_token_embeddings(len(reader))
    policy = weights(models["model"])
    trainer = script(models, reader, stop_token="eos", **SHORT)
    trainer.train()
    assert moved(models["model"], policy)
    assert logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_a_prompt_that_ends_with_eos_is_no_ended_response(script, folders):
    """As where a template closes every turn: what ends a response is in the response."""
    closed = Dataset.from_dict({"input_ids": [[*ids, EOS] for ids in prompts(ROWS)["input_ids"]]})
    trainer = script(loaded(folders), data=closed, stop_token="eos", **SHORT | {"learning_rate": 1e-3})
    trainer.train()
    for update, log in enumerate(logs(trainer), start=1):
        seen = samples(trainer, update)
        assert len(seen) == 4
        assert log["val/num_eos_tokens"] == sum(sample["ended"] for sample in seen)
        assert 1 < log["objective/response_tokens"] <= LENGTH
    assert len({sample["ended"] for update in range(1, 7) for sample in samples(trainer, update)}) == 2


# What scripts read from a trainer

MODELS = ("policy_model", "ref_model", "reward_model", "value_model")


def test_the_four_models_can_be_read(build, folders):
    made = whole_models(folders)
    trainer = build(made)
    assert [getattr(trainer, name) for name in MODELS] == [made[n] for n in ("model", *MODELS[1:])]
    assert trainer.model.policy is trainer.policy_model
    assert trainer.model.value_model is trainer.value_model


def test_adapters_on_one_backbone_can_be_read_as_models(build):
    trainer = build(on_one_backbone)
    read = [*(getattr(trainer, name) for name in MODELS), trainer.model.policy, trainer.model.value_model]
    assert all(isinstance(model, torch.nn.Module) for model in read)
    names = {name for name, parameter in trainer.model.policy.named_parameters() if parameter.requires_grad}
    assert any("lora_A.policy" in name for name in names)
    before = weights(trainer.model.policy)
    trainer.train()
    assert any("lora_B.policy" in name for name in moved(trainer.model.policy, before))


def test_lora_from_the_trainer_is_read_as_the_policy(build, folders):
    """The reference is the policy without its adapter."""
    made = whole_models(folders) | {"ref_model": None}
    trainer = build(made, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))
    assert isinstance(trainer.policy_model, PeftModel)
    assert isinstance(trainer.model.policy, PeftModel)
    assert trainer.policy_model.get_base_model() is made["model"]
