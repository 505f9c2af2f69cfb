"""`ldm doctor`: every fault is seen, said in a sentence, and has its line; nothing that fails stops the rest.

The machines are made up: their files, programs, packages and cards are what a test says they are.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ldm
from ldm import doctor
from ldm.cli import doctor as command
from ldm.cli import main
from ldm.doctor import devices, drawing, lines, machine, memory, packages, places
from ldm.doctor.lines import BROKEN, LACKS, OK, Line
from ldm.errors import LDMError

ROOT = Path(__file__).parent.parent
GIB = 2**30
TESTED = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "pillow": "13.0.0", "safetensors": "0.8.0", "tqdm": "4.70.1"} | {
    "opencv-python-headless": "5.0.0.93", "matplotlib": "3.11.2", "scipy": "1.17.1", "jupyter": "1.1.1",
    "tokenizers": "0.23.3", "bitsandbytes": "0.50.2",
    "transformers": "5.23.0", "diffusers": "0.42.1", "ftfy": "6.3.1", "huggingface_hub": "2.4.0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_checkout(monkeypatch, tmp_path):
    """Standing in a checkout, with its environment's `python` in front: lines are as short as can be."""
    monkeypatch.setattr(lines, "checkout", lambda: tmp_path)
    monkeypatch.setattr(lines, "python", lambda: "python")
    monkeypatch.setattr(places, "checkout", lambda: tmp_path)
    monkeypatch.setattr(devices, "python", lambda: "python")
    monkeypatch.setattr(places, "python", lambda: "python")
    monkeypatch.chdir(tmp_path)


def only(found, name):
    return next(line for line in found if line.name == name)


def faulty(found):
    return [line for line in found if line.verdict != OK]


# ------------------------------------------------------------------------------------------------------- packages


def test_with_the_tested_versions_nothing_is_lacking():
    found = [*packages.versions(TESTED.get), *packages.optional(TESTED.get)]
    assert not faulty(found) and len(found) == 2 + len(TESTED)
    assert only(found, "torch").text == "2.13.0+cpu" and only(found, "OpenCV").text == "5.0.0.93"


OLD = {"torch": "2.3.1", "numpy": "1.25.2", "pillow": "9.5.0", "safetensors": "0.4.2", "tqdm": "4.59.0"}


@pytest.mark.parametrize("name", OLD)
def test_what_drawing_needs_and_is_missing_or_old_is_broken(name):
    line = only(packages.versions((TESTED | {name: None}).get), name)
    assert line[1:4] == (
        "not installed",
        BROKEN,
        f"{name} is not installed: drawing needs {packages.NEEDED[name]} or newer.",
    )
    old = only(packages.versions((TESTED | OLD).get), name)
    said = f"{name} {OLD[name]} is too old: drawing needs {packages.NEEDED[name]} or newer."
    assert old[1:4] == (f"{OLD[name]}, too old", BROKEN, said)
    assert old.command == line.command == "python -m pip install -c constraints.txt -e ."
    assert len(faulty(packages.versions((TESTED | {name: OLD[name]}).get))) == 1


@pytest.mark.parametrize(
    "distribution, name, fault, wanted",
    [
        ("opencv-python-headless", "OpenCV", "Edges for ControlNets (canny, scribble) need OpenCV", '-e ".[control]"'),
        ("tokenizers", "tokenizers", "FLUX's T5 needs tokenizers", '-e ".[flux]"'),
        (
            "bitsandbytes",
            "bitsandbytes",
            "Weights of 8 and 4 bits (`--quantise`) need bitsandbytes",
            '-e ".[quantise]"',
        ),
        ("matplotlib", "matplotlib", "Plots (`ldm schedule --plot`, `ldm compare-samplers`) need", '-e ".[plots]"'),
        ("scipy", "scipy", "The beta choice of noise levels (`--sigmas beta`) needs scipy", '-e ".[plots]"'),
        ("jupyter", "jupyter", "The notebooks need jupyter", '-e ".[notebooks]"'),
        ("transformers", "transformers", "Depth of photographs (`ldm condition depth`) needs", '-e ".[depth]"'),
        ("diffusers", "diffusers", "`ldm parity` and the tests need diffusers", '-e ".[test]"'),
        ("ftfy", "ftfy", "The repair of broken letters in prompts (`clean='original'`) needs ftfy", '"ftfy>=6"'),
        ("huggingface_hub", "huggingface_hub", "Models from the hub (`ldm fetch`) need", '-e ".[hub]"'),
    ],
)
def test_an_optional_package_that_is_missing_stops_a_feature(distribution, name, fault, wanted):
    (line,) = faulty(packages.optional((TESTED | {distribution: None}).get))
    assert (line.name, line.text, line.verdict) == (name, "not installed", LACKS)
    assert line.fault.startswith(fault) and line.fault.endswith(f"{name}, which is not installed.")
    assert line.command == f"python -m pip install -c constraints.txt {wanted}"


def test_optional_packages_too_old_or_not_proven_against():
    (line,) = faulty(packages.optional((TESTED | {"scipy": "1.10.1"}).get))
    assert line.fault == "The beta choice of noise levels (`--sigmas beta`) needs scipy 1.11 or newer, not 1.10.1."
    (line,) = faulty(packages.optional((TESTED | {"diffusers": "0.40.0"}).get))
    assert line.fault.startswith("ldm was proven against diffusers 0.42.1, not 0.40.0")
    assert line.command == "python -m pip install -c constraints.txt diffusers==0.42.1" and line.verdict == LACKS


def test_opencv_has_four_names():
    for name in packages.OPENCV:
        versions = {**TESTED, "opencv-python-headless": None, name: "4.9.0.80"}
        assert only(packages.optional(versions.get), "OpenCV").text == "4.9.0.80"


@pytest.mark.parametrize(
    "version, least, expected",
    [("2.13.0+cpu", "2.4", False), ("2.4", "2.4.0", False), ("2.4.0a0+git1", "2.4", False), ("2.3.9", "2.4", True),
     ("10", "9.9.9", False), ("0.4.2", "0.4.3", True), ("0.4", "0.4.3", True), ("4.9.0.80", "4.10", True),
     ("unknown", "1", True)],
)  # fmt: skip
def test_versions_are_compared_as_numbers(version, least, expected):
    assert packages.older(version, least) is expected


def test_the_tables_say_what_the_project_s_files_say():
    project, pins = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt"))
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    assert dict(re.findall(r'"([\w-]+)>=([\d.]+)"', needed)) == packages.NEEDED
    for each in packages.OPTIONAL:
        if each.extra:
            wanted = re.search(rf"^{each.extra} = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)[1]
            assert f'"{each.distributions[0]}>={each.least}"' in wanted, each.name
    for name, version in packages.PROVEN.items():
        assert f"\n{name}=={version};" in pins
    assert places.DISTRIBUTION == re.search(r'^name = "(.*)"', project, re.MULTILINE)[1]


# -------------------------------------------------------------------------------------------------- lines for a shell


def test_lines_name_the_checkout_from_elsewhere_and_the_packages_without_one(monkeypatch, tmp_path):
    home = tmp_path / "my ldm"
    monkeypatch.setattr(lines, "checkout", lambda: home)
    start = f'python -m pip install -c "{home}/constraints.txt"'
    assert lines.install(["scipy>=1.11"], "plots") == f'{start} -e "{home}[plots]"'
    assert lines.install(["torch>=2.4"], "") == f'{start} -e "{home}"'
    assert lines.install(["ftfy>=6"]) == f'{start} "ftfy>=6"'
    monkeypatch.setattr(lines, "checkout", lambda: None)
    assert lines.install(["scipy>=1.11", "tqdm"], "plots") == 'python -m pip install "scipy>=1.11" tqdm'


def test_the_interpreter_is_named_as_a_shell_finds_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert lines.python() == "python"
    monkeypatch.setenv("PATH", "/nowhere")
    assert lines.python() == lines.quoted(sys.executable)


def test_a_checkout_is_known_by_its_two_files(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(lines, "PACKAGE", tmp_path / "ldm")
    (tmp_path / "pyproject.toml").touch()
    assert lines.checkout() is None
    (tmp_path / "constraints.txt").touch()
    assert lines.checkout() == tmp_path


# --------------------------------------------------------------------------------------------------------- places


def look_around(here, paths=(), **owners):
    return list(places.places([str(path) for path in paths], here, lambda: owners))


def other(folder, file="ldm/__init__.py"):
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_nothing_is_wrong_with_our_own_package_on_the_path(tmp_path):
    (tmp_path / "code" / "ldm").mkdir(parents=True)  # a folder without __init__.py, as CompVis's, gives way to ours
    paths = ["", tmp_path / "code", lines.PACKAGE.parent, "/nowhere", tmp_path / "lib.zip"]
    assert look_around(tmp_path, paths, ldm=["ldm-from-scratch"]) == [Line("current folder", str(tmp_path))]
    assert look_around(lines.PACKAGE.parent) == [Line("current folder", str(lines.PACKAGE.parent))]
    assert list(tmp_path.glob("*")) == [tmp_path / "code"]  # nothing was left behind


@pytest.mark.parametrize("file", ["ldm/__init__.py", "ldm.py"])
def test_a_different_ldm_is_found_in_the_current_folder_and_on_the_path(tmp_path, file):
    found = other(tmp_path, file)
    (line,) = faulty(look_around(tmp_path, [lines.PACKAGE.parent]))
    assert line.fault == f"A different ldm lies in the current folder, where Python looks first: {found}."
    assert line.command == f"cd {lines.PACKAGE.parent}" and line.verdict == LACKS
    (line,) = faulty(look_around(tmp_path.parent, [lines.PACKAGE.parent, tmp_path, tmp_path]))
    old = tmp_path / Path(file).parts[0]
    assert line.fault.startswith("A different ldm lies where Python looks for packages,") and str(found) in line.fault
    assert line.command == f"mv {old} {old}-other"
    variables = {"PYTHONPATH": os.pathsep.join(["/somewhere", str(tmp_path)])}
    (line,) = faulty(places.places([str(tmp_path)], tmp_path.parent, dict, variables))
    assert line.command == lines.unset("PYTHONPATH")


def test_a_second_copy_of_ours_is_told_of_and_is_no_fault(tmp_path):
    found = other(tmp_path)
    other(tmp_path, "ldm/doctor/places.py")
    assert look_around(tmp_path)[1:] == [Line("other ldm", f"{found}, a second copy of ours")]


def test_another_package_that_was_installed_as_ldm_is_uninstalled(tmp_path, monkeypatch):
    other(tmp_path)
    (line,) = faulty(look_around(tmp_path.parent, [tmp_path], ldm=["ldm", "ldm-from-scratch", "ldm"]))
    assert line.fault.startswith("Another package that is imported as ldm is installed (ldm)")
    assert line.command == "python -m pip uninstall -y ldm" and "install ours again" not in line.fault
    monkeypatch.setattr(places, "checkout", lambda: None)
    assert "install ours again" in faulty(look_around(tmp_path.parent, ldm=["ldm"]))[0].fault


def test_a_folder_where_nothing_can_be_written_and_one_that_is_gone(tmp_path, monkeypatch):
    (line,) = look_around(tmp_path / "gone")
    assert line.verdict == BROKEN and line.command == f"cd {Path.home()}"
    assert line.fault == f"Nothing can be written in the current folder, {tmp_path}/gone: No such file or directory."
    monkeypatch.setattr(places, "current", lambda: None)
    (line,) = places.places()
    assert line.verdict == BROKEN and line.fault.startswith("The current folder has been deleted")


def test_a_current_folder_that_is_deleted_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    sections = list(doctor.examine([("Places", places.places), ("Versions", lambda: packages.versions(OLD.get))]))
    assert not doctor.works(sections) and len(doctor.to_mend(sections)) == 2
    assert f"-e {tmp_path}" in doctor.to_mend(sections)[1].command


# ---------------------------------------------------------------------------------------------------- environment


def test_variables_that_matter_are_shown_and_secrets_are_not():
    variables = {"HF_TOKEN": "hf_abc", "HF_HOME": "/models", "PYTORCH_ALLOC_CONF": "x:y", "OMP_NUM_THREADS": "8"}
    found = list(places.environment({**variables, "HOME": "/root", "MY_HF_TOKEN": "abc"}, cores=8))
    assert [line[:2] for line in found] == [
        ("HF_HOME", "/models"), ("HF_TOKEN", "set, not shown"), ("OMP_NUM_THREADS", "8"), ("PYTORCH_ALLOC_CONF", "x:y"),
    ] and not faulty(found)  # fmt: skip
    assert list(places.environment({"HOME": "/root"})) == [Line("variables", "none that matter")]


@pytest.mark.parametrize("value, said", [("1", "leaves cores idle"), ("64", "makes threads wait for each other")])
def test_a_number_of_threads_that_is_not_the_cores(value, said):
    (line,) = places.environment({"OMP_NUM_THREADS": value}, cores=8)
    assert line.fault == f"OMP_NUM_THREADS is {value} on 8 cores, which {said}." and line.verdict == LACKS
    assert line.command == lines.unset("OMP_NUM_THREADS")


def test_a_variable_that_names_a_folder_that_is_not_there(tmp_path):
    assert not faulty(places.environment({"LDM_SD15": str(tmp_path)}))
    (line,) = places.environment({"LDM_SD15": "/no/such"})
    assert line.fault == "LDM_SD15 names /no/such, which is no folder." and line.command == lines.unset("LDM_SD15")


def test_a_shell_of_windows_unsets_otherwise(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert lines.unset("A") == "set A="
    monkeypatch.setattr(sys, "platform", "linux")
    assert lines.unset("A") == "unset A"


# -------------------------------------------------------------------------------------------------------- machine


def says(**texts):
    """Programs, or files, that say this, and nothing for any other; the keys are their first words or last names."""
    return lambda *words: next((text for key, text in texts.items() if key in " ".join(words).replace(".", "_")), "")


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\nBuffers: 1 kB\n"


def test_memory_of_linux_and_of_containers():
    total, available = 16_000_000 * 1024, 12_000_000 * 1024
    assert machine.ram("linux", says(meminfo=MEMINFO)) == (total, available, False)
    unlimited = says(meminfo=MEMINFO, memory_max="max\n", memory_current="5")
    assert machine.ram("linux", unlimited) == (total, available, False)
    limited = says(meminfo=MEMINFO, memory_max=f"{8 * GIB}\n", memory_current=f"{3 * GIB}\n")
    assert machine.ram("linux", limited) == (8 * GIB, 5 * GIB, True)
    limits = {"limit_in_bytes": f"{8 * GIB}", "usage_in_bytes": f"{9 * GIB}"}
    assert machine.ram("linux", says(meminfo=MEMINFO, **limits)) == (8 * GIB, 0, True)
    assert machine.ram("linux", says(meminfo=MEMINFO, limit_in_bytes=str(2**63 - 4096))) == (total, available, False)
    assert machine.ram("linux", says()) is None


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages wired down:                        100000.
Pages purgeable:                           4000.
"""


def test_memory_of_macos():
    told = says(memsize=f"{16 * GIB}\n", vm_stat=VM_STAT)
    assert machine.ram("darwin", output=told) == (16 * GIB, 37_000 * 16384, False)
    assert machine.ram("darwin", output=says()) is None


def test_memory_and_processor_of_this_machine():
    found = machine.ram()
    assert 0 < found.available <= found.total and found.total > GIB / 2
    assert machine.cpu_name() and machine.cores() >= 1
    assert 0 < machine.free_disk(Path("no/such/folder").absolute()) < 2**60


def test_the_name_of_a_processor():
    assert (
        machine.cpu_name("linux", says(cpuinfo="processor: 0\nmodel name\t: AMD  EPYC \nmodel name: B\n")) == "AMD EPYC"
    )
    assert machine.cpu_name("darwin", output=says(sysctl="Apple M2\n")) == "Apple M2"
    assert machine.cpu_name("linux", says())  # what Python knows


LISTED = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: Tesla P4 (UUID: GPU-2)\n"
TABLE = "| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: 12.4  |\n| NVIDIA H200 |\n"


def test_the_driver_tells_of_cards():
    def smi(*words):
        return {"-L": LISTED}.get(words[-1], "" if "--query" in " ".join(words) else TABLE)

    assert machine.nvidia(smi) == (("NVIDIA H200", "Tesla P4"), (12, 4), None)  # an old one doesn't know the question
    asked = says(query="NVIDIA H200, 9.0\nTesla P4, 6.1\n", smi=TABLE.replace("CUDA V", "CUDA UMD V"))
    assert machine.nvidia(asked) == (("NVIDIA H200", "Tesla P4"), (12, 4), (6, 1))
    assert machine.nvidia(says(smi="NVIDIA-SMI has failed because it couldn't communicate with the driver.")) is None


def test_a_program_that_is_missing_or_fails_says_nothing():
    assert machine.output("no-such-program-here") == ""
    assert machine.output(sys.executable, "-c", "print(1); raise SystemExit(1)") == ""
    assert machine.output(sys.executable, "-c", "print(1)") == "1\n"


# ---------------------------------------------------------------------------------------------------------- types


def test_the_processor_computes_in_all_types_that_it_claims():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    for name in ("float32", "float64", "bfloat16"):
        tried = machine.try_dtype(torch, "cpu", name)
        assert not tried.failed and tried.seconds.keys() == machine.operations(torch).keys(), name
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert next(iter(machine.ALLOWED)) == "float32" and len(machine.ALLOWED) == 4


def test_what_is_tried_depends_on_all_it_is_given():
    for name, (function, given) in machine.operations(torch).items():
        expected = function(*given)
        assert expected.std() > 0.1, name
        for k in range(len(given)):
            changed = function(*(x + x.sin() if i == k else x for i, x in enumerate(given)))
            assert (changed - expected).norm() > 0.1 * expected.norm(), (name, k)


@pytest.mark.parametrize(
    "bug, said",
    [
        (lambda x: x * (1 + 0.02 * (x.dtype == torch.float16)), "fails: product: its numbers are wrong by 0.02"),
        (lambda x: x / (0 if x.dtype == torch.float16 else 1), "fails: product: its numbers are wrong by inf"),
        (lambda x: x * (math.nan if x.dtype == torch.float16 else 1), "fails: product: its numbers are wrong by nan"),
        (lambda x: x if x.dtype != torch.float16 else x @ x[:1], "fails: product: mat1 and mat2"),
    ],
)
def test_a_wrong_product_and_one_that_raises_fail(monkeypatch, bug, said):
    numbers = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tried = {"product": (bug, (numbers,)), "sum": (lambda x: x + x, (numbers,))}
    monkeypatch.setattr(machine, "operations", lambda torch: tried)
    found = [machine.try_dtype(torch, "cpu", name) for name in ("float16", "float32")]
    assert machine.verdict(found[0]).startswith(said) and machine.verdict(found[1]) == "works"
    assert "sum" not in found[0].failed


def test_a_device_that_is_not_there_fails():
    tried = machine.try_dtype(torch, "cuda:77", "float32")
    assert tried.failed.keys() == machine.operations(torch).keys()
    assert machine.verdict(tried).startswith("fails: matrix product, convolution, attention, group norm: ")


def test_times_are_the_shortest_and_compared_with_float32():
    ticks = (k**2 for k in itertools.count())  # each trial takes longer
    assert machine.try_dtype(torch, "cpu", "float32", lambda: next(ticks)).seconds["matrix product"] == 1
    base = machine.Tried({}, {"product": 1e-3, "convolution": 1e-3})
    assert machine.verdict(base, base) == "works"
    assert machine.verdict(machine.Tried({}, {"product": 5e-3, "convolution": 2.9e-3}), base) == "works"
    slow = machine.verdict(machine.Tried({}, {"product": 2e-3, "convolution": 18e-3}), base)
    assert slow == "works, slowly: 10 times as long as float32, convolution 18 times"
    assert machine.verdict(base, machine.Tried({"product": "no"}, {})) == "works"  # nothing to compare with


def trial(**failing):
    return lambda torch, device, name: machine.Tried(
        {"attention": failing[name]} if name in failing else {}, {"attention": 1.0}
    )


def test_only_float32_on_the_processor_is_needed_to_draw():
    assert [line.text for line in devices.types(torch, "cpu", trial())] == ["works"] * 4
    found = list(devices.types(torch, "mps", trial(float64="no such type")))
    assert [line.name for line in faulty(found)] == ["mps float64"] and not found[-1].command
    (line,) = faulty(devices.types(torch, "cuda:0", trial(float32="no kernel image")))
    assert line.fault.startswith("This torch doesn't compute on cuda:0") and line.verdict == LACKS
    assert line.command == 'ldm generate "a red house" --device cpu'
    (line,) = faulty(devices.types(torch, "cpu", trial(float32="illegal")))
    assert line.verdict == BROKEN and line.text == "fails: attention: illegal"


# -------------------------------------------------------------------------------------------------------- devices


class Torch:
    """torch with other cards than there are."""

    def __init__(self, cards=(), warning="", mps=False):
        def available():
            if warning:
                import warnings

                warnings.warn(warning, stacklevel=1)
            return bool(cards)

        self.cuda = SimpleNamespace(
            is_available=available,
            device_count=lambda: len(cards),
            get_device_properties=lambda k: SimpleNamespace(name=cards[k], total_memory=80 * GIB, major=9, minor=0),
            mem_get_info=lambda k: ((20 + k) * GIB, 80 * GIB),
        )
        self.version = SimpleNamespace(cuda="12.6" if cards or warning else None, hip=None)
        self.mps = SimpleNamespace(recommended_max_memory=lambda: 6 * GIB)
        self.backends = SimpleNamespace(cpu=torch.backends.cpu, mps=SimpleNamespace(is_available=lambda: mps))
        self.get_num_threads = torch.get_num_threads


@pytest.fixture
def no_trials(monkeypatch):
    monkeypatch.setattr(devices, "types", lambda torch, device: [Line(f"{device} float32", "works")])


def test_every_device_has_its_lines(no_trials):
    found = list(devices.devices(Torch(["H200", "P4"], mps=True), lambda: None, {}))
    names = ["cpu", "cpu float32", "cuda:0", "cuda:0 float32", "cuda:1", "cuda:1 float32", "mps", "mps float32"]
    assert [line.name for line in found] == names and not faulty(found)
    assert only(found, "cuda:1").text == "P4, 80.0 GiB, compute capability 9.0, CUDA 12.6"
    assert f"on {torch.get_num_threads()} of {machine.cores()} cores" in found[0].text


def test_no_card_is_no_fault(no_trials):
    assert only(devices.devices(Torch(), lambda: None, {}), "cuda") == Line("cuda", "none")


H200 = machine.Nvidia(("NVIDIA H200",), (12, 4), (9, 0))


def test_a_card_that_torch_does_not_use_is_found(no_trials):
    line = only(devices.devices(Torch(), lambda: H200, {}), "cuda")
    assert line.fault == "There is a NVIDIA H200, but this torch was built without CUDA." and line.verdict == LACKS
    index = "https://download.pytorch.org/whl/cu126"
    assert line.command == f'python -m pip install --force-reinstall "torch>=2.4" --index-url {index}'
    line = only(devices.devices(Torch(warning="The driver\nis old"), lambda: H200, {}), "cuda")
    assert line.fault == "There is a NVIDIA H200, but this torch (CUDA 12.6) can't reach it: The driver is old."
    for value in ("", "-1"):
        line = only(devices.devices(Torch(), lambda: H200, {"CUDA_VISIBLE_DEVICES": value}), "cuda")
        assert line.fault == f"CUDA_VISIBLE_DEVICES is {value!r}, which hides the NVIDIA H200."
        assert line.command == lines.unset("CUDA_VISIBLE_DEVICES")
    assert "without CUDA" in only(devices.devices(Torch(), lambda: H200, {"CUDA_VISIBLE_DEVICES": "0"}), "cuda").fault
    line = devices.without_card(None, machine.Nvidia(("K80",), (11, 4)), None)
    assert "driver of the K80 is too old for torch (CUDA 11.4)" in line.fault and line.command == devices.DRIVERS


@pytest.mark.parametrize(
    "cuda, kind, build",
    [((13, 0), (9, 0), "cu130"), ((13, 1), (6, 1), "cu126"), ((12, 8), (12, 0), "cu128"), ((12, 8), (9, 0), "cu126"),
     ((12, 2), (7, 5), "cu126"), (None, None, "cu126"), ((13, 0), (12, 0), "cu130"), ((13, 0), (7, 5), "cu130")],
)  # fmt: skip
def test_the_build_of_torch_that_runs_on_a_card(cuda, kind, build):
    assert devices.build_for(machine.Nvidia(("card",), cuda, kind)) == build


def test_a_torch_that_does_not_import_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (line,) = devices.devices()
    assert line.verdict == BROKEN and line.text.startswith("fails: ModuleNotFoundError: import of torch halted")
    monkeypatch.setattr(devices, "installed", lambda name: None)
    assert devices.mend_torch() == "python -m pip install -c constraints.txt -e ."
    monkeypatch.setattr(devices, "installed", lambda name: "2.13.0")
    assert devices.mend_torch() == 'python -m pip install -c constraints.txt "torch>=2.4" --force-reinstall'


# --------------------------------------------------------------------------------------------------------- memory


def test_the_sizes_are_those_of_the_published_models():
    """Counted in their files: UNet, VAE, text encoders."""
    sd15, sdxl = memory.FAMILIES
    assert memory.parameters(sd15) == 859_520_964 + 83_653_863 + 123_060_480
    assert memory.parameters(sdxl) == 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840
    assert memory.needed(sd15, 10, 2) == 20 + GIB  # four maps of 256 x 512 x 512 in float32
    assert memory.needed(sdxl, 10, 4) == 40 + 4 * GIB


def test_memory_and_what_fits(tmp_path):
    room = machine.Ram(16 * GIB, 4 * GIB)
    found = list(memory.memory(Torch(), lambda: room, lambda folder: 3 * GIB))
    assert only(found, "RAM").text == "16.0 GiB, 4.0 GiB available"
    assert only(found, "models here").text.startswith("3.0 GiB free (") and only(found, "downloads").verdict == OK
    small, large = faulty(found)
    assert small[:2] == ("SD 1.5 on cpu", "5.0 GiB in float32 does not fit, 3.0 GiB in bfloat16 fits")
    assert small.fault == "SD 1.5 takes 5.0 GiB in float32, and cpu has 4.0 GiB: draw with it in bfloat16."
    assert small.command == 'ldm generate "a red house" --model FOLDER --device cpu --dtype bfloat16'
    assert large.text == "16.9 GiB in float32 does not fit, 10.5 GiB in bfloat16 does not fit" and not large.command


def test_only_the_roomiest_device_is_at_fault():
    found = list(memory.memory(Torch(["A", "B"]), lambda: machine.Ram(8 * GIB, 4 * GIB, True), lambda folder: None))
    assert only(found, "RAM").text == "8.0 GiB, the limit of this container, 4.0 GiB available"
    assert only(found, "cuda:1").text == "80.0 GiB, 21.0 GiB free"
    assert [line.name for line in faulty(found)] == ["SDXL on cpu"] and not [line for line in found if line.command]
    assert only(found, "SDXL on cuda:1").text == "16.9 GiB in float32 fits, 10.5 GiB in float16 fits"
    found = list(memory.memory(Torch(mps=True), lambda: machine.Ram(16 * GIB, 5 * GIB), lambda folder: None))
    assert only(found, "mps").text == "5.0 GiB of the RAM"
    found = list(memory.memory(Torch(), lambda: None, lambda folder: None))
    assert only(found, "RAM").text == "the system doesn't tell" and not faulty(found)


# -------------------------------------------------------------------------------------------------------- drawing


def test_the_embedded_model_draws_the_numbers_that_are_expected():
    x0, loading, drawn = drawing.draw("cpu")
    assert drawing.distance(drawing.fingerprint(x0)) < 2e-4 and loading > 0 and drawn > 0
    assert math.hypot(*drawing.EXPECTED) > 1 and len(drawing.EXPECTED) == 8
    (line,) = drawing.drawing(lambda: ["cpu"], lambda device: (x0, 0.51, 1.25))
    assert line == Line("cpu", "right: loaded in 0.5 s, drawn in 1.2 s")
    for bug in (x0 * 1.1, x0.flip(-1), x0 * 0, x0 * math.nan):
        line, card = drawing.drawing(lambda: ["cpu", "cuda:0"], lambda device, x0=bug: (x0, 0.5, 1.2))
        assert line.text.startswith("wrong by ") and (line.verdict, card.verdict) == (BROKEN, LACKS)
        assert "other numbers on cpu than it should" in line.fault
        assert card.command == 'ldm generate "a red house" --device cpu'


@pytest.mark.parametrize(
    "error, said, line",
    [
        (LDMError("The file is cut short."), "The file is cut short.", "restore"),
        (ModuleNotFoundError("No module named 'PIL'"), "ModuleNotFoundError: No module named 'PIL'", "all"),
        (RuntimeError("illegal\n  instruction"), "RuntimeError: illegal instruction", "torch"),
    ],
)
def test_a_model_that_does_not_draw_says_why(monkeypatch, error, said, line):
    def draw(device):
        raise error

    monkeypatch.setattr(drawing, "restore", lambda: "restore")
    monkeypatch.setattr(drawing, "everything", lambda: "all")
    monkeypatch.setattr(drawing, "mend_torch", lambda: "torch")
    cpu, card = drawing.drawing(lambda: ["cpu", "mps"], draw)
    assert cpu == Line("cpu", f"fails: {said}", BROKEN, f"The embedded model doesn't draw on cpu: {said}", line)
    assert (card.verdict, card.command) == (LACKS, 'ldm generate "a red house" --device cpu')


def test_drawing_without_torch_and_the_files_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (line,) = drawing.drawing()
    assert line.verdict == BROKEN and line.command == devices.mend_torch()
    monkeypatch.setattr(drawing, "checkout", lambda: tmp_path)
    assert drawing.restore() == ""
    (tmp_path / ".git").touch()
    assert drawing.restore() == f"git -C {tmp_path} checkout -- weights"


# ------------------------------------------------------------------------------------------------------ the whole


def raises():
    yield Line("first", "told before")
    raise OSError(5, "Input/output\nerror")


def ill():
    yield Line("scipy", "not installed", LACKS, "Beta needs scipy.", "install plots")
    yield Line("matplotlib", "not installed", LACKS, "Plots need matplotlib.", "install plots")
    yield Line("mps float64", "fails", LACKS)
    yield Line("torch", "not installed", BROKEN, "torch is not installed.", "install torch")
    yield Line("drawing", "fails", BROKEN, "Nothing is drawn.", "install torch")
    yield Line("weights", "cut", BROKEN, "The weights are cut short: install ldm again.")


def well():
    yield Line("torch", "2.13.0")


def test_a_probe_that_raises_is_a_line_and_those_after_it_go_on():
    first, second = doctor.examine([("Devices", raises), ("Versions", well)])
    assert first.lines[0] == Line("first", "told before") and second.lines == [Line("torch", "2.13.0")]
    assert first.lines[1] == Line("devices", "could not be told: OSError: [Errno 5] Input/output error", LACKS)
    assert doctor.works([first, second]) and doctor.to_mend([first, second]) == []


def test_what_stops_drawing_is_mended_first_and_each_line_said_once():
    sections = list(doctor.examine([("A", ill), ("B", ill)]))
    assert not doctor.works(sections)
    assert doctor.to_mend(sections) == [
        (["torch is not installed.", "Nothing is drawn."], "install torch"),
        (["The weights are cut short: install ldm again."], ""),
        (["Beta needs scipy.", "Plots need matplotlib."], "install plots"),
    ]


def test_every_probe_is_asked_in_the_order_of_the_page():
    titles = ["Versions", "Optional packages", "Places", "Devices", "Memory", "Drawing", "Environment"]
    assert [title for title, _ in doctor.PROBES] == titles


def test_the_page_of_an_ill_machine(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", [("Packages", ill), ("Disk", raises)])
    assert main(["doctor"]) == 1
    assert (
        capsys.readouterr().out
        == """Packages
- scipy        not installed
- matplotlib   not installed
- mps float64  fails
! torch        not installed
! drawing      fails
! weights      cut

Disk
  first  told before
- disk   could not be told: OSError: [Errno 5] Input/output error

To mend
  1. torch is not installed.
     Nothing is drawn.
     install torch
  2. The weights are cut short: install ldm again.
  3. Beta needs scipy.
     Plots need matplotlib.
     install plots

Drawing does not work here.
"""
    )


def test_a_healthy_machine_and_colours_for_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", [("Packages", well)])
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert page == "Packages\n  torch  2.13.0\n\nTo mend\n  Nothing to mend.\n\nDrawing works.\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["doctor"]) == 0 and capsys.readouterr().out == page
    monkeypatch.delenv("NO_COLOR")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == page.replace("Drawing works.", "\x1b[32mDrawing works.\x1b[0m")
    assert command.shown_line(next(well()), 5, True) == "  torch  2.13.0"
    assert command.shown_line(list(ill())[3], 5, True) == "\x1b[31m! torch  not installed\x1b[0m"


def test_json_says_the_same(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", [("Packages", ill), ("Disk", raises)])
    assert main(["doctor", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["works"] is False and list(said["sections"]) == ["Packages", "Disk"]
    assert [Line(**line) for line in said["sections"]["Packages"]] == list(ill())
    assert said["to_mend"][0] == {
        "faults": ["torch is not installed.", "Nothing is drawn."],
        "command": "install torch",
    }


ALONE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = sys.argv.pop().split(",")
sys.meta_path.insert(0, Block())
from ldm.cli import main
status = main(["doctor", *sys.argv[1:]])
assert not {name.partition(".")[0] for name in sys.modules} & set(BLOCKED)
sys.exit(status)
"""
NOT_NEEDED = "diffusers,transformers,accelerate,tokenizers,huggingface_hub,scipy,ftfy,cv2,matplotlib,IPython,jupyter"


def doctor_in_a_process(*words: str, blocked: str) -> tuple[int, str]:
    """The command in a fresh interpreter, where some packages cannot be imported: (exit status, what it printed)."""
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": str(Path(ldm.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *words, blocked], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_this_machine_without_what_drawing_does_not_need():
    status, page = doctor_in_a_process("--json", blocked=NOT_NEEDED)
    said = json.loads(page)
    assert status == 0 and said["works"] is True
    told = {title: {line["name"]: line["text"] for line in lines} for title, lines in said["sections"].items()}
    assert told["Drawing"]["cpu"].startswith("right: loaded in ")
    assert told["Devices"]["cpu float32"] == "works" and "GiB available" in told["Memory"]["RAM"]
    assert told["Versions"]["torch"] == str(torch.__version__) and "SDXL on cpu" in told["Memory"]


def test_this_machine_without_torch():
    status, page = doctor_in_a_process(blocked="torch")
    assert status == 1 and page.endswith("Drawing does not work here.\n")
    assert "! torch  fails: ModuleNotFoundError: No module named 'torch'" in page and "could not be told" in page
    assert "1. torch cannot be imported, and nothing is drawn without it." in page
