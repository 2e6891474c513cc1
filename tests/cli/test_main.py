"""`kochat`: every example of every --help, and what goes wrong."""

import argparse
import io
import json
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

from kochat_trl.cli.main import make_parser
from kochat_trl.data.records import conversation
from kochat_trl.desk.curation.show import collator
from kochat_trl.desk.sample.sample import write_sample_data
from kochat_trl.models import remote
from kochat_trl.models.loading import load_causal_lm, new_reward_model
from kochat_trl.ppo.rollout import Rollout
from kochat_trl.reward.trainer import RankingTrainer
from kochat_trl.rows.encode import encode_dialogue
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.keys import ON_SFT, ModelArguments, RecipeArguments
from tests.tiny import ROOT, run_script

import pytest
import yaml
from transformers import DataCollatorWithPadding
from trl import RewardConfig, SFTConfig, SFTTrainer


def commands(parser, name="kochat"):
    """(name, parser) of each command that runs something."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, parser
    for action in nested:
        for word, child in action.choices.items():
            yield from commands(child, f"{name} {word}")


COMMANDS = dict(commands(make_parser()))


@pytest.fixture(scope="session")
def project(tmp_path_factory, tiny_base, tiny_reward):
    """A folder laid out as the examples expect: sample data for KoChatGPT's, the tiny base for kogpt2."""
    folder = tmp_path_factory.mktemp("project")
    written = write_sample_data(folder / "data/kochatgpt", seed=0)
    for name, count in {"sft": 100, "rm_eval": 40}.items():  # as many as are quickly scored
        few = json.loads(written[name].read_text(encoding="utf-8-sig"))[:count]
        written[name].write_text(json.dumps(few), encoding="utf-8")
    for name in ("skt/kogpt2-base-v2", "outputs/kogpt2/sft", "outputs/kogpt2/ppo"):
        shutil.copytree(tiny_base, folder / name)
    shutil.copytree(tiny_reward, folder / "outputs/kogpt2/reward")
    shutil.copytree(ROOT / "configs/kogpt2", folder / "configs/kogpt2")
    ppo = folder / "configs/kogpt2/ppo.yaml"  # for the tiny base's 128 positions
    ppo.write_text(ppo.read_text(encoding="utf-8").replace("response_length: 64", "response_length: 32"))
    held_out = folder / "data/kochatgpt/sft_held_out.jsonl"
    shutil.copy(written["sft_eval"], held_out)
    stages = {
        "sft": {"model_name_or_path": "skt/kogpt2-base-v2", "eval_files": [str(held_out.relative_to(folder))]},
        "reward": {},
        "ppo": {"sft_model_path": "outputs/kogpt2/sft", "reward_model_path": "outputs/kogpt2/reward"}
        | {"eval_files": [], "train_files": ["data/kochatgpt/kochatgpt_3_PPO.jsonl"]}
        | {"response_length": 32, "temperature": 1.0},
    }
    for name, settings in stages.items():
        (folder / "outputs/kogpt2" / name / "resolved.yaml").write_text(yaml.safe_dump(settings))
        (folder / "outputs/kogpt2" / name / "metrics.json").write_text('{"history": []}')
    return folder


@pytest.fixture
def kochat(kochat, monkeypatch, project):
    """Run `kochat …` in the project's folder, with nothing to say."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(project)
    return kochat


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_each_help_runs(name, kochat, project, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)  # it would serve until Ctrl-C
    text = COMMANDS[name].format_help()
    example = shlex.split(text.split("example:\n")[1].replace("\\\n", " "))
    assert " ".join(example).startswith(f"{name} ")
    held_out = project / "outputs/rm_held_out.jsonl"  # which the example of `kochat data split` writes
    if str(held_out.relative_to(project)) in example[:5] and not held_out.exists():
        shutil.copy(project / "data/kochatgpt/kochatgpt_2_RM.heldout.jsonl", held_out)
    code, printed = kochat(*example[1:])
    assert code == 0, printed
    for flag in ("--output", "--train", "--held-out"):
        if flag in example:
            assert (project / example[example.index(flag) + 1]).stat().st_size > 100
    if "--output" in example or "--train" in example:  # what is there is never overwritten
        code, printed = kochat(*example[1:])
        assert code == 1
        assert "exists already" in printed


LOADS_MODELS = {
    "check",
    "show",
    "convert",
    "clean",
    "rank",
    "sample",
    "eval",
    "score",
    "generate",
    "chat",
    "report",
    "label",
    "app",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_loads_a_model_may_be_told_to_run_its_code(name):
    assert ("--trust-remote-code" in COMMANDS[name].format_help()) == (name.split()[-1] in LOADS_MODELS)


def test_code_of_a_model_runs_only_where_told(kochat, write, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_allowed", False)  # put back afterwards
    folder, ran = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "ran"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig"}}
    config = json.loads((folder / "config.json").read_text()) | own
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import GPT2Config\n\n\nclass OwnConfig(GPT2Config):\n"
        "    model_type = 'own'\n"
    )
    command = ("data", "check", write("a.jsonl", '[{"prompt": "가나다"}]'), "--tokenizer", folder)
    with suppress(ValueError):
        assert kochat(*command)[0] == 1
    assert not ran.exists()
    code, printed = kochat(*command, "--trust-remote-code")
    assert code == 0, printed
    assert ran.exists()
    monkeypatch.setattr(remote, "_allowed", False)
    with pytest.raises(SystemExit):  # it is no adapter
        run_script("scripts/merge_lora.py", "--adapter", folder, "--output", tmp_path / "m", "--trust-remote-code")
    assert remote.remote_code_allowed()


def test_help_is_quick():
    """Nothing heavy is imported before a command asks for it."""
    heavy = {"torch", "transformers", "datasets", "rich", "numpy", "matplotlib"}
    code = f"import sys, kochat_trl.cli.main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_check_exits_with_1_on_an_error(kochat, write):
    assert kochat("data", "check", write("a.jsonl", '[{"prompt": "가나다"}, {"prompt": "가나다"}]'))[0] == 0
    code, printed = kochat("data", "check", write("b.jsonl", '[{"prompt": "가나다"}, {"prompt": ""}]'), "--json")
    assert code == 1
    assert json.loads(printed)["errors"] == 1


def test_convert_writes_trls_formats(kochat, write, tmp_path):
    record = {"prompt": "가", "completion_0": "나", "completion_1": "다", "completion_2": "라", "ranking": [1, 2, 0]}
    path = write("rm.jsonl", json.dumps([record]))

    def rows(name, *options):
        code, printed = kochat("data", "convert", path, "--output", tmp_path / name, *options)
        assert code == 0, printed
        return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]

    plain = rows("a", "--to", "preference", "--no-template")
    assert plain[0] == {"prompt": "가", "chosen": "다", "rejected": "라", "group": 0}
    assert [(row["chosen"], row["rejected"]) for row in plain] == [("다", "라"), ("다", "나"), ("라", "나")]
    assert rows("b", "--to", "preference")[0] == {
        "prompt": "### Instruction(명령어):\n가\n\n### Response(응답):",
        "chosen": "다</s>",
        "rejected": "라</s>",
        "group": 0,
    }
    options = ("--to", "preference", "--no-template", "--ranking-order", "rank_of", "--pairs", "best_vs_rest")
    turned = rows("c", *options, "--rank-margins")  # ranks 1, 2, 0: completion 2 is the best
    assert [(row["chosen"], row["rejected"], row["margin"]) for row in turned] == [("라", "나", 1.0), ("라", "다", 2.0)]
    assert rows("d", "--to", "prompt", "--no-template") == [{"prompt": "가"}]


def test_convert_refuses_or_lists_broken_records(kochat, write, tmp_path):
    command = ["data", "convert", write("a.jsonl", '[{"prompt": "가"}, {"prompt": ""}]'), "--to", "prompt", "--output"]
    code, printed = kochat(*command, tmp_path / "out.jsonl")
    assert code == 1
    assert "1 of 2 records can't be used" in printed
    assert not (tmp_path / "out.jsonl").exists()
    code, printed = kochat(*command, tmp_path / "out.jsonl", "--invalid-records", "skip")
    assert code == 0
    assert "left out: " in printed
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_show_marks_what_is_trained_on(kochat, write, tiny_tokenizer):
    path = write("sft.jsonl", '[{"prompt": "반가워요", "completion": "반가"}]')
    ids, labels = encode_dialogue(tiny_tokenizer, conversation("반가워요", "반가"))
    answer = [i for i in labels if i != -100]
    code, printed = kochat("data", "show", path, "--tokenizer", "skt/kogpt2-base-v2")
    assert code == 0
    assert f"not trained on, label −100: {len(ids) - len(answer)}" in printed
    trained = printed.split(f"trained on, label = id: {len(answer)}\n")[1].split()
    assert [int(word.split("\u00a0")[-1]) for word in " ".join(trained).replace("\u00a0", " ").split()[1::2]] == answer
    code, printed = kochat("data", "show", path, "--index", "7")
    assert code == 1
    assert "there is no record 7: it has 1, from 0" in printed
    code, printed = kochat("data", "show")
    assert code == 1
    assert "give either FILE, or --config with --stage" in printed


def test_show_marks_the_pairs_that_the_other_reading_inverts(kochat, write):
    record = {"prompt": "가", "completion_0": "나", "completion_1": "다", "completion_2": "라", "ranking": [1, 2, 0]}
    printed = kochat("data", "show", write("rm.jsonl", json.dumps([record])))[1]
    assert "best first: 1 > 2 > 0" in printed
    assert "upside down: 1 > 0, 2 > 0" not in printed
    assert "upside down: 1 > 0, 1 > 2" in " ".join(printed.split())


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo", "kto"])
def test_show_prints_the_batch_of_a_config(stage, kochat, write, kochatgpt_files, tiny_tokenizer):
    model = "sft_model_path" if stage in ON_SFT else "model_name_or_path"
    file = kochatgpt_files.get(stage, kochatgpt_files["reward"])
    lines = [f"{model}: skt/kogpt2-base-v2", f"train_files: [{file}]", "output_dir: outputs/x"]
    lines += ["reward_model_path: outputs/kogpt2/sft"] if stage == "ppo" else []
    config = write("config.yaml", "\n".join([*lines, "per_device_train_batch_size: 3", "use_cpu: true"]))
    code, printed = kochat("data", "show", "--config", config, "--stage", stage, "--index", "1")
    assert code == 0, printed
    dataset, _ = build_dataset([file], stage, tiny_tokenizer)
    assert len(dataset) == (18 if stage in ("dpo", "kto") else 6)
    assert f"rows 1 to 3 of {len(dataset)}" in printed

    class Training:
        pad_to_multiple_of, engine = None, "kochat"

    batch = collator(stage, tiny_tokenizer, Training)([dataset[i] for i in (1, 2, 3)])
    assert str(tuple(batch["input_ids"].shape)) in printed
    padding = [int((mask == 0).sum()) for mask in batch["attention_mask"]]
    assert max(padding) > 0
    assert all(f" {count} right " in printed for count in padding if count)
    if stage == "dpo":
        assert "1, chosen" in printed
        assert "3, rejected" in printed
    if stage in ("dpo", "kto"):
        assert f"trained on, label = id: {batch['completion_mask'][0].sum()}" in printed


def test_the_collator_shown_is_the_trainers_own(kochatgpt_files, tiny_base, tiny_tokenizer, tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "pad_to_multiple_of": 8}
    models = {"sft": load_causal_lm, "reward": new_reward_model}
    reward_trainer = partial(RankingTrainer, RecipeArguments(train_files=[]))
    for stage, trainer, config in (("sft", SFTTrainer, SFTConfig), ("reward", reward_trainer, RewardConfig)):
        args = config(**settings)
        built = trainer(
            model=models[stage](tiny_base, ModelArguments(dtype="float32"), tiny_tokenizer),
            args=args,
            train_dataset=build_dataset([kochatgpt_files[stage]], stage, tiny_tokenizer)[0],
            processing_class=tiny_tokenizer,
        )
        assert built.data_collator == collator(stage, tiny_tokenizer, args)
    assert collator("ppo", tiny_tokenizer, SimpleNamespace(engine="trl")) == DataCollatorWithPadding(tiny_tokenizer)


def test_ppo_s_prompts_are_shown_as_its_trainer_takes_them(kochatgpt_files, tiny_tokenizer):
    """Padded as in a micro-batch of responses of one token, but for that token."""
    prompts = build_dataset([kochatgpt_files["ppo"]], "ppo", tiny_tokenizer)[0]["input_ids"]
    batch = collator("ppo", tiny_tokenizer, SimpleNamespace(engine="kochat"))([{"input_ids": ids} for ids in prompts])
    rollout = Rollout.of(list(prompts), [[1] for _ in prompts], 1, (), False, "cpu")
    taken = rollout.micro_batch(range(len(prompts)))
    assert batch["attention_mask"].tolist() == taken.attention_mask[:, 1:].tolist()
    for shown, row, last in zip(batch["input_ids"], taken.input_ids, taken.starts, strict=True):
        assert shown[: last + 1].tolist() == row[: last + 1].tolist()


def test_rank_by_a_reward_model_is_refused_without_one(kochat, write, tmp_path):
    prompts = write("p.jsonl", '[{"prompt": "가"}]')
    command = ["data", "rank", prompts, "--output", tmp_path / "o", "--sources"]
    code, printed = kochat(*command, "skt/kogpt2-base-v2")
    assert code == 1
    assert "two --sources or more" in printed
    sources = [write(f"{i}.jsonl", f'[{{"prompt": "가", "completion": "{i}"}}]') for i in range(2)]
    code, printed = kochat(*command, *sources, "--reward-model", "skt/kogpt2-base-v2")
    assert code == 1
    assert "no score head" in printed
