"""TRL's interface: its scripts, callbacks, metrics, fields and defaults."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from kochat_trl.ppo import trainer as trainer_module
from kochat_trl.settings.ppo import PPOConfig
from tests.ppo.helpers import LENGTH, LORA, ROWS, adapters_apart, output_of, prompts, trained

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback


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
    assert max(temperatures) < 0.1
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
