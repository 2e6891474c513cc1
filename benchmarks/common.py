"""What the benchmarks share: a process of its own for each figure, its memory, and kogpt2's shape with no words."""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

KOGPT2 = {"vocab_size": 51200, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "pad_token_id": 3}


def run_alone(script: str, *words: object, processes: int = 1, timeout: float | None = None) -> Any:
    """What `script` prints as JSON on its last line, in a process of its own, or in several that know of each other;
    `timeout` is in seconds."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(together if processes > 1 else []), script, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout)
    return json.loads(done.stdout.splitlines()[-1])


def memory(name: str = "VmHWM") -> int:
    """A line of this process's status in bytes: VmRSS is what it holds, VmHWM the most that it has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def machine() -> dict[str, Any]:
    """The processor, and torch's threads."""
    import torch

    info = Path("/proc/cpuinfo")
    models = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    return {"cpu": models[0] if models else platform.machine(), "threads": torch.get_num_threads()}


def write_json(figures: Any, file: str | Path | None) -> None:
    """Write the figures to a file, if one is named."""
    if file:
        Path(file).write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
