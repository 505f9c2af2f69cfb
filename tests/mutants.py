"""Does the suite notice? Plant bugs, one at a time, in a copy of the package, and run the tests that should fail.

    python tests/mutants.py                        every mutant, two at a time; exit code 1 if one survives
    python tests/mutants.py --only vae --jobs 4    those with "vae" in their file, tests or note
    python tests/mutants.py --only 17,30-35        those numbers
    python tests/mutants.py --list

They stand in mutants.txt. A mutant whose text is not found exactly once is an error: whoever changes that line changes
the mutant with it. A bug that is found elsewhere joins the list.
diffusers and transformers are imported once, and ldm compiled once; every run is a fork of this process, in which
pytest loads nothing that these tests don't need: a mutant costs half a second.
"""

import argparse
import compileall
import gc
import importlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TIMEOUT = 600  # seconds; a mutant that hangs is caught
SCHEDULERS = (  # files of diffusers that the sampler tests take seconds to import
    "ddpm", "ddim", "pndm", "euler_discrete", "euler_ancestral_discrete", "heun_discrete", "lms_discrete",
    "k_dpm_2_discrete", "k_dpm_2_ancestral_discrete", "dpmsolver_multistep", "dpmsolver_singlestep", "deis_multistep",
    "unipc_multistep", "lcm", "tcd", "flow_match_euler_discrete", "flow_match_heun_discrete",
)  # fmt: skip
NO_IMPORT = 99  # exit code of a fork whose mutant doesn't even import: a bad mutant


@dataclass(frozen=True)
class Mutant:
    """In `file` (below ldm/), `old` becomes `new`; one of `tests` (files or node ids, below tests/) must then fail."""

    file: str
    old: str
    new: str
    tests: str
    note: str
    equivalent: str = ""  # why no test can see it


def read(text: str) -> list[Mutant]:
    """The mutants of mutants.txt: paragraphs of a note with - and + lines; `file` and `tests` hold until changed."""
    mutants, file, tests = [], "", ""
    for paragraph in text.split("\n\n")[1:]:  # the first one is for the reader
        lines = paragraph.strip("\n").split("\n")
        while lines and lines[0].startswith(("file ", "tests ")):
            word, value = lines.pop(0).split(" ", 1)
            file, tests = (value, tests) if word == "file" else (file, value)
        if not lines:
            continue
        note, *rest = lines
        old, new = ("\n".join(line[2:] for line in rest if line.startswith(sign)) for sign in "-+")
        reasons = [line.removeprefix("equivalent: ") for line in rest if line.startswith("equivalent: ")]
        if not old or len(rest) != len([line for line in rest if line[0] in "-+"]) + len(reasons):
            raise SystemExit(f"mutants.txt: can't read the mutant {note!r}")
        mutants.append(Mutant(file, old, new, tests, note, *reasons))
    return mutants


MUTANTS = read((TESTS / "mutants.txt").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- running them


def compiled(folder: Path) -> Path:
    """A copy of the package in `folder`, compiled."""
    shutil.copytree(ROOT / "ldm", folder / "ldm", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    compileall.compile_dir(folder / "ldm", quiet=2)
    return folder


def plant(mutant: Mutant | None, sound: Path, folder: Path) -> None:
    """Copy the package, which is compiled in `sound`, into `folder`, with the bug."""
    shutil.copytree(sound / "ldm", folder / "ldm")
    (folder / "weights").symlink_to(ROOT / "weights")  # where the copy looks for the embedded model
    if mutant is not None:
        path = folder / "ldm" / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink()  # whatever the clock says: it is another one now


def run_tests(folder: Path, tests: Sequence[str], module: str) -> int:
    """In a fork: pytest's exit code for the copy of the package in `folder`; what it prints goes into `folder`/log."""
    signal.alarm(TIMEOUT if module != "ldm" else 0)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # for programs too
    os.chdir(ROOT)
    import pytest

    with open(folder / "log", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            planted = importlib.import_module(module)
        except Exception as error:
            print(error)
            return NO_IMPORT
        assert Path(planted.__file__).is_relative_to(folder), planted.__file__
        options = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
        options += ["-m", "not slow and not gpu and not weights"]
        return int(pytest.main([*options, "--rootdir", str(ROOT), *(str(TESTS / test) for test in tests)]))


def start(mutant: Mutant | None, sound: Path, tests: Sequence[str]) -> tuple[int, Path, float]:
    """Fork a run: (process id, its folder, when it started)."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-mutant-"))
    plant(mutant, sound, folder)
    module = "ldm" if mutant is None else "ldm." + mutant.file.removesuffix(".py").replace("/", ".")
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            code = run_tests(folder, tests, module)
        finally:
            os._exit(code)  # never back into the parent's stack
    return pid, folder, time.monotonic()


def verdict(status: int, log: str, mutant: Mutant) -> tuple[str, str]:
    """(caught, hung, survived, equivalent or error; which test failed, or what went wrong)."""
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) == signal.SIGALRM
        return ("hung", f"after {TIMEOUT} s") if hung else ("error", f"signal {os.WTERMSIG(status)}")
    code = os.WEXITSTATUS(status)
    if code == 1:
        failed = re.search(r"^(?:FAILED|ERROR) \S*?tests/(\S+)", log, re.MULTILINE)
        where = failed.group(1) if failed else log.strip()[-80:]
        return ("error", f"not equivalent after all: {where}") if mutant.equivalent else ("caught", where)
    if code == 0:
        return ("equivalent", mutant.equivalent) if mutant.equivalent else ("SURVIVED", mutant.tests)
    return "error", f"exit code {code}: {log.strip()[-200:]}"


def run_all(mutants: list[tuple[int, Mutant]], sound: Path, jobs: int) -> list[str]:
    """Print a line for every mutant as it is judged; returns the verdicts."""
    waiting, running, verdicts = list(mutants), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop(0)
            pid, folder, since = start(mutant, sound, mutant.tests.split())
            running[pid] = number, mutant, folder, since
        pid, status = os.wait()
        number, mutant, folder, since = running.pop(pid)
        result, where = verdict(status, (folder / "log").read_text(encoding="utf-8", errors="replace"), mutant)
        shutil.rmtree(folder, ignore_errors=True)
        took = time.monotonic() - since
        print(f"{number:4d} {result:10s} {took:5.1f} s  {mutant.file:18s} {mutant.note:55s} {where}", flush=True)
        verdicts.append(result)
    return verdicts


def preload() -> None:
    """Import what the tests import and takes seconds, so that every fork has it. Never ldm: each fork has its own."""
    sys.path.insert(0, str(TESTS))
    import conftest  # noqa: F401  (the environment that must be set first)
    import torch

    torch.set_num_threads(1)  # a fork of a process that runs threads would wait for them for ever
    import diffusers
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers

    for name in ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler", "DPMSolverMultistepScheduler"):
        getattr(diffusers, name)
    for module in SCHEDULERS:
        importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
    for name in ("CLIPModel", "CLIPTextModel", "CLIPVisionModelWithProjection", "CLIPTokenizer"):
        getattr(transformers, name)
    del sys.modules["conftest"]  # pytest imports it by itself
    gc.freeze()  # pytest collects garbage at its end: not through all that was imported here


def baseline(mutants: list[tuple[int, Mutant]], sound: Path) -> str:
    """What the tests say where they don't pass without any bug; else nothing."""
    tests = sorted({test for _, mutant in mutants for test in mutant.tests.split()})
    _, folder, _ = start(None, sound, [test for test in tests if test.split("::")[0] not in set(tests) - {test}])
    _, status = os.wait()
    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(folder, ignore_errors=True)
    return log if status else ""


def choose(only: str) -> list[tuple[int, Mutant]]:
    """The mutants that `--only` names, with their numbers."""
    numbered = list(enumerate(MUTANTS, start=1))
    if re.fullmatch(r"[\d,-]+", only):
        spans = [part.split("-") for part in only.split(",")]
        return [(n, m) for n, m in numbered if any(int(span[0]) <= n <= int(span[-1]) for span in spans)]
    return [(n, m) for n, m in numbered if only in f"{m.file} {m.tests} {m.note}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="numbers (3,10-12), or text in file, tests or note")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument(
        "--no-baseline", action="store_true", help="don't first check that the tests pass without a bug"
    )
    args = parser.parse_args()
    mutants = choose(args.only)
    if args.list:
        print("\n".join(f"{number:4d} {m.file:18s} {m.note}" for number, m in mutants))
        return 0

    lost = [(n, m) for n, m in mutants if (ROOT / "ldm" / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    for number, mutant in lost:
        print(f"{number:4d} cannot be planted: {mutant.file} doesn't hold exactly once {mutant.old!r}")
    if lost or not mutants:
        return 2

    preload()
    with tempfile.TemporaryDirectory(prefix="ldm-sound-") as home:
        sound = compiled(Path(home))
        if not args.no_baseline and (log := baseline(mutants, sound)):
            print(f"Without any bug the tests don't pass, so they can't judge:\n{log[-2000:]}")
            return 2
        since = time.monotonic()
        verdicts = run_all(mutants, sound, args.jobs)
    count = {name: verdicts.count(name) for name in ("caught", "hung", "equivalent", "SURVIVED", "error")}
    print(", ".join(f"{n} {name}" for name, n in count.items() if n), f"in {time.monotonic() - since:.0f} s")
    return 1 if count["SURVIVED"] or count["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
