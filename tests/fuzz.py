"""Does any file hurt? Spoiled files by the hundred thousand, read in a process that watches itself.

    python tests/fuzz.py                                   100,000 inputs, all kinds, one process, at most an hour
    python tests/fuzz.py --inputs 2000 --seed 7            a sample; the same seed makes the same inputs
    python tests/fuzz.py --only pickle --keep /tmp/found   one kind; inputs that were found bad are kept there
    python tests/fuzz.py --one 4711                        that input alone, with its traceback

Each input must be read, or end in one LDMError of one sentence: within a second of processor time, with less than
300 MB more memory than before, and nothing written, executed, compiled, imported,
connected to or started. A worker that dies is a finding too; its successor goes on behind the input that killed it.
Exit status 1 if anything was found.
"""

import argparse
import codecs
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_SECONDS, MOST_MEGABYTES, MOST_SILENCE = 1.0, 300, 120  # of the processor; of growth; of the clock, for one input
MOST_LETTERS = 2000  # of a sentence
EVENTS = {  # that no reading of a file may cause (`sys.addaudithook`)
    "exec", "compile", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "shutil.rmtree", "shutil.move", "shutil.copyfile", "subprocess.Popen", "socket.connect", "socket.bind",
    "ctypes.dlopen", "pickle.find_class", "marshal.loads", "code.__new__", "urllib.Request", "webbrowser.open",
}  # fmt: skip


class Hangs(BaseException):
    """Not an Exception: nothing on the way may catch it."""


# ---------------------------------------------------------------------------------------------------- one input


class Watch:
    """What happens while an input is read: hooks can't be taken back, so they ask whether it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)
        signal.signal(signal.SIGPROF, self.late)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes:
                self.seen.append(f"open {path!r} for writing")
        elif event == "import" and arguments[0] not in sys.modules:
            self.seen.append(f"import {arguments[0]}")
        elif event in EVENTS:
            self.seen.append(f"{event} {str(arguments)[:100]}")

    def late(self, *_: Any) -> None:
        raise Hangs

    def run(self, read: Callable[[], Any]) -> str:
        """How it ended: "read", "refused", or what is wrong."""
        from ldm.errors import LDMError

        self.seen = []
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        self.on = True
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                read()
            end = "read" if told.getvalue().replace("\n", "").isprintable() else f"said {told.getvalue()[:300]!r}"
        except LDMError as error:
            said = str(error)
            whole = said.isprintable() and len(said) <= MOST_LETTERS and said.endswith((".", "?", ")"))
            end = "refused" if whole else f"no sentence: {said[:300]!r}"
        except Hangs:
            end = f"more than {MOST_SECONDS} s"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            end = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:100]!r}"
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        return f"caused {self.seen[0]}" if self.seen else end


def memory(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process in MB; 0 where there is no /proc."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith(field)), 0.0)
    except OSError:
        return 0.0


def forget_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def make(kinds: dict, seed: int, number: int) -> tuple[str, bytes]:
    """The input of that number: its kind and content."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choices(list(kinds), [kind.weight for kind in kinds.values()])[0]
    return name, kinds[name].spoil(rng, rng.choice(kinds[name].sound))


def work(options: argparse.Namespace) -> None:
    """Inputs from `first` on, a line of JSON each on stdout."""
    import warnings

    from fuzz_targets import targets  # and with it torch, which the supervisor can do without

    warnings.simplefilter("ignore")
    scratch = Path(tempfile.mkdtemp(prefix="ldm-fuzz-"))
    try:
        os.chdir(scratch)
        kinds = targets(scratch)
        kinds = {name: kind for name, kind in kinds.items() if not options.only or name in options.only}
        watch = Watch()
        for codec in ("raw_unicode_escape", "unicode_escape"):  # of opcodes that are refused once they are spelt out
            codecs.lookup(codec)
        for kind in kinds.values():  # what is imported on first use is imported now
            for content in kind.sound:
                kind.place.write_bytes(content)
                with contextlib.redirect_stderr(io.StringIO()):
                    kind.read(kind.place)
        for number in range(options.first, options.inputs):
            name, content = make(kinds, options.seed, number)
            kind = kinds[name]
            kind.place.write_bytes(content)
            print(json.dumps([number, name]), flush=True)  # before: if it kills, it is known which
            forget_peak()
            before, began = memory("VmRSS"), time.process_time()
            if options.trace:
                kind.read(kind.place)
            end = watch.run(lambda kind=kind: kind.read(kind.place))
            spent, grown = time.process_time() - began, memory("VmHWM") - before
            if grown > MOST_MEGABYTES and end in ("read", "refused"):
                end = f"more than {MOST_MEGABYTES} MB"
            if options.keep and end not in ("read", "refused"):
                Path(options.keep, f"{options.seed}-{number}-{name}").write_bytes(content)
            print(json.dumps([number, name, end, round(spent, 4), round(grown, 1)]), flush=True)
            kind.place.write_bytes(kind.sound[0])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- the run


class Report:
    def __init__(self) -> None:
        self.ends: collections.Counter = collections.Counter()
        self.found: list[tuple] = []
        self.slowest, self.largest = (0.0, -1, ""), (0.0, -1, "")
        self.began = time.monotonic()

    def add(self, number: int, name: str, end: str, spent: float = 0.0, grown: float = 0.0) -> None:
        self.ends[name, end if end in ("read", "refused") else "FOUND"] += 1
        if end not in ("read", "refused"):
            self.found.append((number, name, end))
        self.slowest = max(self.slowest, (spent, number, name))
        self.largest = max(self.largest, (grown, number, name))

    def show(self) -> None:
        total, seconds = self.ends.total(), time.monotonic() - self.began
        for name in sorted({name for name, _ in self.ends}):
            read, refused, bad = (self.ends[name, end] for end in ("read", "refused", "FOUND"))
            print(f"{name:12} {read + refused + bad:7} inputs {read:7} read {refused:7} refused {bad:5} found")
        print(f"{total} inputs in {seconds:.0f} s ({total / max(seconds, 1e-9):.0f} a second), {len(self.found)} found")
        print(f"slowest: {self.slowest[0]:.2f} s (input {self.slowest[1]}, {self.slowest[2]})")
        print(f"most memory: {self.largest[0]:.0f} MB more (input {self.largest[1]}, {self.largest[2]})")
        kinds = collections.Counter(f"{name}: {end}" for _, name, end in self.found)
        firsts = {f"{name}: {end}": number for number, name, end in reversed(self.found)}
        for what, count in kinds.most_common(40):
            print(f"FOUND {count} times, first in input {firsts[what]}: {what}")


def supervise(options: argparse.Namespace) -> Report:
    """Start workers until all inputs are done or the time is up."""
    report, first = Report(), options.first
    while first < options.inputs and time.monotonic() - report.began < options.seconds:
        words = [sys.executable, __file__, "--work", "--first", str(first), "--inputs", str(options.inputs)]
        words += ["--seed", str(options.seed), *(["--only", *options.only] if options.only else [])]
        words += ["--keep", str(options.keep)] if options.keep else []
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as worker:
            current = None
            signal.signal(signal.SIGALRM, lambda *_, worker=worker: worker.kill())
            for line in worker.stdout or ():
                signal.alarm(MOST_SILENCE)
                number, name, *outcome = json.loads(line)
                current = (number, name)
                if outcome:
                    report.add(number, name, *outcome)
                    current, first = None, number + 1
                    if number % 10_000 == 9_999:
                        print(f"{number + 1} inputs, {len(report.found)} found", flush=True)
                if time.monotonic() - report.began > options.seconds:
                    worker.kill()
            signal.alarm(0)
        if current is not None and time.monotonic() - report.began < options.seconds:
            report.add(*current, f"the process ended with {worker.returncode}")
            first = current[0] + 1
        elif first < options.inputs and worker.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"The worker ended with {worker.returncode} before its first input.")
    return report


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--inputs", type=int, default=100_000)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seconds", type=float, default=3600)
    p.add_argument("--only", nargs="+", default=[])
    p.add_argument("--keep")
    p.add_argument("--one", type=int)
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = p.parse_args()
    options.trace = options.one is not None
    if options.trace:
        options.first, options.inputs = options.one, options.one + 1
    if options.work or options.trace:
        work(options)
        return 0
    report = supervise(options)
    report.show()
    return int(bool(report.found))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
