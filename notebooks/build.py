"""Make the notebooks from their masters, prove that they are up to date, run them all.

    python notebooks/build.py [06 ...]            write the student's view and the executed solutions of these (or all)
    python notebooks/build.py --check             are the generated files those of the masters? nothing is run
    python notebooks/build.py --execute [06 ...]  run solutions (strictly) and student's views (unfilled), offline

A master is a Python file in jupytext's percent format, `masters/NN_name.py`. What stands between `# BEGIN SOLUTION` and
`# END SOLUTION` is replaced by `...` for students. `NN_name.ipynb` holds the solutions and their outputs,
`student/NN_name.ipynb` neither. Whoever edits a master runs the first command; nobody edits a generated file.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import metadata
from itertools import zip_longest
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from ldm.io.atomic import atomic_file

HERE = Path(__file__).resolve().parent
MASTERS, STUDENT = HERE / "masters", HERE / "student"
META = metadata("ldm-from-scratch")
PROJECT = {
    "name": META["Name"],
    "version": META["Version"],
    "urls": dict(each.split(", ", 1) for each in META.get_all("Project-URL") or ()),
}
BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
MOST_BYTES = 500_000  # of a generated notebook
MOST_CELL, MOST_NOTEBOOK = 60, 300  # seconds, on two cores
STAND_INS = {"LDM_SD15": "scenes", "LDM_SD15_CANNY": "scenes-canny"}  # variable: an embedded model
FORMATTER = re.compile(r"  # fmt: \w+$", re.MULTILINE)  # remarks to a tool, not to a reader
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

INSTALL = f"""# Where ldm is installed, this does nothing. (The package called "ldm" on PyPI is another one.)
try:
    from ldm.lab import figures
except ImportError:
    %pip install -q "{PROJECT["name"]}[notebooks]=={PROJECT["version"]}"
    from ldm.lab import figures"""

# A notebook that asks for the network is broken: it will fail one day in somebody's classroom.
OFFLINE = """
import socket as _socket
def _offline(what):
    raise OSError(f"the notebook asked for the network: {what}")
_look_up = _socket.getaddrinfo
def _local(host):
    return str(host) in ("127.0.0.1", "localhost", "::1")
def _guarded(connect):
    def guarded(self, address):
        here = self.family == getattr(_socket, "AF_UNIX", None) or _local(address[0])
        return connect(self, address) if here else _offline(address)
    return guarded
_socket.socket.connect = _guarded(_socket.socket.connect)
_socket.socket.connect_ex = _guarded(_socket.socket.connect_ex)
_socket.getaddrinfo = lambda host, *more, **named: _look_up(host, *more, **named) if _local(host) else _offline(host)
"""


# ---------------------------------------------------------------------------------------------------- views


def masters(wanted: Sequence[str] = ()) -> list[Path]:
    """The masters, or those whose names begin with one of the wanted numbers."""
    found = sorted(MASTERS.glob("[0-9][0-9]_*.py"))
    chosen = [path for path in found if not wanted or path.stem.startswith(tuple(wanted))]
    if not chosen:
        raise SystemExit(f"No master begins with {' or '.join(wanted)}: there are {', '.join(p.stem for p in found)}.")
    return chosen


def without_solutions(source: str) -> str:
    """The student's cell: every marked region becomes `...`, as far indented as its first marker."""
    kept, inside = [], False
    for line in source.split("\n"):
        if line.strip() == BEGIN:
            if inside:
                raise ValueError(f"{BEGIN} within a solution")
            inside = True
            kept.append(line.replace(BEGIN, "..."))
        elif line.strip() == END:
            if not inside:
                raise ValueError(f"{END} without {BEGIN}")
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise ValueError(f"{BEGIN} without {END}")
    return "\n".join(kept)


def with_solutions(source: str) -> str:
    """The solution's cell: the markers go."""
    return "\n".join(line for line in source.split("\n") if line.strip() not in (BEGIN, END))


def view(master: Path, student: bool) -> NotebookNode:
    """One of the two notebooks of a master, not executed."""
    book = jupytext.reads(master.read_text(encoding="utf-8"), fmt="py:percent")
    change = without_solutions if student else with_solutions
    for cell in book.cells:
        if cell.cell_type == "code":
            try:
                cell.source = FORMATTER.sub("", change(cell.source))
            except ValueError as error:
                raise SystemExit(f"{master.name}: {error}, in the cell that begins {cell.source[:60]!r}") from None
        elif student:  # it lies one folder deeper, beside the other students' views
            cell.source = cell.source.replace("](README.md)", "](../README.md)")
    place = f"notebooks/student/{master.stem}.ipynb" if student else f"notebooks/{master.stem}.ipynb"
    head = [new_markdown_cell(badge(place))] if badge(place) else []
    book.cells[1:1] = [*head, new_code_cell(INSTALL)]
    for k, cell in enumerate(book.cells):
        cell["id"] = f"cell-{k:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
    book.metadata = NotebookNode({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    book.nbformat, book.nbformat_minor = 4, 5
    return book


def badge(place: str) -> str:
    """A button that opens the notebook of this version in Colab; nothing while the project has no public address."""
    home = PROJECT.get("urls", {}).get("Repository", "")
    if not home.startswith("https://github.com/"):
        return ""
    link = f"{home.replace('https://', 'https://colab.research.google.com/')}/blob/v{PROJECT['version']}/{place}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


# ---------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Ran:
    """A notebook that was run: its seconds, those of its slowest cell, and what went wrong."""

    name: str
    seconds: float
    slowest: float
    problems: tuple[str, ...]
    book: NotebookNode


def run(name: str, book: NotebookNode, strict: bool, stand_in: bool = False) -> Ran:
    """Execute a notebook in a kernel of its own, from top to bottom, without a network.

    `stand_in`: the embedded models take the places of the real ones, so that the cells for these are run as well.
    """
    models = {name: str(HERE.parent / "weights" / folder) if stand_in else "" for name, folder in STAND_INS.items()}
    told = {"LDM_STRICT": str(int(strict)), "LDM_READER": "reader", "OMP_NUM_THREADS": "1"}
    book.cells.insert(0, new_code_cell(OFFLINE))
    client = NotebookClient(
        book,
        timeout=10 * MOST_CELL,
        resources={"metadata": {"path": str(HERE)}},
        extra_arguments=["--log-level=40"],  # errors alone: the kernel's own remarks are nobody's business
    )
    began, problems = time.monotonic(), ()
    try:
        client.execute(env=os.environ | models | told)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        problems = (re.sub(r"\x1b\[[0-9;]*m", "", str(error)),)
    seconds, slowest = time.monotonic() - began, 0.0
    book.cells.pop(0)
    for k, cell in enumerate(cell for cell in book.cells if cell.cell_type == "code"):
        if cell.execution_count is not None:
            cell.execution_count = k + 1  # as if the hidden first cell had not been
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = k + 1
        slowest = max(slowest, took(cell))
        cell.metadata.pop("execution", None)
    book.metadata = NotebookNode({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return Ran(name, seconds, slowest, problems, book)


def took(cell: NotebookNode) -> float:
    """Seconds that a cell ran."""
    times = cell.metadata.get("execution", {})
    ends = [times.get(key) for key in ("iopub.execute_input", "shell.execute_reply")]
    if None in ends:
        return 0.0
    start, end = (datetime.fromisoformat(str(each).replace("Z", "+00:00")) for each in ends)
    return (end - start).total_seconds()


def run_all(jobs: list[tuple[str, NotebookNode, bool, bool]], processes: int) -> list[Ran]:
    """Run notebooks beside each other, and print a line for each as it ends."""
    done = []
    with ThreadPoolExecutor(processes) as pool:
        for ran in pool.map(run, *zip(*jobs, strict=True)):
            mark = "FAILED" if ran.problems else "ok"
            print(
                f"{ran.name:36} {ran.seconds:6.1f} s, slowest cell {ran.slowest:5.1f} s  {mark}",
                flush=True,
            )
            done.append(ran)
    return done


# ---------------------------------------------------------------------------------------------------- commands


def build(paths: list[Path], processes: int) -> int:
    """Write both views of these masters."""
    STUDENT.mkdir(exist_ok=True)
    ran = run_all([(path.stem, view(path, student=False), True, False) for path in paths], processes)
    for path, one in zip(paths, ran, strict=True):
        if not one.problems:
            for folder, book in ((HERE, one.book), (STUDENT, view(path, student=True))):
                with atomic_file(folder / f"{path.stem}.ipynb", "w") as file:
                    file.write(nbformat.writes(book, indent=1) + "\n")
    return complain([f"{one.name}: {problem}" for one in ran for problem in one.problems])


def stale(master: Path) -> list[str]:
    """What is not up to date, too large or not whole in the notebooks of a master."""
    found = []
    for student, folder in ((False, HERE), (True, STUDENT)):
        path = folder / f"{master.stem}.ipynb"
        name = path.relative_to(HERE)
        if not path.exists():
            found.append(f"{name} is missing")
            continue
        book, fresh = nbformat.read(path, as_version=4), view(master, student)
        bare = [{k: v for k, v in cell.items() if k not in ("outputs", "execution_count")} for cell in book.cells]
        wanted = [{k: v for k, v in cell.items() if k not in ("outputs", "execution_count")} for cell in fresh.cells]
        if bare != wanted or book.metadata != fresh.metadata:
            found.append(f"{name} is not what its master says")
        if path.stat().st_size > MOST_BYTES:
            found.append(f"{name} has {path.stat().st_size} bytes, more than {MOST_BYTES}")
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        if student and any(cell.outputs or cell.execution_count for cell in code):
            found.append(f"{name} has outputs")
        if not student and [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
            found.append(f"{name} was not run from top to bottom")
        outputs = [output for cell in code for output in cell.outputs]
        if any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs):
            found.append(f"{name} holds an error or a warning")
    return found


def check() -> int:
    known = {path.stem for path in masters()}
    strays = [p for p in (*HERE.glob("*.ipynb"), *STUDENT.glob("*.ipynb")) if p.stem not in known]
    problems = [f"{path.relative_to(HERE)} has no master" for path in strays]
    for master in masters():
        problems += stale(master)
    if problems:
        problems.append(
            "Run `python notebooks/build.py` (or with the number of one notebook) and commit what it writes."
        )
    return complain(problems)


def execute(paths: list[Path], processes: int) -> int:
    """Run solutions, where every check must say right, and student's views, where nothing may stop."""
    jobs = [(path.stem, view(path, student=False), True, True) for path in paths]
    jobs += [(f"student/{path.stem}", view(path, student=True), False, False) for path in paths]
    ran = run_all(jobs, processes)
    slow = [one for one in ran if one.slowest > MOST_CELL or one.seconds > MOST_NOTEBOOK]
    problems = [f"{one.name}: {problem}" for one in ran for problem in one.problems]
    problems += [f"{one.name}.ipynb {found}" for one in ran[: len(paths)] for found in drifted(one)]
    problems += [f"{one.name} is too slow: at most {MOST_NOTEBOOK} s, {MOST_CELL} s a cell" for one in slow]
    return complain(problems)


def printed(book: NotebookNode) -> list[str]:
    """The lines that the cells printed, but for those of a clock (tag "clock") and of a real model."""
    lines = []
    for cell in book.cells:
        if cell.cell_type == "code" and not {"clock", "real-model"} & set(cell.metadata.get("tags", [])):
            streams = [output.text for output in cell.outputs if output.output_type == "stream"]
            lines += "".join(streams).splitlines()
    return lines


def alike(a: str, b: str) -> bool:
    """Whether two lines say the same, their numbers about: other machines round otherwise."""
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
    near = all(abs(float(x) - float(y)) <= 0.02 + 0.05 * abs(float(x)) for x, y in pairs)
    return near and NUMBER.sub("#", a).split() == NUMBER.sub("#", b).split()


def drifted(ran: Ran) -> list[str]:
    """What is wrong with the outputs that a solution's file holds: those of other code than there is now."""
    path = HERE / f"{ran.name}.ipynb"
    if ran.problems or not path.exists():
        return []
    old, new = printed(nbformat.read(path, as_version=4)), printed(ran.book)
    other = [(a, b) for a, b in zip_longest(old, new, fillvalue="") if not alike(a, b)]
    if len(other) <= len(new) / 10:  # a reading of a picture may tip over on another machine, but not many
        return []
    return [f"holds outputs that are not today's, such as {other[0][0]!r}, now {other[0][1]!r}: build it again"]


def complain(problems: list[str]) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="of notebooks: 06, or more of the name; all, if left out")
    parser.add_argument("--check", action="store_true", help="only compare the generated files with the masters")
    parser.add_argument("--execute", action="store_true", help="run both views of each, and write nothing")
    parser.add_argument("--processes", type=int, default=2, help="notebooks run at the same time (default: 2)")
    args = parser.parse_args(argv)
    if args.processes < 1 or (args.check and args.numbers):
        parser.error(
            "--processes is 1 or more" if args.processes < 1 else "--check looks at all: leave the numbers out"
        )
    if args.check:
        return check()
    return (execute if args.execute else build)(masters(args.numbers), args.processes)


if __name__ == "__main__":
    sys.exit(main())
