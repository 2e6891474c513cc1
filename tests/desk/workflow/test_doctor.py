"""`kochat doctor`: each thing that can be wrong with a machine is made wrong, and its line says so."""

import json
import os
import subprocess
import sys
import threading
import time
from importlib import metadata
from types import SimpleNamespace

from kochat_trl.desk.workflow import doctor
from kochat_trl.models.tokenizer import KOGPT2_SPECIAL_TOKENS
from tests.tiny import ROOT

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

SENTENCE = "안녕하세요. 한국어 GPT-2 입니다.😤:)l^o"
TOKENS = ["▁안녕", "하", "세", "요.", "▁한국어", "▁G", "P", "T", "-2", "▁입", "니다.", "😤", ":)", "l^o"]


def only(results):
    """The one finding of a check."""
    (result,) = results
    return result


def kogpt2_like(folder, pieces, pre_tokenizer=None):
    """A folder laid out as kogpt2 is on the Hub: a tokenizer.json with these pieces, and no tokenizer_config.json."""
    special = list(dict.fromkeys(KOGPT2_SPECIAL_TOKENS.values()))
    vocabulary = [*special, *dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


# --- Tokenizer ----------------------------------------------------------------------------------


def test_kogpt2_s_tokens_are_right(tmp_path):
    mark, found, advice = only(doctor._tokenizer(kogpt2_like(tmp_path / "kogpt2", TOKENS)))
    assert (mark, advice) == ("ok", "")
    assert " ".join(TOKENS) in found


def test_kogpt2_itself_is_right(shared):
    assert only(doctor._tokenizer(str(shared / "kogpt2-tokenizer")))[0] == "ok"


@pytest.mark.parametrize("pieces", [TOKENS, []], ids=["of kogpt2", "of GPT-2"])
def test_a_tokenizer_that_makes_bytes_of_korean_is_a_problem(pieces, tmp_path):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [*pieces, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    mark, found, advice = only(doctor._tokenizer(kogpt2_like(tmp_path / "bytes", pieces, byte_level)))
    assert mark == "problem"
    assert "bytes" in found
    assert "tokenizer.json" in advice


def test_other_tokens_of_kogpt2_s_vocabulary_are_a_problem(tmp_path):
    """Its vocabulary, and a longer piece too: `안녕하` is no token of kogpt2's."""
    assert only(doctor._tokenizer(kogpt2_like(tmp_path / "other", [*TOKENS, "▁안녕하"])))[0] == "problem"


def test_a_base_of_one_s_own_is_a_note(tiny_base):
    mark, found, _ = only(doctor._tokenizer(tiny_base))
    assert mark == "note"
    assert "reads Korean" in found


@pytest.mark.parametrize("path", ["skt/kogpt2-base-v2", "/no/such/folder"])
def test_a_missing_tokenizer_is_a_note_that_says_how_to_get_it(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    mark, found, advice = only(doctor._tokenizer(path))
    assert (mark, "isn't on this machine" in found) == ("note", True)
    assert "skt/kogpt2-base-v2" in advice


def test_the_tokenizer_in_the_hub_s_cache_is_found(tmp_path, monkeypatch):
    repository = tmp_path / "models--skt--kogpt2-base-v2"
    kogpt2_like(repository / "snapshots/abc", TOKENS)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert only(doctor._tokenizer("skt/kogpt2-base-v2"))[0] == "ok"


# --- Packages and Python ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "mark", "says", "does"),
    [
        ("bitsandbytes", "0.44.1", "problem", "older than 0.50.2, which was tested; it has to be", "pip install"),
        ("transformers", "6.0.0", "problem", "newer than 5.23.0", 'pip install "transformers'),
        ("trl", "1.14.0", "note", "newer than 1.12.0, which was tested", "trl==1.12.0"),
        ("rich", "99.0", None, "rich 99.0", ""),  # no version of it is pinned
        ("torch", "2.13.0+cu130", None, "torch 2.13.0+cu130", ""),  # a build, not a version
    ],
)
def test_a_version_is_judged_by_the_range_and_by_what_was_tested(name, version, mark, says, does, monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda asked: version if asked == name else installed(asked))
    *odd, (last, fine, _) = [result for result in doctor._packages() if name in result[1] or result[0] == "ok"]
    assert last == "ok"
    assert [result[0] for result in odd] == [mark] * (mark is not None)
    found, advice = odd[0][1:] if mark else (fine, "")
    assert says in found
    assert does in advice


def test_a_missing_package_is_a_problem(monkeypatch):
    installed = metadata.version

    def without(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", without)
    assert ("problem", "peft isn't installed") in [result[:2] for result in doctor._packages()]
    assert not any("pytest" in result[1] for result in doctor._packages())  # for those who work on the project


def test_an_old_python_is_a_problem(monkeypatch):
    assert only(doctor._python())[0] == "ok"
    monkeypatch.setattr("platform.python_version", lambda: "3.10.14")
    mark, found, _ = only(doctor._python())
    assert mark == "problem"
    assert ">=3.11" in found


# --- int8 and nf4 -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_layer_that_works_is_ok(kind):
    mark, found, _ = only(doctor._quantized(kind))
    assert mark == "ok", found


@pytest.mark.parametrize(("kind", "layer"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
@pytest.mark.parametrize("wrong", ["outputs", "gradients", "NaN", "not quantized"])
def test_wrong_numbers_are_a_problem(kind, layer, wrong, monkeypatch):
    import bitsandbytes as bnb

    right = getattr(bnb.nn, layer).forward

    def forward(self, x):
        y = right(self, x)
        if wrong == "outputs":
            return y + 0.3 * y.detach()  # their gradient is right
        if wrong == "gradients":
            return y.detach() + 0.7 * (y - y.detach())
        return y * float("nan")

    if wrong == "not quantized":
        monkeypatch.setattr(bnb.nn, layer, lambda *sizes, **options: torch.nn.Linear(*sizes, bias=False))
    else:
        monkeypatch.setattr(getattr(bnb.nn, layer), "forward", forward)
    mark, _, advice = only(doctor._quantized(kind))
    assert mark == "problem"
    assert {"int8": "load_in_8bit", "nf4": "load_in_4bit"}[kind] in advice


# --- Machine ------------------------------------------------------------------------------------


def fake_gpu(monkeypatch, free, bf16):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (free * 2**30, 8 * 2**30))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "A card")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)


def test_a_gpu_and_its_precision(monkeypatch):
    fake_gpu(monkeypatch, 7.5, bf16=True)
    assert only(doctor._gpu()) == ("ok", "A card, 7.5 of 8.0 GB free", "")
    assert only(doctor._precision()) == ("ok", "runs use bfloat16", "")
    fake_gpu(monkeypatch, 5.5, bf16=False)
    mark, found, advice = only(doctor._gpu())
    assert (mark, "A card" in found, "--gpu-gb 5.5" in advice) == ("note", True, True)
    mark, found, _ = only(doctor._precision())
    assert (mark, "float16" in found) == ("note", True)


@pytest.mark.parametrize("driver", [None, "/usr/bin/nvidia-smi"])
def test_no_gpu_is_a_note_that_says_what_it_means(driver, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: driver)
    mark, found, advice = only(doctor._gpu())
    assert (mark, "kogpt2 trains slowly" in found) == ("note", True)
    assert ("install a torch" in advice) == ("driver" in found) == (driver is not None)
    assert only(doctor._precision())[:2] == ("ok", "runs use float32, as all do without a GPU")


@pytest.mark.parametrize(
    ("total", "free", "mark"), [(1.5, 1, "problem"), (16, 3, "note"), (16, 12, "ok")], ids=["tiny", "in use", "free"]
)
def test_memory(total, free, mark, monkeypatch):
    memory = SimpleNamespace(total=total * 2**30, available=free * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    assert only(doctor._memory())[0] == mark


@pytest.mark.parametrize(("free", "mark"), [(0.1, "problem"), (1, "note"), (50, "ok")])
def test_disk_where_outputs_go(free, mark, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    sizes = {"outputs": free * 2**30, ".": 0}  # of two disks
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=sizes[str(folder)]))
    assert only(doctor._disk())[0] == mark
    monkeypatch.setattr("os.access", lambda folder, how: False)
    assert only(doctor._disk())[0] == "problem"


def test_offline_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked"))
    mark, found, _ = only(doctor._hub())
    assert (mark, "HF_HUB_OFFLINE is set" in found) == ("note", True)


def test_the_hub_answers_or_not(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_SECONDS", -0.5)  # and a second more
    answers = {"200": "ok", "404": "ok", "503": "note", "refused": "note", "late": "note"}

    def head(url, timeout):
        if answer == "late":
            threading.Event().wait(5)
        return SimpleNamespace(status_code=int(answer))  # ValueError, if it is refused

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    started = time.monotonic()
    for answer, mark in answers.items():
        found = only(doctor._hub())
        assert found[0] == mark, answer
        assert mark == "ok" or "HF_HUB_OFFLINE=1" in found[2]
    assert time.monotonic() - started < 4


# --- The whole ----------------------------------------------------------------------------------


def test_a_check_that_raises_is_its_own_line_only(monkeypatch, capsys):
    def breaks():
        print("noise")
        yield "ok", "this much", ""
        raise OSError("cannot open '/home/someone/x.so'")

    for name in ("_python", "_packages", "_gpu", "_precision", "_quantized", "_tokenizer", "_memory", "_hub"):
        monkeypatch.setattr(doctor, name, lambda *given: iter([("ok", "fine", "")]))
    monkeypatch.setattr(doctor, "_disk", breaks)
    findings = doctor.examine("skt/kogpt2-base-v2")
    assert [line.mark for line in findings if line.check == "disk"] == ["ok", "problem"]
    assert [line.found for line in findings].count("fine") == 9
    (broken,) = [line for line in findings if line.mark == "problem"]
    assert broken.found == "OSError: cannot open …"
    assert broken.advice
    assert capsys.readouterr().out == ""  # which is the command's own


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("/data/a.b/lib.so: cannot open", "… cannot open"),
        ("no file '/data/A Person/a b/c' there", "no file … there"),
        (r"C:\Users\gildong\x is gone", "… is gone"),
        ("of /srv/my home/gildong, no: home", "of … no: home"),
        ("gildong@gildong-laptop refuses gildong1\n/data/x", "…@… refuses gildong1"),
        ("GILDONG may not", "… may not"),  # Windows takes names in any case
        ("no module named 'kernels'", "no module named 'kernels'"),
        ("", ""),
    ],
)
def test_an_error_is_told_without_names_and_paths(message, told, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/my home/gildong")
    monkeypatch.setenv("USER", "gildong")
    monkeypatch.setattr("platform.node", lambda: "gildong-laptop")
    assert doctor._told(OSError(message)) == f"OSError: {told}"


def test_a_folder_named_without_a_path_is_not_told(tmp_path, monkeypatch):
    folder = tmp_path / "secret_project"
    folder.mkdir()
    Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    monkeypatch.chdir(tmp_path)
    (told,) = [line for line in doctor.examine("secret_project") if line.check == "tokenizer"]
    assert told.mark == "problem"
    assert told.found.startswith("UserError: the tokenizer at …")


def run_doctor(folder, *words, **variables):
    """`kochat doctor` in a process of its own, for the person and on the machine of `folder`."""
    path = os.pathsep.join([str(folder / "path"), str(ROOT)])
    home = {"HOME": str(folder / "gildong"), "USER": "gildong", "LOGNAME": "gildong"}
    rest = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment = rest | home | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-m", "kochat_trl.cli.main", "doctor", *words]
    return subprocess.run(command, cwd=folder / "gildong", env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("broken", ["bitsandbytes", "torch"])
def test_what_cannot_be_imported_costs_its_lines_only(broken, tmp_path):
    """A package that is there, breaks while it is imported, and names the person's folder as it does."""
    package = tmp_path / "path" / broken
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError(f'no kernel in {__file__}, nor in /home/gildong/lib')")
    (tmp_path / "path" / f"{broken}-0.0.1.dist-info").mkdir()
    (tmp_path / "path" / f"{broken}-0.0.1.dist-info/METADATA").write_text(f"Name: {broken}\nVersion: 0.0.1\n")
    kogpt2 = tmp_path / "gildong/models/skt/kogpt2"
    kogpt2_like(kogpt2, TOKENS)
    (kogpt2 / "tokenizer.json").write_text("{")
    done = run_doctor(tmp_path, "--json", "--tokenizer", str(kogpt2))
    findings = json.loads(done.stdout)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    marks = {}
    for line in findings:
        assert list(line) == ["check", "mark", "found", "advice"]
        assert line["mark"] == "ok" or line["advice"]
        marks.setdefault(line["check"], []).append(line["mark"])
    for check in ("int8", "nf4", "packages", "tokenizer"):
        assert "problem" in marks[check]
    assert [marks["Python"], marks["Hub"]] == [["ok"], ["note"]]
    assert "problem" not in marks["memory"] + marks["disk"]
    assert ("problem" in marks["GPU"]) == (broken == "torch")
    told = next(line["found"] for line in findings if line["check"] == "int8")
    assert "ImportError: no kernel in" in told
    assert any(f"{broken} 0.0.1 is older than" in line["found"] for line in findings)
    for secret in ("gildong", str(tmp_path), str(ROOT)):
        assert secret not in done.stdout


def test_exit_status_and_lines_of_the_command(kochat, monkeypatch):
    lines = [doctor.Finding("GPU", "note", "none [b]", "buy one"), doctor.Finding("disk", "ok", "9 GB", "")]
    monkeypatch.setattr(doctor, "examine", lambda tokenizer: lines)
    code, printed = kochat("doctor")
    assert code == 0
    assert [line.split() for line in printed.splitlines()] == [
        ["note", "GPU", "none", "[b]"],
        ["→", "buy", "one"],
        ["ok", "disk", "9", "GB"],
        ["No", "problem."],
    ]
    lines.append(doctor.Finding("Hub", "problem", "x", "y"))
    code, printed = kochat("doctor")
    assert (code, "Problems: 1." in printed) == (1, True)
    code, printed = kochat("doctor", "--json")
    assert (code, json.loads(printed)[2]["mark"]) == (1, "problem")
