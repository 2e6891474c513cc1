"""SFT, reward model and PPO from the files that people have: Parquet, ShareGPT, messages with system turns."""

import json
from pathlib import Path

from kochat_trl.data.records import conversation
from kochat_trl.rows.encode import encode_prompt
from tests.data.foreign import openai, sharegpt
from tests.recipes.test_recipes import SHORT
from tests.tiny import PAIRS

import pandas
import pytest

SYSTEM = "반가워요."


def parquet(folder: Path) -> dict[str, Path]:
    rows = {
        "sft": [{"instruction": q, "input": None, "output": good, "url": "u", "n": 1} for q, good, _ in PAIRS],
        "reward": [{"question": q, "chosen": good, "rejected": bad, "system": None} for q, good, bad in PAIRS],
        "ppo": [{"__index_level_0__": 7, "질문": q} for q, _, _ in PAIRS],
    }
    for stage, records in rows.items():
        pandas.DataFrame(records).to_parquet(folder / stage)
    return {stage: folder / stage for stage in rows}


def written(folder: Path, rows: dict[str, list]) -> dict[str, Path]:
    for stage, records in rows.items():
        (folder / stage).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return {stage: folder / stage for stage in rows}


def sharegpt_files(folder: Path) -> dict[str, Path]:
    first = PAIRS[0][:2]
    rows = {
        "sft": [{"id": "a", "conversations": sharegpt(*first, q, good)} for q, good, _ in PAIRS],
        "reward": [
            {
                "conversations": sharegpt(*first, q),
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": bad},
            }
            for q, good, bad in PAIRS
        ],
        "ppo": [{"conversations": sharegpt(*first, q)} for q, _, _ in PAIRS],
    }
    return written(folder, rows)


def messages_with_system(folder: Path) -> dict[str, Path]:
    rows = {
        "sft": [{"messages": openai(q, good, system=SYSTEM)} for q, good, _ in PAIRS],
        "reward": [
            {"chosen": openai(q, good, system=SYSTEM), "rejected": openai(q, bad, system=SYSTEM)}
            for q, good, bad in PAIRS
        ],
        "ppo": [{"messages": openai(q, system=SYSTEM)} for q, _, _ in PAIRS],
    }
    return written(folder, rows)


# What makes the files, and what stands before the question in each of PPO's prompts.
FILES = {
    "Parquet": (parquet, lambda question: conversation(question)),
    "ShareGPT": (sharegpt_files, lambda question: conversation(*PAIRS[0][:2], question)),
    "messages with system turns": (messages_with_system, lambda question: conversation(question, system=SYSTEM)),
}


@pytest.mark.parametrize("name", FILES)
def test_the_three_stages(name, tiny_base, tiny_tokenizer, recipe, tmp_path):
    make, asked = FILES[name]
    files = make(tmp_path)
    for stage in ("sft", "reward", "ppo"):
        arguments = ["--config", f"configs/tiny/{stage}.yaml", "--output_dir", tmp_path / f"{stage}-out", *SHORT[stage]]
        arguments += ["--train_files", files[stage], "--load_in_8bit", "false"]
        if stage == "ppo":
            paths = {"sft_model_path": tmp_path / "sft-out", "reward_model_path": tmp_path / "reward-out"}
            arguments += [word for flag, path in paths.items() for word in (f"--{flag}", path)]
        else:
            arguments += ["--model_name_or_path", tiny_base, "--eval_files", files[stage]]
        recipe(stage, *arguments)
        environment = json.loads((tmp_path / f"{stage}-out/environment.json").read_text(encoding="utf-8"))
        assert list(environment["data_sha256"]) == [str(files[stage])]
        assert not (tmp_path / f"{stage}-out/data_report.txt").exists()
    samples = (tmp_path / "ppo-out/samples.jsonl").read_text(encoding="utf-8").splitlines()
    shown = {json.loads(line)["prompt"] for line in samples}
    prompts = [encode_prompt(tiny_tokenizer, asked(question)) for question, _, _ in PAIRS]
    assert shown
    assert shown <= set(tiny_tokenizer.batch_decode(prompts, skip_special_tokens=True))
