"""What the commands of `kochat` are made of: a row for each, flags that several share, and what they print with.

What a command needs is imported when it runs, so that `kochat --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from kochat_trl.data.options import ReadingOptions
from kochat_trl.data.records import RecordError
from kochat_trl.errors import UserError

KOGPT2 = "skt/kogpt2-base-v2"

Flag = Callable[[Any], Any]  # adds itself to a parser
Command = Callable[[argparse.Namespace], None]
COMMANDS: dict[str, Callable[[Any], None]] = {}  # by their words; each adds itself to argparse's commands


def flag(name: str, help: str | None = None, metavar: str | None = None, **settings: Any) -> Flag:
    """What `add_argument` takes."""
    settings |= {"metavar": metavar} if metavar else {}
    return lambda parser: parser.add_argument(name, help=help, **settings)


def one_of(*flags: Flag, required: bool = False) -> Flag:
    """Flags of which one may be given, or has to be."""

    def add(parser: Any) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for flag in flags:
            flag(group)

    return add


def command(words: str, example: str, *flags: Flag, epilog: str = "") -> Callable[[Command], Command]:
    """Make a function the command `kochat WORDS`, described by its docstring; the example works as it stands."""

    def register(function: Command) -> Command:
        def add(commands: Any) -> None:
            says = (function.__doc__ or "").strip()
            about = {"help": says.splitlines()[0], "description": says, "epilog": f"{epilog}example:\n  {example}"}
            raw = argparse.RawDescriptionHelpFormatter
            parser = commands.add_parser(words.split()[-1], formatter_class=raw, **about)
            parser.set_defaults(command=function)
            for flag in flags:
                flag(parser)

        COMMANDS[words] = add
        return function

    return register


def choice(name: str, help: str, *choices: str) -> Flag:
    """A flag of several words, by default the first."""
    return flag(name, help, choices=choices, default=choices[0])


KINDS = ("sft", "preference", "prompt", "kto")
KIND = flag("--kind", "what the records are; told from their fields unless given", choices=KINDS)
MAP = "what columns are, such as question=prompt 답=completion note=ignore; `a.b` is a field of a field"
LABELS = "SFT on answers labelled true or false: refuse them (default), or take the true ones"
ORDERS = "how `ranking` is read: completion indices, best first (default), or the rank of each completion"
RANKING_ORDER = choice("--ranking-order", ORDERS, "best_first", "rank_of")
READING = (  # the fields of `ReadingOptions`
    flag("--map", MAP, "COLUMN=WHAT", nargs="+", default=[]),
    flag("--encoding", "of text files, such as cp949 (default: utf-8)", default="utf-8"),
    flag("--plain-text", "read a prompt a line, whatever the file looks like", action="store_true"),
    choice("--labels", LABELS, "refuse", "true_only"),
    RANKING_ORDER,
)
PAIRS = choice("--pairs", "which pairs of a ranking (default: all)", "all", "best_vs_rest", "adjacent")
FATES = "refuse broken records (default), or leave them out and list them"
INVALID_RECORDS = choice("--invalid-records", FATES, "error", "skip")
LOADING = one_of(
    flag("--load-in-8bit", "weights in int8", action="store_const", dest="loading", const="int8", default="float32"),
    flag("--load-in-4bit", "weights in nf4", action="store_const", dest="loading", const="nf4"),
)
BATCHES = (LOADING, flag("--batch-size", "texts at once (default: 64)", "N", type=int, default=64), INVALID_RECORDS)
SEED = flag("--seed", "default: 0", type=int, default=0)
POLICY = flag("model", "base, adapter or merged model: folder or Hub name", "MODEL")
PRESETS = "greedy, sample (the whole distribution, as PPO does), beam, top_k, top_p, course (the course's settings)"
FIELDS = "fields of transformers' GenerationConfig over the preset's, such as temperature=0.7 max_new_tokens=96"
SAMPLING = (flag("--set", FIELDS, "FIELD=VALUE", nargs="+", default=[]), SEED)
TRUST = flag(
    "--trust-remote-code", "run code that comes with the model; only if you trust who made it", action="store_true"
)
NEW_JSONL = flag("--output", "a new file", "OUT.jsonl", required=True)


def reading_options(args: argparse.Namespace) -> ReadingOptions:
    """What the flags of `READING` say."""
    return ReadingOptions(**_reading(args))


def data_arguments(args: argparse.Namespace) -> Any:
    """What the flags say of how records become rows: those of `READING`, and others that a command may have."""
    from kochat_trl.settings.keys import DataArguments

    others = ("invalid_records", "overlong", "pairs", "rank_margins")
    return DataArguments(**_reading(args), **{name: getattr(args, name) for name in others if hasattr(args, name)})


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    columns = dict(pair.rpartition("=")[::2] for pair in args.map)
    for pair in args.map:
        if "=" not in pair:
            raise UserError(f"--map: found {pair!r}, expected COLUMN=WHAT, such as question=prompt")
    names = ("encoding", "plain_text", "labels", "ranking_order")
    return {"columns": columns} | {name: getattr(args, name) for name in names}


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `--set` of `SAMPLING` says, read as YAML, for `decoding`."""
    import yaml

    fields: dict[str, Any] = {}
    for word in args.set:
        name, equals, fields[name] = word.partition("=")
        if not equals:
            raise UserError(f"--set: found '{word}', expected FIELD=VALUE, such as temperature=0.7")
        with suppress(yaml.YAMLError, ValueError):  # then it stays text, which no field takes
            fields[name] = yaml.safe_load(fields[name])
    return fields


def list_records(errors: Iterable[RecordError], fate: str = "left out") -> None:
    """A line for each record that a command doesn't use, or not as it is."""
    for error in errors:
        print(f"{fate}: {error}", file=sys.stderr)


def tokenizer_of(path: str | None) -> Any:
    """The tokenizer of a folder or Hub name, if one is given."""
    if path is None:
        return None
    from kochat_trl.models.tokenizer import load_tokenizer

    return load_tokenizer(path)


def policy_of(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model of `POLICY`, loaded as `LOADING` says, and its tokenizer."""
    from kochat_trl.models.loading import load_policy
    from kochat_trl.reward.score import LOADING
    from kochat_trl.settings.keys import ModelArguments

    tokenizer = tokenizer_of(args.model)
    return load_policy(args.model, ModelArguments(dtype="float32", **LOADING[args.loading]), tokenizer), tokenizer


def console() -> Any:
    """Rich's, on stdout."""
    from rich.console import Console

    return Console()
