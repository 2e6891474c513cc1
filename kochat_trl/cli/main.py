"""`kochat`: the commands beside the recipes, each in the file of its group."""

import argparse
import logging

from kochat_trl.cli import answers, data, label, reward, workflow  # noqa: F401  # their commands add themselves
from kochat_trl.cli.options import COMMANDS
from kochat_trl.errors import run
from kochat_trl.models.remote import allow_remote_code

GROUPS = {
    "data": "check, show, convert, clean and build data files",
    "reward": "evaluate a reward model, and score answers with it",
}


def main() -> None:
    """The entry point of `kochat`."""
    arguments = make_parser().parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kochat_trl.data").setLevel(logging.INFO)  # what a file was taken for, and what isn't read
    if getattr(arguments, "trust_remote_code", False):
        allow_remote_code("--trust-remote-code")
    run(lambda: arguments.command(arguments))


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; the result's `command` is the function that runs it."""
    parser = argparse.ArgumentParser(prog="kochat", description="RLHF for small Korean language models.")
    places = {"": parser.add_subparsers(metavar="COMMAND", required=True)}
    for name, says in GROUPS.items():
        group = places[""].add_parser(name, help=says)
        places[name] = group.add_subparsers(metavar="COMMAND", required=True)
    for words, add in COMMANDS.items():
        add(places[words.rpartition(" ")[0]])
    return parser


if __name__ == "__main__":
    main()
