"""`kochat doctor`: what this machine has for a run, before anything is started on it.

A check imports what it asks about by itself, so what is broken costs its own line and no other. Nothing is downloaded
or written. No finding names a person, a machine or a folder: all of it can be pasted into a report of a bug.
"""

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

TESTED = Path(__file__).parents[3] / "constraints.txt"  # which an installed wheel doesn't have
GB = 2**30
ONE_ROW, AS_CONFIGURED = 6, 8  # GB of a GPU in bf16, or of memory in float32, for configs/kogpt2 (docs/hardware.md)
DISK = 2  # GB for kogpt2: its weights and the merged model are 0.5 each, the rest is room for checkpoints
OFF_BY = {"int8": 0.05, "nf4": 0.2}  # at most, of the float result's norm; working kernels are off by 0.01 and 0.1
HUB_SECONDS = 3

# The sentence of kogpt2's model card, and its tokens.
CHECK = "안녕하세요. 한국어 GPT-2 입니다.😤:)l^o"
CHECK_TOKENS = ["▁안녕", "하", "세", "요.", "▁한국어", "▁G", "P", "T", "-2", "▁입", "니다.", "😤", ":)", "l^o"]

INSTALL = "install the project anew: make setup, or pip install -e . -c constraints.txt"
REPAIR = "see it whole with: python -c 'import {}'. If that doesn't say what to do, " + INSTALL
Mark = Literal["ok", "note", "problem"]
Results = Iterator[tuple[Mark, str, str]]  # what was found, and what to do where it isn't ok


@dataclass(frozen=True)
class Finding:
    """A line of what `kochat doctor` says."""

    check: str
    mark: Mark
    found: str
    advice: str


def examine(tokenizer: str) -> list[Finding]:
    """Every finding about this machine. `tokenizer`: a folder with kogpt2's, or its name in the Hub's cache."""
    checks: tuple[tuple[str, Callable[[], Results], str], ...] = (  # with what to do if it raises
        ("Python", _python, INSTALL),
        ("packages", _packages, INSTALL),
        ("GPU", _gpu, REPAIR.format("torch")),
        ("precision", _precision, REPAIR.format("kochat_trl.settings.parse")),
        ("int8", partial(_quantized, "int8"), REPAIR.format("bitsandbytes")),
        ("nf4", partial(_quantized, "nf4"), REPAIR.format("bitsandbytes")),
        ("tokenizer", partial(_tokenizer, tokenizer), "remove its files, and download or copy them again"),
        ("memory", _memory, INSTALL),
        ("disk", _disk, "start in a folder that you can read and write"),
        ("Hub", _hub, INSTALL),
    )
    findings = []
    with redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):  # what libraries say in passing
        for name, check, advice in checks:
            try:
                for result in check():
                    findings.append(Finding(name, *result))
            except Exception as error:
                findings.append(Finding(name, "problem", _told(error), advice))
    return findings


def print_findings(findings: list[Finding], console: Console) -> None:
    """A line each, under it what to do, and at the end what it comes to."""
    table = Table.grid(padding=(0, 2))
    for line in findings:
        style = {"ok": "green", "note": "yellow", "problem": "bold red"}[line.mark]
        table.add_row(Text(line.mark, style), line.check, Text(line.found))
        if line.advice:
            table.add_row("", "", Text(f"→ {line.advice}"))
    console.print(table)
    problems = sum(line.mark == "problem" for line in findings)
    console.print(f"Problems: {problems}." if problems else "No problem.")


def _told(error: Exception) -> str:
    """An error's class and first line, without paths and without the names of the person and the machine."""
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
    home = os.path.expanduser("~")
    text = re.sub(r"(['\"])[^'\"]*[/\\][^'\"]*\1|\S*[/\\]\S*", "…", text.replace(home, "/"))
    names = [Path(home).name, platform.node(), *map(os.environ.get, ("USER", "LOGNAME", "USERNAME"))]
    for name in sorted(filter(None, names), key=len, reverse=True):  # a machine is often called after its person
        text = re.sub(rf"\b{re.escape(name)}\b", "…", text, flags=re.IGNORECASE)
    return text


def _python() -> Results:
    from packaging.specifiers import SpecifierSet

    version, needs = platform.python_version(), metadata.metadata("kochat-trl")["Requires-Python"]
    found = f"{version}, on {platform.system()} {platform.machine()}"
    if SpecifierSet(needs).contains(version, prereleases=True):
        yield "ok", found, ""
    else:
        yield "problem", f"{found}; it has to be {needs}", "make setup PYTHON=/path/to/such/a/python"


def _packages() -> Results:
    """Out of the range that the distribution requires is a problem; within it, but not as tested, a note."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = TESTED.read_text(encoding="utf-8") if TESTED.is_file() else ""
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", pins, flags=re.M))
    fine = []
    for needs in map(Requirement, metadata.requires("kochat-trl") or []):
        if needs.marker and not needs.marker.evaluate({"extra": ""}):
            continue
        try:
            has = Version(metadata.version(needs.name))
        except metadata.PackageNotFoundError:
            yield "problem", f"{needs.name} isn't installed", f'pip install "{needs}"'
            continue
        known = Version(tested.get(needs.name, has.public))
        found = f"{needs.name} {has}"
        if has.public != known.public:
            found += f" is {'older' if has < known else 'newer'} than {known}, which was tested"
        if not needs.specifier.contains(has, prereleases=True):
            yield "problem", f"{found}; it has to be {needs.specifier}", f'pip install "{needs}"'
        elif has.public != known.public:
            yield "note", found, f"nothing, unless something fails with it; then pip install {needs.name}=={known}"
        else:
            fine.append(found)
    yield "ok", f"{'as tested' if tested else 'in range'}: {', '.join(fine)}", ""


def _gpu() -> Results:
    import torch

    cards = f"a card of {AS_CONFIGURED} GB trains kogpt2 as configured, one of {ONE_ROW} GB a row at a time"
    if not torch.cuda.is_available():
        found, advice = "none", cards
        if shutil.which("nvidia-smi"):
            found = f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
            advice = "install a torch for your CUDA (https://pytorch.org), or a newer driver"
        yield "note", f"{found}: the demo runs as it is, kogpt2 trains slowly", advice
    for index in range(torch.cuda.device_count()):
        free, total = (size / GB for size in torch.cuda.mem_get_info(index))
        found = f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GB free"
        if free > AS_CONFIGURED - 1:  # a card of 8 GB has less than that
            yield "ok", found, ""
        else:
            yield "note", f"{found}: {cards}", f"kochat memory configs/kogpt2 --gpu-gb {free:.1f} says what fits"


def _precision() -> Results:
    """As a run chooses it, by what a run imports."""
    from kochat_trl.settings.parse import choose_precision

    values: dict[str, Any] = {"use_cpu": False, "bf16": None, "fp16": False, "dtype": None, "use_peft": True}
    choose_precision(values)
    if values["fp16"]:
        yield "note", "runs use float16: the GPU has no bfloat16", "nothing; if a loss is NaN, bf16: false"
    else:
        yield "ok", f"runs use {values['dtype']}{', as all do without a GPU' if values['use_cpu'] else ''}", ""


def _quantized(kind: str) -> Results:
    """One layer, forwards and backwards to its input, as a LoRA before it needs; against the same in float32."""
    import bitsandbytes as bnb
    import torch

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    random = torch.Generator().manual_seed(0)
    weight, x, ahead = (torch.randn(rows, 256, generator=random) / 16 for rows in (256, 16, 16))
    layer: torch.nn.Module = (
        bnb.nn.Linear8bitLt(256, 256, bias=False, has_fp16_weights=False)
        if kind == "int8"
        else bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=dtype, quant_type="nf4")
    )
    layer.load_state_dict({"weight": weight})
    layer.to(device)  # which quantizes
    inputs = x.to(device, dtype, copy=True).requires_grad_()
    y = layer(inputs)
    (gradient,) = torch.autograd.grad(y, inputs, ahead.to(y))
    exact = {"outputs": (y.detach(), x @ weight.T), "gradients": (gradient, ahead @ weight)}
    off = {what: float((ours.cpu().float() - its).norm() / its.norm()) for what, (ours, its) in exact.items()}
    shown = ", ".join(f"{what} {by:.1%}" for what, by in off.items())
    found = f"on the {'CPU' if device == 'cpu' else 'GPU'}, off float32: {shown} (below {OFF_BY[kind]:.0%} is normal)"
    if all(0 < by < OFF_BY[kind] for by in off.values()):  # which NaN isn't, nor 0, of weights that stayed float
        yield "ok", found, ""
    else:
        key = "load_in_8bit" if kind == "int8" else "load_in_4bit"
        yield "problem", found, f"don't train with {key}; try another version of bitsandbytes, or a newer driver"


def _tokenizer(path: str) -> Results:
    from huggingface_hub import try_to_load_from_cache

    cached = None
    with suppress(ValueError):  # a folder that isn't there has a name that the Hub can't have
        cached = f"{path}/-" if Path(path).is_dir() else try_to_load_from_cache(path, "tokenizer.json")
    if not isinstance(cached, str):
        get = "the first run downloads skt/kogpt2-base-v2; or copy its files into a folder, for model_name_or_path"
        yield "note", "kogpt2's isn't on this machine; the demo makes its own", get
        return
    from kochat_trl.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(Path(cached).parent.resolve()))  # a folder: nothing is downloaded
    tokens = tokenizer.tokenize(CHECK)
    if tokens == CHECK_TOKENS:
        yield "ok", f"kogpt2's, and it reads Korean right: {' '.join(tokens)}", ""
    elif re.search("[가-힣]", "".join(tokens)) and not set(CHECK_TOKENS) <= tokenizer.get_vocab().keys():
        yield "note", "reads Korean, but isn't kogpt2's", "nothing, if it belongs to another base"
    else:
        mend = "take kogpt2's tokenizer.json from the Hub, with no tokenizer_config.json: AutoTokenizer spoils it"
        yield "problem", f"turns Korean into bytes, or into other tokens than kogpt2's: {' '.join(tokens[:8])} …", mend


def _memory() -> Results:
    import psutil

    total, free = psutil.virtual_memory().total / GB, psutil.virtual_memory().available / GB
    found = f"{free:.1f} of {total:.1f} GB available"
    if total < 2:
        yield "problem", found, "take a machine with more: the libraries and the demo alone need 2 GB"
    elif free < AS_CONFIGURED:
        found += f"; kogpt2 without a GPU takes up to {AS_CONFIGURED} GB"
        yield "note", found, "close what you can, or set per_device_train_batch_size: 1 where there is no GPU"
    else:
        yield "ok", found, ""


def _disk() -> Results:
    folder = Path("outputs") if Path("outputs").is_dir() else Path()
    free = shutil.disk_usage(folder).free / GB
    found = f"{free:.1f} GB free for outputs; kogpt2 takes about {DISK} GB, with its download"
    if not os.access(folder, os.W_OK):
        yield "problem", "nothing can be written to outputs", "start in a folder of your own"
    elif free < DISK:
        yield "problem" if free < 0.2 else "note", found, "make room, or set output_dir to a folder on another disk"
    else:
        yield "ok", found, ""


def _hub() -> Results:
    from huggingface_hub import constants, get_session

    local = "folders on this machine work, as model_name_or_path and as data"
    if constants.HF_HUB_OFFLINE:
        yield "note", "not asked: HF_HUB_OFFLINE is set", f"unset it to download; {local}"
        return
    answers = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).status_code)

    asking = Thread(target=ask, daemon=True)  # looking up a name may take longer than any timeout
    asking.start()
    asking.join(HUB_SECONDS + 1)
    if answers and answers[0] < 500:
        yield "ok", "reachable", ""
    else:
        yield "note", "not reachable", f"{local}; HF_HUB_OFFLINE=1 spares the waiting for what is in the cache"
