"""The commands in the two READMEs are the same, and every file, target and key they name exists."""

import re
from itertools import permutations
from pathlib import Path

from kochat_trl.cli.main import make_parser
from kochat_trl.data.rankings import ranking_tiers, tier_pairs
from kochat_trl.desk.curation.faults import FAULTS
from kochat_trl.settings.parse import parse_arguments
from tests.tiny import ROOT

import pytest
import yaml

READMES = [ROOT / "README.md", ROOT / "README.ko.md"]


def blocks(path: Path) -> list[tuple[str, str]]:
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text, flags=re.M | re.S)
    return [(language, re.sub(r"^ +", "", content, flags=re.M)) for language, content in found]


def test_both_languages_give_the_same_commands():
    english, korean = (blocks(path) for path in READMES)
    assert english == korean
    assert len(english) >= 6


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.name)
def test_what_a_command_names_is_there(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", " ".join(re.findall(r"`[^`\n]+`", text))))
    commands = "".join(content for language, content in blocks(path) if language == "bash")
    named |= set(re.findall(r"^make ([a-z-]+)", commands, flags=re.M))
    assert {"demo", "test", "setup", "check", "test-slow"} <= named <= targets
    files = set(re.findall(r"\b(?:recipes|scripts|configs)/[\w/]+\.\w+", text))
    assert len(files) >= 5
    assert all((ROOT / file).is_file() for file in files)


def test_the_experiment_shown_is_the_one_in_the_repository():
    shown = next(content for language, content in blocks(READMES[0]) if language == "yaml")
    path = ROOT / "configs/experiments/kl_k3.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load(path.read_text(encoding="utf-8"))
    args = parse_arguments("ppo", str(path), [])
    assert (args.training.kl_estimator, args.training.num_ppo_epochs) == ("k3", 2)


def test_recipes_stay_short():
    """The promise that a recipe is read in one go."""
    for recipe in (ROOT / "recipes").glob("*.py"):
        assert len(recipe.read_text(encoding="utf-8").splitlines()) < 150


def test_the_table_of_readings_is_what_the_code_does():
    """All six permutations under both readings; 4 of their 18 pairs are upside down under `rank_of`."""
    rows, turned = [], 0
    for ranking in map(list, permutations(range(3))):
        ours, theirs = (tier_pairs(ranking_tiers(ranking, 3, order)) for order in ("best_first", "rank_of"))
        cells = [", ".join(f"{pair.better} > {pair.worse}" for pair in pairs) for pairs in (ours, theirs)]
        upside_down = sorted({pair[:2] for pair in ours} - {pair[:2] for pair in theirs})
        turned += len(upside_down)
        marked = ", ".join(f"{better} > {worse}" for better, worse in upside_down)
        rows.append(f"| {ranking} | {cells[0]} | {cells[1]} | {f'**{marked}**' if marked else '–'} |")
    assert turned == 4
    assert "\n".join(rows) in (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_the_table_of_faults_is_the_one_that_clean_uses():
    star = r" (\*)"
    rows = [f"| `{f.name}`{'' if f.default else star} | {f.level} | {f.says} | {f.fix} |" for f in FAULTS.values()]
    assert "\n".join(rows) in (ROOT / "docs/data.md").read_text(encoding="utf-8")


def test_the_table_of_commands_names_them_all():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    parser = make_parser()
    data = parser._subparsers._group_actions[0].choices["data"]
    assert all(f"`kochat data {name} " in text for name in data._subparsers._group_actions[0].choices)
