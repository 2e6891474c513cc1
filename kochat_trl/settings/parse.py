"""A YAML file and a command line → typed arguments.

The keys are the fields of TRL's own config for the stage (`SFTConfig`, `RewardConfig`, `PPOConfig`, …), of TRL's
`ModelConfig`, and of the two small classes in `keys.py`. Precedence: class default < `extends:` parent < file < command
line. An unknown key and a value of the wrong type are errors that name the file and the line.

A file that extends a folder is for all stages: each takes its own file in the folder, and those of the keys that it
has a use for.
"""

import types
import typing
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NoReturn

from kochat_trl.errors import UserError, nearest
from kochat_trl.settings.checks import check_values
from kochat_trl.settings.keys import LORA_FIELDS, ON_SFT, UNUSED, UNUSED_KEYS, ModelArguments, RecipeArguments, Stage
from kochat_trl.settings.ppo import PPOConfig
from kochat_trl.settings.preference import DPOConfig, KTOConfig

import torch
import yaml
from transformers import TrainingArguments
from trl import RewardConfig, SFTConfig, TrlParser

# Chosen by the hardware where the config doesn't set them; and what changes nothing that is computed.
CHOSEN = {"bf16", "dtype", "fp16", "use_cpu"}
NO_MATTER = {"disable_tqdm", "logging_steps", "logging_strategy", "output_dir", "overwrite_output_dir", "report_to"}
NO_MATTER |= {"resume_from_checkpoint", "run_name", "save_steps", "save_strategy", "save_total_limit", "shard_base"}


@dataclass
class Arguments:
    """Everything that a recipe runs with. `resolved` has every key in force, ready to be a `--config` again."""

    stage: Stage
    training: Any  # what `training_config` says
    model: ModelArguments
    recipe: RecipeArguments
    resolved: dict[str, Any]
    given: set[str]  # keys that the file or the command line sets

    @property
    def max_length(self) -> int | None:
        """The tokens of a row at most: for PPO, of a prompt."""
        return self.recipe.max_prompt_length if isinstance(self.training, PPOConfig) else self.training.max_length


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message += " (in the config or on the command line)"
        raise UserError(f"command line: {message}")


def training_config(stage: Stage) -> type[TrainingArguments]:
    """The config class of a stage: TRL's own, and TRL 1.12's PPOConfig with our keys."""
    return {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig, "dpo": DPOConfig, "kto": KTOConfig}[stage]


def parse_arguments(stage: Stage, default_config: str, argv: list[str]) -> Arguments:
    """Parse `argv` for `stage`; `--config FILE` is `default_config` where it isn't given."""
    parser, path, resolved, given = _resolve(stage, default_config, argv)
    try:
        training, model, recipe = parser.parse_dict(dict(resolved))
    except (ValueError, ImportError, UserError) as error:  # raised by the classes' own checks
        raise UserError(f"{path}: {error}") from None
    return Arguments(stage, training, model, recipe, resolved, given)


def resolve_arguments(stage: Stage, config: str, argv: list[str]) -> dict[str, Any]:
    """Every value that `parse_arguments` would put in force; no class is built, which may take hold of a GPU."""
    return _resolve(stage, config, argv)[2]


def changed_setting(then: dict[str, Any], now: dict[str, Any], given: set[str]) -> str | None:
    """The first key whose value `now` is another than `then`, both of `resolve_arguments`; None if all are the same.

    Keys that change nothing that is computed don't count, nor what the hardware chose where the config doesn't: `given`
    are the keys that it sets.
    """
    now = yaml.safe_load(yaml.safe_dump(now))  # as it is read from a resolved.yaml
    compared = (now.keys() & then.keys()) - NO_MATTER - (CHOSEN - given)
    return next((key for key in sorted(compared) if then[key] != now[key]), None)


def _resolve(stage: Stage, default_config: str, argv: list[str]) -> tuple[_Parser, str, dict[str, Any], set[str]]:
    classes: list[Any] = [training_config(stage), ModelArguments, RecipeArguments]
    config_flag = _Parser(add_help=False, allow_abbrev=False)
    config_flag.add_argument("--config", default=default_config, metavar="FILE", help="A YAML file of these keys.")
    path = config_flag.parse_known_args(argv)[0].config
    parser = _Parser(classes, parents=[config_flag], allow_abbrev=False)
    parser.set_defaults(dtype=None)  # None: as the precision of the run asks for
    if stage == "ppo":
        parser.set_defaults(sft_model_path=None, reward_model_path=None)  # TRL's own is a model that it trained on
    hints = {name: hint for c in classes for name, hint in typing.get_type_hints(c).items()}
    actions = {action.dest: action for action in parser._actions if action.dest in hints}
    known = set(actions)
    for key, action in actions.items():
        if typing.get_origin(hints[key]) is dict:
            action.type = partial(_mapping, key, hints[key])
    values = {}
    for key, (value, where) in read_config(Path(path), stage).items():
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, known)}")
        if value != parser.get_default(key):
            values[key] = _checked(value, hints[key], f"{where}: key '{key}'")
        choices = actions[key].choices
        if choices and key in values and values[key] not in choices:
            raise UserError(f"{where}: key '{key}': found {value!r}, expected {' or '.join(map(repr, choices))}")
    parser.set_defaults_with_config(**values)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"command line: unknown {unknown[0]}{nearest(unknown[0], known)}")

    resolved = vars(namespace)
    del resolved["config"]
    for key in UNUSED[stage] & known:
        if resolved[key] != parser.get_default(key) or key in values:
            where = "these recipes" if key in UNUSED_KEYS else f"recipes/{stage}.py"
            raise UserError(f"{path}: '{key}' has no effect in {where}; remove it")
    needed = ["sft_model_path" if stage in ON_SFT else "model_name_or_path"]
    for key in needed + ["reward_model_path"] * (stage == "ppo"):
        if resolved[key] is None and not (key == "reward_model_path" and resolved["reward_functions"]):
            raise UserError(f"{path}: '{key}' is not set")
    try:
        check_values(stage, SimpleNamespace(**resolved))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    choose_precision(resolved)
    flags = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    return parser, path, resolved, values.keys() | flags


def choose_precision(values: dict[str, Any]) -> None:
    """Fill in `use_cpu`, `bf16`, `fp16` and `dtype` from the hardware, where the config doesn't set them.

    On a GPU bfloat16 if it has it (Ampere and later), else float16; on a CPU float32. A base that is trained whole
    is loaded in float32, under autocast; one under LoRA in the precision of the run.
    """
    gpu = torch.cuda.is_available() and not values["use_cpu"]
    values["use_cpu"] = not gpu
    if values["bf16"] is None:
        values["bf16"] = gpu and not values["fp16"] and torch.cuda.is_bf16_supported(including_emulation=False)
        values["fp16"] = values["fp16"] or (gpu and not values["bf16"])
    if values["dtype"] is None:
        half = "bfloat16" if values["bf16"] else "float16" if values["fp16"] else "float32"
        values["dtype"] = half if values["use_peft"] else "float32"


def read_config(path: Path, stage: Stage) -> dict[str, tuple[Any, str]]:
    """The keys of a flat YAML file and of the files it extends → value and "file, line N".

    A folder stands for the file of `stage` in it.
    """
    return _read_config(path, stage, [])[0]


def folder_of(path: Path) -> Path:
    """The folder that a config for all stages extends; the path itself if it is a folder.

    Raises `UserError` for the config of one stage.
    """
    folder = _read_config(path, "sft", [])[1]
    if folder is None:
        raise UserError(
            f"{path}: expected a folder with sft.yaml, reward.yaml and ppo.yaml, or a file that extends one, such as "
            "`extends: ../tiny`"
        )
    return folder


def _read_config(path: Path, stage: Stage, children: list[Path]) -> tuple[dict[str, tuple[Any, str]], Path | None]:
    """The keys, and the folder that is extended if one is: then the keys of other stages are left out."""
    if path.is_dir():
        return _read_config(path / f"{stage}.yaml", stage, children)[0], path
    if path.resolve() in children:
        raise UserError(f"{path}: extends itself, through {' and '.join(map(str, children))}")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: expected lines of `key: value`")
        entries = []
        for key, value in node.value if node else []:
            where = f"{path}, line {key.start_mark.line + 1}"
            entries.append((key.value, loader.construct_object(value, deep=True), where))
    except OSError as error:
        raise UserError(f"{path}: can't read this config: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: broken YAML: {error}") from None

    config: dict[str, tuple[Any, str]] = {}
    for key, value, where in entries:
        if key in config:
            raise UserError(f"{where}: key '{key}' is set twice")
        config[key] = (value, where)
    if "extends" not in config:
        return config, None
    parent, where = config.pop("extends")
    if not isinstance(parent, str):
        raise UserError(f"{where}: key 'extends': found {parent!r}, expected one path, relative to this file")
    inherited, folder = _read_config(path.parent / parent, stage, [*children, path.resolve()])
    if folder is not None:
        for key in ("train_files", "eval_files"):
            if key in config:
                raise UserError(
                    f"{config[key][1]}: key '{key}' is for one stage; this file is for all, as it extends {folder}"
                )
        elsewhere = set().union(*map(_keys, UNUSED)) - _keys(stage)
        config = {key: entry for key, entry in config.items() if key not in elsewhere}
    return inherited | config, folder


def _keys(stage: Stage) -> set[str]:
    """The keys that a file for all stages may set for `stage`."""
    classes = (training_config(stage), ModelArguments, RecipeArguments)
    settled = LORA_FIELDS.keys() if stage in ON_SFT else set()
    return {f.name for c in classes for f in fields(c)} - UNUSED[stage] - settled


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as a type that `hint` admits, or a `UserError`. YAML reads `1e-5` as a string: here it is a number."""
    branches = typing.get_args(hint) if _is_union(hint) else (hint,)
    for branch in branches:
        if _is_a(value, branch):
            return float(value) if branch is float else value
    if isinstance(value, str) and float in branches:
        try:
            return float(value)
        except ValueError:
            pass
    raise UserError(f"{where}: found {value!r}, expected {_describe(branches)}")


def _mapping(key: str, hint: Any, text: str) -> Any:
    """A flag's value as a file would have it: `{a: b}`."""
    return _checked(yaml.safe_load(text), hint, f"command line: --{key}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_a(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_a(key, arguments[0]) and _is_a(item, arguments[1]) for key, item in value.items()
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint]
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _describe(branches: tuple[Any, ...]) -> str:
    names = []
    for branch in branches:
        if typing.get_origin(branch) is Literal:
            names += [repr(choice) for choice in typing.get_args(branch)]
        elif isinstance(branch, type) and issubclass(branch, Enum):
            names += [repr(member.value) for member in branch]
        elif branch is type(None):
            names.append("null")
        else:
            names.append(getattr(branch, "__name__", str(branch)) if branch in (int, float, str, bool) else str(branch))
    return " or ".join(names)
