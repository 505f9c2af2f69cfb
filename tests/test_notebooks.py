"""The notebooks: their files are those of their masters, their shape is the one that readers learn, and running one is
what `notebooks/build.py` says: from top to bottom, strictly, without a network.

That the cells themselves run is proved by `notebooks/build.py --execute`, a part of `.ci/run`.
"""

import importlib.util
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ldm.lab.check import all_exercises

ROOT = Path(__file__).parent.parent
NAMES = [
    "00_one_picture", "01_words", "02_latents", "03_noise", "04_unet", "05_attention", "06_guidance", "07_samplers",
    "08_from_a_picture", "09_controlnet",
]  # fmt: skip
HEADINGS = ["Predict", "Derive", "Build", "Run", "Break it", "Your turn", "The same on a real model", "Where it lives"]


@pytest.fixture(scope="session")
def build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------- those we have


def test_the_generated_notebooks_are_those_of_their_masters(build, capsys):
    assert build.check() == 0, capsys.readouterr().err


def test_there_are_ten(build):
    assert [path.stem for path in build.masters()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_has_the_shape_that_readers_learn(name):
    book = jupytext.read(ROOT / "notebooks" / "masters" / f"{name}.py")
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    places = [next((k for k, line in enumerate(found) if line.startswith(heading)), None) for heading in HEADINGS]
    assert None not in places and places == sorted(places), found
    assert book.cells[0].source.startswith(f"# {name[:2]} · ") and "**" in book.cells[0].source  # title and question
    assert r"\tag{1}" in text
    assert any("real-model" in cell.metadata.get("tags", []) for cell in book.cells)


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_is_asked_once_and_its_solution_hidden(build, name):
    master = ROOT / "notebooks" / "masters" / f"{name}.py"
    for student in (False, True):
        cells = [cell for cell in build.view(master, student).cells if "exercise" in cell.metadata.get("tags", [])]
        asked = [re.findall(r'^ldm\.check\("(\d\d\.\d)", (\w+)\)$', cell.source, re.MULTILINE) for cell in cells]
        assert [found[0][0] for found in asked] == list(all_exercises(name[:2])) and all(len(f) == 1 for f in asked)
        hidden = [re.search(r"^ +\.\.\.$", cell.source, re.MULTILINE) is not None for cell in cells]
        assert hidden == [student] * len(cells)


@pytest.mark.parametrize("name", NAMES)
def test_code_fits_the_page_and_needs_nothing_but_ldm(build, name):
    for cell in build.view(ROOT / "notebooks" / "masters" / f"{name}.py", False).cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.split("\n"))) <= 100, cell.source
            assert "# fmt:" not in cell.source
            assert not re.search(r"\b(import|from) (diffusers|transformers|requests|urllib)", cell.source), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_links_between_the_notebooks_lead_somewhere(build, name):
    for folder, student in ((ROOT / "notebooks", False), (ROOT / "notebooks" / "student", True)):
        book = build.view(ROOT / "notebooks" / "masters" / f"{name}.py", student)
        text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
        links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
        assert links, "each leads to the next"
        for link in links:
            assert (folder / link).exists(), link


def test_the_readme_counts_the_exercises():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"with {len(all_exercises())} exercises" in text


# ---------------------------------------------------------------------------------------------------- making them


SOLVED = """def f(x):
    # BEGIN SOLUTION
    y = x + 1
    return y
    # END SOLUTION


# BEGIN SOLUTION
z = 3
# END SOLUTION
check(f)"""


def test_both_views_of_a_solution(build):
    assert build.without_solutions(SOLVED) == "def f(x):\n    ...\n\n\n...\ncheck(f)"
    assert build.with_solutions(SOLVED) == "def f(x):\n    y = x + 1\n    return y\n\n\nz = 3\ncheck(f)"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("# BEGIN SOLUTION\nx", "# BEGIN SOLUTION without # END SOLUTION"),
        ("x\n# END SOLUTION", "# END SOLUTION without # BEGIN SOLUTION"),
        ("# BEGIN SOLUTION\n# BEGIN SOLUTION\n# END SOLUTION", "# BEGIN SOLUTION within a solution"),
    ],
)
def test_a_forgotten_marker_is_named(build, tmp_path, source, sentence):
    master = tmp_path / "99_tiny.py"
    master.write_text(f"# %% [markdown]\n# # 99\n\n# %%\n{source}\n")
    with pytest.raises(SystemExit, match=f"99_tiny.py: {sentence}, in the cell that begins"):
        build.view(master, student=True)


TINY = "# %% [markdown]\n# # 99\n\n# %% tags=['exercise']\n# BEGIN SOLUTION\nprint(1)\n# END SOLUTION\n"


@pytest.fixture
def tiny(build, tmp_path, monkeypatch):
    """A project of one small notebook, its views made without running anything."""
    for name, folder in (("HERE", tmp_path), ("MASTERS", tmp_path / "masters"), ("STUDENT", tmp_path / "student")):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(build, name, folder)
    master = tmp_path / "masters" / "99_tiny.py"
    master.write_text(TINY)
    solved = build.view(master, student=False)
    for k, cell in enumerate(cell for cell in solved.cells if cell.cell_type == "code"):
        cell.execution_count = k + 1
    nbformat.write(solved, tmp_path / "99_tiny.ipynb")
    nbformat.write(build.view(master, student=True), tmp_path / "student" / "99_tiny.ipynb")
    return tmp_path


def test_fresh_files_are_no_problem(build, tiny):
    assert build.check() == 0


def changed(path, change):
    book = nbformat.read(path, as_version=4)
    change(book)
    nbformat.write(book, path)


def set_output(book, **what):
    book.cells[-1].outputs = [new_output(**what)]


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("99_tiny.ipynb", lambda b: b.cells[2].update(source="print(2)"), "99_tiny.ipynb is not what its master says"),
        ("99_tiny.ipynb", lambda b: b.cells.pop(0), "99_tiny.ipynb is not what its master says"),
        ("99_tiny.ipynb", lambda b: b.metadata.update(by="hand"), "99_tiny.ipynb is not what its master says"),
        ("99_tiny.ipynb", lambda b: b.cells[1].update(execution_count=7), "99_tiny.ipynb was not run from top to"),
        (
            "99_tiny.ipynb",
            lambda b: set_output(b, output_type="error", ename="E", evalue="", traceback=[]),
            "99_tiny.ipynb holds an error or a warning",
        ),
        (
            "99_tiny.ipynb",
            lambda b: set_output(b, output_type="stream", name="stderr", text="careful"),
            "99_tiny.ipynb holds an error or a warning",
        ),
        (
            "99_tiny.ipynb",
            lambda b: set_output(b, output_type="stream", name="stdout", text="x" * 600_000),
            "99_tiny.ipynb has 6",
        ),
        (
            "student/99_tiny.ipynb",
            lambda b: set_output(b, output_type="stream", name="stdout", text="1"),
            "student/99_tiny.ipynb has outputs",
        ),
        ("student/99_tiny.ipynb", lambda b: b.cells[2].update(source="print(1)"), "student/99_tiny.ipynb is not what"),
    ],
)
def test_what_is_not_up_to_date_is_named(build, tiny, capsys, file, change, sentence):
    changed(tiny / file, change)
    assert build.check() == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(sentence) and said[-1].startswith("Run `python notebooks/build.py`")


def test_missing_and_stray_files_are_named(build, tiny, capsys):
    (tiny / "student" / "99_tiny.ipynb").rename(tiny / "98_other.ipynb")
    assert build.check() == 1
    assert capsys.readouterr().err.splitlines()[:2] == [
        "98_other.ipynb has no master",
        "student/99_tiny.ipynb is missing",
    ]
    with pytest.raises(SystemExit, match="No master begins with 97: there are 99_tiny"):
        build.masters(["97"])


def test_the_button_needs_a_public_address_and_names_the_version(build, tiny, monkeypatch):
    master = tiny / "masters" / "99_tiny.py"
    assert "colab" not in str(build.view(master, student=True))
    install = build.view(master, student=True).cells[1].source
    assert '%pip install -q "ldm-from-scratch[notebooks]==' in install
    monkeypatch.setitem(build.PROJECT, "urls", {"Repository": "https://github.com/some/where"})
    button = build.view(master, student=True).cells[1].source
    version = build.PROJECT["version"]
    place = f"colab.research.google.com/github.com/some/where/blob/v{version}/notebooks/student/99_tiny.ipynb"
    assert place in button


# ---------------------------------------------------------------------------------------------------- running them


def test_a_notebook_runs_from_top_to_bottom_without_a_network(build, tmp_path):
    cells = [
        new_markdown_cell("# words"),
        new_code_cell("import os, socket\nprint(os.environ['LDM_STRICT'])"),
        new_code_cell("socket.create_connection(('127.0.0.1', 9), timeout=1)", metadata={"tags": ["raises-exception"]}),
        new_code_cell("socket.create_connection(('93.184.216.34', 80))"),
        new_code_cell("never = True"),
    ]
    ran = build.run("tiny", new_notebook(cells=cells), strict=True)
    assert len(ran.problems) == 1 and "the notebook asked for the network: 93.184.216.34" in ran.problems[0]
    code = [cell for cell in ran.book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, None]
    assert code[0].outputs[0].text == "1\n" and code[1].outputs[0].ename == "ConnectionRefusedError"
    assert 0 < ran.slowest < ran.seconds


def test_failing_and_slow_notebooks_are_named(build, tiny, monkeypatch, capsys):
    master = tiny / "masters" / "99_tiny.py"
    monkeypatch.setattr(build, "INSTALL", "pass")
    monkeypatch.setattr(
        build,
        "run_all",
        lambda jobs, processes: [
            build.Ran(name, 301.0, 3.0, ("it broke",) * strict, book) for name, book, strict, _ in jobs
        ],
    )
    assert build.execute([master], 1) == 1
    assert capsys.readouterr().err.splitlines() == [
        "99_tiny: it broke",
        "99_tiny is too slow: at most 300 s, 60 s a cell",
        "student/99_tiny is too slow: at most 300 s, 60 s a cell",
    ]


def with_lines(text):
    """A notebook whose two cells printed this."""
    cells = [new_code_cell("a", outputs=[new_output("stream", name="stdout", text=text)])]
    return new_notebook(cells=[*cells, new_code_cell("b", metadata={"tags": ["clock"]})])


@pytest.mark.parametrize(
    ("old", "new", "fresh"),
    [
        ("loss 0.50\na boat\n", "loss 0.51\na boat\n", True),
        ("loss 0.50\na boat\n", "loss 0.70\na boat\n", False),
        ("loss 0.50\na boat\n", "loss 0.50\na fish\n", False),
        ("one\n", "one\ntwo\n", False),
        ("line\n" * 20 + "a boat\n", "line\n" * 20 + "a fish\n", True),  # one in twenty may tip over
        ("line\n" * 5 + "a boat\n", "line\n" * 5 + "a fish\n", False),
    ],
)
def test_outputs_of_other_code_are_noticed(build, tiny, old, new, fresh):
    nbformat.write(with_lines(old), tiny / "99_tiny.ipynb")
    found = build.drifted(build.Ran("99_tiny", 1.0, 1.0, (), with_lines(new)))
    assert (found == []) == fresh and all("not today's" in each for each in found)


def test_a_clock_s_outputs_may_change(build, tiny):
    old, new = with_lines("a\n"), with_lines("a\n")
    for book, text in ((old, "3 ms"), (new, "700 ms")):
        book.cells[1].outputs = [new_output("stream", name="stdout", text=text)]
    nbformat.write(old, tiny / "99_tiny.ipynb")
    assert build.drifted(build.Ran("99_tiny", 1.0, 1.0, (), new)) == []


def test_a_kernel_that_dies_is_a_problem_of_its_notebook(build):
    ran = build.run("tiny", new_notebook(cells=[new_code_cell("import os; os._exit(1)")]), strict=False)
    assert len(ran.problems) == 1 and "died" in ran.problems[0]


def test_wrong_options_of_the_builder_are_refused(build, capsys):
    for wrong in (["--processes", "0"], ["--check", "06"]):
        with pytest.raises(SystemExit):
            build.main(wrong)
    assert "--processes is 1 or more" in capsys.readouterr().err


def test_what_fails_strictly_is_not_written(build, tiny, monkeypatch, capsys):
    """The older file stays; a good one is written with its outputs, both views of it."""
    master = tiny / "masters" / "99_tiny.py"
    monkeypatch.setattr(build, "INSTALL", "pass")
    master.write_text(TINY + "\n# %%\nimport ldm\nldm.check('06.1', lambda u, c, s: c)\n")
    before = (tiny / "99_tiny.ipynb").read_bytes()
    assert build.build([master], 1) == 1
    assert "06.1" in capsys.readouterr().err and (tiny / "99_tiny.ipynb").read_bytes() == before
    master.write_text(TINY)
    assert build.build([master], 1) == 0 and build.check() == 0
    assert nbformat.read(tiny / "99_tiny.ipynb", as_version=4).cells[-1].outputs[0].text == "1\n"


# ---------------------------------------------------------------------------------------------------- for graders


@pytest.fixture(scope="session")
def export(build):
    """`export.py` imports its neighbour by its name."""
    sys.modules["build"] = build
    spec = importlib.util.spec_from_file_location("export", ROOT / "notebooks" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build"]


def exported(export, grader, folder):
    assert export.main([grader, str(folder), "06"]) == 0
    return nbformat.read(folder / "06_guidance" / "06_guidance.ipynb", as_version=4).cells


def test_otter_finds_question_solution_and_test_of_each_exercise(export, tmp_path):
    cells = exported(export, "otter", tmp_path)
    assert cells[0].source.startswith("# ASSIGNMENT CONFIG\nname: 06_guidance")
    raw = [cell.source.split("\n")[0] for cell in cells[1:] if cell.cell_type == "raw"]
    one = ["# BEGIN QUESTION", "# BEGIN SOLUTION", "# END SOLUTION", "# BEGIN TESTS", "# END TESTS", "# END QUESTION"]
    assert raw == one * 4
    at = next(k for k, cell in enumerate(cells) if cell.source.startswith("# BEGIN QUESTION\nname: q06_1"))
    card, _, answer, _, _, test = cells[at + 1 : at + 7]
    assert "### Exercise 06.1" in card.source
    assert answer.source.startswith("def cfg") and "# BEGIN SOLUTION" in answer.source
    assert test.source == 'ldm.check("06.1", cfg)'
    assert test.outputs[0].text == "✅ 06.1 (cfg(uncond, cond, s)): right.\n"


def test_nbgrader_finds_an_answer_to_clear_and_a_locked_check_with_a_point(export, tmp_path):
    cells = [cell for cell in exported(export, "nbgrader", tmp_path) if "nbgrader" in cell.metadata]
    fields = [cell.metadata["nbgrader"] for cell in cells]
    assert [each["grade_id"] for each in fields] == [
        f"{kind}-06-{k}" for k in range(1, 5) for kind in ("answer", "check")
    ]
    for cell, each in zip(cells, fields, strict=True):
        graded = each["grade_id"].startswith("check")
        assert (each["grade"], each["locked"], each["solution"]) == (graded, graded, not graded)
        assert each.get("points") == (1 if graded else None)
        assert cell.source.endswith(", strict=True)") if graded else "### END" not in cell.source
    assert "# END SOLUTION" in cells[0].source and cells[1].source == 'ldm.check("06.1", cfg, strict=True)'


def test_an_exercise_without_its_check_is_refused(export):
    with pytest.raises(SystemExit, match="An exercise's cell must end with its check: 'y'"):
        export.parts(new_code_cell("x\ny"))


def test_the_instructors_page_adds_the_cards_up():
    """Minutes of exercises: 25 for 00 and 06, 55 for 04, as said there."""
    words = {"five": 5, "ten": 10, "fifteen": 15}
    minutes = {}
    for name in NAMES:
        text = (ROOT / "notebooks" / "masters" / f"{name}.py").read_text(encoding="utf-8").replace("\n# ", " ")
        minutes[name[:2]] = sum(words[each] for each in re.findall(r"importance \d of 5, (\w+) minutes", text))
    assert minutes["00"] == minutes["06"] == min(minutes.values()) == 25
    assert minutes["04"] == max(minutes.values()) == 55
    page = (ROOT / "notebooks" / "INSTRUCTORS.md").read_text(encoding="utf-8")
    assert "exercises take 25 minutes (00, 06) to 55 (04)" in page and "<!--" not in page
