"""Make a virtual environment with the lower bound of every dependency, over the one that runs this.

    .venv/bin/python scripts/oldest.py .venv/oldest  # then .venv/oldest/bin/python -m pytest: `make test-oldest`

What needn't be older is that of the outer one: the tools, and torch, each version of which takes gigabytes.
"""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bounds() -> list[str]:
    """`name==lower` for each `name>=lower,<upper` that people install, `app` among it, but for torch."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    listed = project["dependencies"] + project["optional-dependencies"]["app"]
    return [re.sub(r">=([^,]+).*", r"==\1", each) for each in listed if not each.startswith("torch>=")]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    venv.create(folder, clear=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *lower_bounds()], check=True)
