"""Make a virtual environment that has the lower bound of every dependency, over the one that runs this.

    .venv/bin/python scripts/oldest.py .venv/oldest   # `make test-oldest` runs tests in it

All that needn't be older is the outer one's, torch (gigabytes) among it.
"""

import argparse
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bounds() -> list[str]:
    """`name==version` for each `name>=version` that a user installs: the dependencies but torch, and the extra `app`."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    bounds = []
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["app"]):
        (lower,) = (part.version for part in requirement.specifier if part.operator == ">=")
        requirement.specifier = type(requirement.specifier)(f"=={lower}")
        bounds.append(str(requirement))
    return [bound for bound in bounds if not bound.startswith("torch==")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where it is made, again where it is there already")
    folder = parser.parse_args().folder
    venv.create(folder, clear=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *lower_bounds()], check=True)
