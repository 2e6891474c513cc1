"""Answers end by themselves under the templates that people bring, on a base whose end of text is another token."""

import json
import random
from pathlib import Path

from benchmarks.architectures import CHATML, byte_tokenizer, run_recipe
from kochat_trl.data.records import Prompt, conversation
from kochat_trl.desk.answers.generate import decoding, generate_answers
from kochat_trl.models.loading import load_policy
from kochat_trl.models.template import answer_shape
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.runs.merge import merge_adapter
from kochat_trl.settings.keys import ModelArguments
from tests.tiny import gpt2_config

import pytest
import torch
import trl
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

SHIPPED = Path(trl.__file__).parent / "chat_templates"
EXAONE = (
    "{% for message in messages %}[|{{ message['role'] }}|]{{ message['content'] }}[|endofturn|]\n{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "exaone": EXAONE}
TEMPLATES |= {name: (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8") for name in ("gemma", "llama3", "qwen3")}
ENDS = {"chatml": "<|im_end|>", "exaone": "[|endofturn|]", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}
ENDS |= {"qwen3": "<|im_end|>"}
MARKS = ["<bos>", "<|im_start|>", "<|im_end|>", "[|user|]", "[|assistant|]", "[|system|]", "[|endofturn|]"]
MARKS += ["<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
THOUGHTS = ["<think>", "</think>"]  # added and not special, as Qwen3 has them
SUMS = [(f"{a}+{b}", f"{a + b}") for a in range(10) for b in range(10)]
LENGTH = 32  # of an answer at most
# Of a trained one at most: two digits and the end; before them Qwen3 has a thought of two tokens and four newlines.
LONGEST = dict.fromkeys(TEMPLATES, 3) | {"qwen3": 9}
COMMON = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "seed": 0}


def run(stage, folder, **settings):
    config = folder / f"{stage}.yaml"
    config.write_text(yaml.safe_dump(COMMON | {"output_dir": str(folder / stage)} | settings))
    run_recipe(stage, "--config", config)


def is_plain(tokenizer, ids):
    """Whether an answer's ids have no markup before the last one, special tokens included, but for an empty thought."""
    text = tokenizer.decode(ids[:-1]).removeprefix("<think>\n\n</think>")
    return not any(mark in text for mark in MARKS + THOUGHTS)


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=() if n == "chatml" else pytest.mark.slow) for n in TEMPLATES]
)
def run_of(request, tmp_path_factory):
    """The template's name, and a folder in which SFT, a reward model and two updates of PPO have run under it."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_tokenizer(
        TEMPLATES[request.param], "<eos>", *MARKS, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>"
    )
    tokenizer.add_tokens(THOUGHTS)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = gpt2_config(len(tokenizer), n_embd=64, n_head=4, n_positions=128, eos_token_id=256, pad_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    rows = {
        "sft": [{"prompt": question, "completion": answer} for question, answer in SUMS],
        "reward": [{"prompt": question, "chosen": answer, "rejected": "?"} for question, answer in SUMS],
        "ppo": [{"prompt": question} for question, _ in SUMS],
    }
    files = {}
    for stage, records in rows.items():
        file = folder / f"{stage}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in random.Random(0).sample(records, len(records))))
        files[stage] = {"train_files": [str(file)]}
    base, sft = str(folder / "base"), str(folder / "sft")
    trained = {"model_name_or_path": base, "max_steps": 350, "per_device_train_batch_size": 20, "learning_rate": 3e-3}
    run("sft", folder, **files["sft"], **trained, max_length=128)
    lora = {"use_peft": True, "lora_r": 4, "per_device_train_batch_size": 20}
    run("reward", folder, **files["reward"], **lora, model_name_or_path=sft, max_steps=2, max_length=128)
    updates = {
        "per_device_train_batch_size": 50,
        "total_episodes": 100,
        "learning_rate": 1e-6,
        "num_sample_generations": 0,
    }
    ppo = {"stop_token": "eos", "temperature": 1.0, "response_length": LENGTH, "missing_eos_penalty": 1.0}
    paths = {"sft_model_path": sft, "reward_model_path": str(folder / "reward")}
    run("ppo", folder, **files["ppo"], **(lora | updates), **ppo, **paths)
    stock = {"engine": "trl", "output_dir": str(folder / "stock")}
    run("ppo", folder, **files["ppo"], **(lora | updates), **(ppo | stock), **paths)
    return request.param, folder


def test_in_generate(run_of):
    name, folder = run_of
    tokenizer = load_tokenizer(str(folder / "sft"))
    assert answer_shape(tokenizer).end == ENDS[name] != tokenizer.eos_token
    model = load_policy(str(folder / "sft"), ModelArguments(dtype="float32"), tokenizer)
    prompts = [Prompt(question) for question, _ in SUMS]
    answers = generate_answers(model, tokenizer, prompts, decoding("sample", max_new_tokens=LENGTH))
    assert sum(answer.ended for answer in answers) >= 95
    ended = [answer for answer in answers if answer.ended]
    assert {answer.ids[-1] for answer in ended} == {tokenizer.convert_tokens_to_ids(ENDS[name])}
    assert sum(answer.text.isdigit() for answer in ended) >= 95  # no markup, and no thought
    assert sum(is_plain(tokenizer, answer.ids) for answer in ended) >= 95  # nor any that the text leaves out


@pytest.mark.parametrize("output", ["ppo", "stock"])  # by our trainer, and by TRL's own
def test_in_ppo(run_of, output):
    name, folder = run_of
    history = json.loads((folder / output / "metrics.json").read_text())["history"]
    ended = [update["val/num_eos_tokens"] for update in history if "val/num_eos_tokens" in update]
    assert len(ended) == 2
    assert sum(ended) >= 95
    if output == "ppo":
        tokens = sum(50 * update["objective/response_tokens"] for update in history)
        assert tokens - LENGTH * (100 - sum(ended)) <= LONGEST[name] * sum(ended)  # of those that ended
        samples = (folder / output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(samples) == 8
        assert sum(json.loads(sample)["response"].isdigit() for sample in samples) >= 6  # a stray byte now and then


def test_in_plain_transformers_after_the_merge(run_of):
    name, folder = run_of
    merged = folder / "merged"
    if not merged.exists():
        merge_adapter(str(folder / "ppo"), merged)
    tokenizer = AutoTokenizer.from_pretrained(merged, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(merged)
    end = tokenizer.convert_tokens_to_ids(ENDS[name])
    assert model.generation_config.eos_token_id == [end, tokenizer.eos_token_id]
    asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = tokenizer.apply_chat_template([list(conversation(question)) for question, _ in SUMS], **asked)
    torch.manual_seed(0)
    output = model.generate(**inputs, do_sample=True, max_new_tokens=LENGTH)[:, inputs["input_ids"].shape[1] :]
    answers = [(row[: row.index(end) + 1], row[row.index(end) + 1 :]) for row in output.tolist() if end in row]
    assert len(answers) >= 95
    assert {i for _, rest in answers for i in rest} <= {tokenizer.pad_token_id}  # nothing is sampled after the end
    assert sum(is_plain(tokenizer, ids) for ids, _ in answers) >= 95
