"""Processes that know of each other, as a launcher starts them, forked from one that has the libraries imported."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.ppo", "recipes.dpo", "transformers.models.gpt2.modeling_gpt2"])


def in_processes(count: int, logs: Path, function: Callable[..., None], *arguments: object) -> None:
    """Call a function of a module in so many processes. What they say is in `<logs>-<number>.log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [logs.with_name(f"{logs.name}-{number}.log") for number in range(count)]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    forks = []
    for number, file in enumerate(files):
        environment = shared | {"RANK": number, "LOCAL_RANK": number} if count > 1 else {}
        forks.append(FORKS.Process(target=_call, args=(file, environment, function, arguments)))
        forks[-1].start()
    for fork in forks:
        fork.join(180)
        fork.kill()
        fork.join()
    said = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [fork.exitcode for fork in forks] == [0] * count, said


def _call(file: Path, environment: dict[str, object], function: Callable[..., None], arguments: tuple) -> None:
    with file.open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ |= {name: str(value) for name, value in environment.items()}
    function(*arguments)
