"""Where one stands: the folder, other packages of our name, and the environment's variables."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from ldm.doctor import machine
from ldm.doctor.lines import BROKEN, LACKS, PACKAGE, Line, checkout, current, python, quoted, unset

DISTRIBUTION = "ldm-from-scratch"


def places(
    paths: Sequence[str] = sys.path,
    here: Path | None = None,
    owners: Callable[[], Mapping[str, list[str]]] = metadata.packages_distributions,
    variables: Mapping[str, str] = os.environ,
) -> Iterator[Line]:
    """The folder one stands in, and other packages of our name: there are several (on PyPI, and CompVis's code)."""
    here = here or current()
    if here is None:
        fault = "The current folder has been deleted: nothing can be written there."
        yield Line("current folder", "deleted", BROKEN, fault, f"cd {quoted(Path.home())}")
        return
    yield writable(here)
    others = [name for name in dict.fromkeys(owners().get("ldm", [])) if name.lower() != DISTRIBUTION]
    for name in others:
        fault = f"Another package that is imported as ldm is installed ({name}): Python finds the one or the other."
        fault += "" if checkout() else " When it is gone, install ours again, for they share a folder."
        yield Line("other ldm", name, LACKS, fault, f"{python()} -m pip uninstall -y {quoted(name)}")
    for folder in dict.fromkeys(Path(path or here).resolve() for path in (here, *paths)):
        # A folder without __init__.py, as in CompVis's repository, gives way to a package further down the path.
        found = next((p for p in (folder / "ldm" / "__init__.py", folder / "ldm.py") if p.is_file()), None)
        if found is None or found.parent == PACKAGE or others:
            continue
        if (folder / "ldm" / "doctor" / "places.py").is_file():
            yield Line("other ldm", f"{found}, a second copy of ours")
        elif folder == here.resolve():
            fault = f"A different ldm lies in the current folder, where Python looks first: {found}."
            yield Line("other ldm", str(found), LACKS, fault, f"cd {quoted(PACKAGE.parent)}")
        else:
            fault = f"A different ldm lies where Python looks for packages, and may be found instead of ours: {found}."
            told = variables.get("PYTHONPATH", "").split(os.pathsep)
            mend = unset("PYTHONPATH") if folder in (Path(path).resolve() for path in told if path) else away(found)
            yield Line("other ldm", str(found), LACKS, fault, mend)


def away(found: Path) -> str:
    """The line that gives a package, known by its file, another name."""
    old = found.parent if found.name == "__init__.py" else found
    return f"{'move' if sys.platform == 'win32' else 'mv'} {quoted(old)} {quoted(f'{old}-other')}"


def writable(here: Path) -> Line:
    try:
        with tempfile.TemporaryFile(dir=here):  # no permission bits: whoever is root has all
            return Line("current folder", str(here))
    except OSError as error:
        fault = f"Nothing can be written in the current folder, {here}: {error.strerror}."
        return Line("current folder", f"{here}, not writable", BROKEN, fault, f"cd {quoted(Path.home())}")


OURS = re.compile(r"(OMP|MKL|OPENBLAS)_NUM_THREADS$|(LDM|HF|HUGGINGFACE|PYTORCH|TORCH|CUDA|NVIDIA|CUBLAS|MPS)_")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def environment(variables: Mapping[str, str] = os.environ, cores: int | None = None) -> Iterator[Line]:
    """The variables that change how things go; those that are secrets are not shown."""
    cores = machine.cores() if cores is None else cores
    found = {name: variables[name] for name in sorted(variables) if OURS.match(name)}
    if not found:
        yield Line("variables", "none that matter")
    for name, value in found.items():
        line = Line(name, "set, not shown" if SECRET.search(name) else value)
        if name in THREADS and value.isdigit() and 0 < int(value) != cores:
            many = "leaves cores idle" if int(value) < cores else "makes threads wait for each other"
            fault = f"{name} is {value} on {cores} cores, which {many}."
            line = Line(name, f"{value}, of {cores} cores", LACKS, fault, unset(name))
        elif name in ("LDM_WEIGHTS", "LDM_SD15") and not Path(value).is_dir():
            fault = f"{name} names {value}, which is no folder."
            line = Line(name, f"{value}, no such folder", LACKS, fault, unset(name))
        yield line
