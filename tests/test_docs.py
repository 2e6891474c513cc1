"""What the documents name exists: files, names in them, commands, targets, keys; and their tables are the code's."""

import ast
import re
import runpy
import tomllib
from functools import cache
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
ARCHITECTURE = ROOT / "docs/architecture.md"
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = ("kochat_trl", "recipes", "scripts", "configs", "docs", "tests", "benchmarks")
FILES = [file for place in PLACES for file in sorted((ROOT / place).rglob("*.*")) if "__pycache__" not in file.parts]
SOURCES = [file for file in FILES if file.suffix == ".py"]


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


def test_the_tables_of_names_and_shapes_are_those_that_are_read_by():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    tables = runpy.run_path(str(ROOT / "scripts/tables.py"))["data"]
    for name, table in tables():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in text, f"run: python scripts/tables.py data  ({name})"


def test_the_table_of_commands_names_them_all():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    parser = make_parser()
    data = parser._subparsers._group_actions[0].choices["data"]
    assert all(f"`kochat data {name} " in text for name in data._subparsers._group_actions[0].choices)


# --- What they name -----------------------------------------------------------------------------


@cache
def names_in(file: Path) -> set[str]:
    """Functions, classes, constants and fields that a file defines; a method also as Class.method."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for part in ast.iter_child_nodes(node):
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", part)]
            for name in [getattr(target, "id", None) or getattr(target, "name", None) for target in targets]:
                if isinstance(name, str):
                    found |= {name, f"{owner}{name}"}
    return found


def place_of(path: str) -> Path | None:
    """A file or folder by its path from the root or in the package, or by its name alone."""
    places = [ROOT / path, ROOT / "kochat_trl" / path] + ([] if "/" in path else [f for f in FILES if f.name == path])
    return next((place for place in places if place.exists()), None)


def text_of(path: Path) -> str:
    """A document, but what the changelog says is gone."""
    return path.read_text(encoding="utf-8").partition("### Removed")[0]


def code_in(path: Path) -> list[str]:
    """The texts between backticks, without the blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(path), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_file_and_folder_named_is_there(path):
    text = text_of(path)
    named = {
        found.rstrip(".") for found in re.findall(rf"(?<![\w/.-])(?:{'|'.join(PLACES)})/[\w./-]*", text, flags=re.A)
    }
    named |= {code.partition(": ")[0] for code in code_in(path) if re.match(r"[\w./]+\.py(?:: |$)", code)}
    if path == ARCHITECTURE:
        named |= {code for code in code_in(path) if re.fullmatch(r"[\w/.]+/", code)}
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    gone = [name for name in sorted(named) if not place_of(name)]
    assert gone + [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_name_said_to_be_in_a_file_is_in_it(path):
    """`file.py: one, two`; "`file.py`의 `name`"; "`file.py`, `name`"."""
    text = text_of(path)
    pairs = re.findall(r"`([\w./]+\.py): ([^`]+)`", text)
    pairs += re.findall(r"`([\w./]+\.py)`(?:의|,) `([A-Za-z_.]+)`", text)
    named = [(file, name) for file, names in pairs for name in names.split(", ") if not name.endswith(".py")]
    assert len(named) >= {"architecture.md": 60, "course.md": 3, "ppo.md": 1}.get(path.name, 0)
    assert [f"{file}: {name}" for file, name in named if name not in names_in(place_of(file))] == []


def test_architecture_names_no_function_that_is_gone():
    known = set().union(*map(names_in, SOURCES)) | {"pytest"}
    known |= set(re.findall(r'"([\w.]+)"', "".join(file.read_text(encoding="utf-8") for file in SOURCES)))
    words = [code.lstrip("@") for code in code_in(ARCHITECTURE) if re.fullmatch(r"@?[A-Za-z_]+(\.[a-z_]+)?", code)]
    assert len(words) >= 10
    assert [word for word in words if not (word in known or place_of(word) or place_of(f"configs/{word}"))] == []


def test_architecture_has_every_room_and_every_file():
    """The two tables of rooms, and `__init__.py`, which says what its room is for."""
    named = set()
    for room, files in re.findall(r"^\| `([\w/]+)/` \|[^|]*\|(.*)\|$", text_of(ARCHITECTURE), flags=re.M):
        named |= {place_of(room) / file for file in re.findall(r"`([\w.]+\.\w+)`", files)}
    package = ROOT / "kochat_trl"
    there = {file for file in FILES if package in file.parents}
    rooms = {file for file in there if file.name == "__init__.py"}
    assert named == (there - rooms) | set((ROOT / "recipes").glob("*.py"))
    assert [room for room in rooms if not ast.get_docstring(ast.parse(room.read_text(encoding="utf-8")))] == []


def test_the_table_of_equations_names_functions():
    rows = re.findall(r"^\| .* \| ((?:`\w+`(?:, )?)+) \|.*\|$", text_of(ROOT / "docs/ppo.md"), flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 9
    assert named <= names_in(ROOT / "kochat_trl/ppo/objective.py")


def test_the_new_places_in_the_changelog_are_there():
    """`kochat_trl.old` → `kochat_trl.new`, a folder, a module or a name in one; other names are in one of the new."""
    text = text_of(ROOT / "CHANGELOG.md")
    cells = re.findall(r"^ *\| `kochat_trl.*\| (.*`kochat_trl.*) \|$", text, flags=re.M)
    assert len(cells) >= 13
    for cell in cells:
        modules, names = [], set()
        for name in re.findall(r"`([\w.]+)`", cell):
            path = name.replace(".", "/")
            if not name.startswith("kochat_trl."):
                names.add(name)
            elif place := place_of(path) or place_of(f"{path}.py"):
                modules.append(place)
            else:
                modules.append(ROOT / path.rpartition("/")[0] / "__init__.py")
                names.add(name.rpartition(".")[2])
        files = [place / "__init__.py" if place.is_dir() else place for place in modules]
        texts = "".join(file.read_text(encoding="utf-8") for file in files)
        assert [name for name in names if not re.search(rf"(class|def|import) (\w+, )*{name}\b", texts)] == [], cell


def test_what_runs_elsewhere_is_what_a_contributor_runs():
    """The targets of .ci/run are those of the workflow, and the ruff before a commit is the one of `make check`."""
    targets = re.findall(r"^make .*", (ROOT / ".ci/run").read_text(), flags=re.M)
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == targets
    assert set(targets) <= {
        f"make {name}" for name in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    }
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [".venv/bin/ruff check --fix", ".venv/bin/ruff format"]
    assert all(f"`{target}`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") for target in targets)


def test_the_citation_is_the_package_s():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [citation[key] for key in ("version", "license", "type")] == [
        project["version"],
        project["license"],
        "software",
    ]
