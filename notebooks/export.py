"""Notebooks for graders: each exercise's answer and its check in cells of their own, as otter or nbgrader want them.

    python notebooks/export.py otter assignments/ 06        one folder a notebook, for `otter assign`
    python notebooks/export.py nbgrader source/ 05 06       one folder a notebook, for `nbgrader generate_assignment`

The check that grades is the reader's own, `ldm.check`; readers' seeds come from LDM_READER, which a grader may set.
Neither grader is needed to read or to write these files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import build
import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output, new_raw_cell

from ldm.io.atomic import atomic_file
from ldm.lab.check import RIGHT, Verdict, find, line_of


def parts(cell: NotebookNode) -> tuple[str, str, str]:
    """An exercise's cell: the answer with its markers, the check, the exercise's name ("06.1")."""
    lines = cell.source.rstrip().split("\n")
    if not lines[-1].startswith("ldm.check("):
        raise SystemExit(f"An exercise's cell must end with its check: {lines[-1]!r}")
    name = lines[-1].split('"')[1]
    return "\n".join(lines[:-1]).rstrip(), lines[-1], name


def exercise(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and "exercise" in cell.metadata.get("tags", [])


def for_otter(book: NotebookNode, stem: str) -> None:
    """Raw cells around each question, its solution and its test (otter-grader's format of notebooks, version 7)."""
    cells = [new_raw_cell(f"# ASSIGNMENT CONFIG\nname: {stem}\nrun_tests: false")]
    for cell in book.cells:
        if not exercise(cell):
            cells.append(cell)
            continue
        answer, check, name = parts(cell)
        ask = cells.pop()  # the card above the cell belongs to the question
        question = "q" + name.replace(".", "_")
        cells += [
            new_raw_cell(f"# BEGIN QUESTION\nname: {question}\npoints: 1"),
            ask,
            new_raw_cell("# BEGIN SOLUTION"),
        ]
        cells += [
            new_code_cell(answer),
            new_raw_cell("# END SOLUTION"),
            new_raw_cell("# BEGIN TESTS"),
        ]
        # otter compares what a test prints with what it printed for the solution.
        said = new_output("stream", name="stdout", text=line_of(name, find(name).asks, Verdict(RIGHT, "right.")) + "\n")
        cells += [new_code_cell(check, outputs=[said]), new_raw_cell("# END TESTS"), new_raw_cell("# END QUESTION")]
    book.cells = cells


def for_nbgrader(book: NotebookNode, stem: str) -> None:
    """nbgrader's metadata (schema 3): an answer's cell that is cleared, a locked one with a point behind it."""
    cells = []
    for cell in book.cells:
        if not exercise(cell):
            cells.append(cell)
            continue
        answer, check, name = parts(cell)
        for kind, source in (("answer", answer), ("check", check[:-1] + ", strict=True)")):
            graded = kind == "check"
            fields = {
                "grade": graded,
                "solution": not graded,
                "locked": graded,
                "task": False,
                "schema_version": 3,
            }
            fields |= {
                "grade_id": f"{kind}-{name.replace('.', '-')}",
                **({"points": 1} if graded else {}),
            }
            cells.append(new_code_cell(source, metadata={"nbgrader": fields}))
    book.cells = cells


def export(master: Path, grader: str, folder: Path) -> Path:
    """Write one notebook for a grader, `folder`/NN_name/NN_name.ipynb, and say where."""
    book = jupytext.reads(master.read_text(encoding="utf-8"), fmt="py:percent")
    book.cells.insert(1, new_code_cell(build.INSTALL))
    {"otter": for_otter, "nbgrader": for_nbgrader}[grader](book, master.stem)
    for k, cell in enumerate(book.cells):
        cell.source = build.FORMATTER.sub("", cell.source)
        cell["id"] = f"cell-{k:03d}"
    book.metadata = NotebookNode({"kernelspec": build.KERNEL, "language_info": {"name": "python"}})
    book.nbformat, book.nbformat_minor = 4, 5
    path = folder / master.stem / f"{master.stem}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w") as file:
        file.write(nbformat.writes(book, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grader", choices=("otter", "nbgrader"))
    parser.add_argument("folder", type=Path, help="where the notebooks are written")
    parser.add_argument("numbers", nargs="*", help="of notebooks: 06, or more of the name; all, if left out")
    args = parser.parse_args(argv)
    for master in build.masters(args.numbers):
        print(export(master, args.grader, args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
