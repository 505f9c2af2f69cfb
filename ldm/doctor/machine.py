"""What a machine says of itself: processor, memory, cards, and which types it really computes in.

With the standard library alone, on Linux, macOS and Windows; torch is handed in where it is needed. What cannot be
told is None or "", and whoever reads files or starts programs is handed in too, so that tests can be other machines.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch as pytorch
    from torch import Tensor

SECONDS = 10  # after which another program is not waited for any longer


def output(*command: str) -> str:
    """What a program prints; "" if there is none of that name, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def read(path: str) -> str:
    """A text file of the system; "" where it doesn't exist."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_name(system: str = sys.platform, read: Callable = read, output: Callable = output) -> str:
    """The processor's name, or the kind of machine where it has none."""
    if system == "darwin":
        found = output("sysctl", "-n", "machdep.cpu.brand_string")
    elif system == "win32":
        found = os.environ.get("PROCESSOR_IDENTIFIER", "")
    else:
        line = re.search(r"^model name\s*:(.*)$", read("/proc/cpuinfo"), re.MULTILINE)  # ARM kernels write none
        found = line[1] if line else ""
    return " ".join(found.split()) or platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------ memory


class Ram(NamedTuple):
    """Bytes. `limited`: the total is what a container is allowed, not what the machine has."""

    total: int
    available: int
    limited: bool = False


def ram(system: str = sys.platform, read: Callable = read, output: Callable = output) -> Ram | None:
    """The machine's memory and what of it is to be had now."""
    if system == "darwin":
        return _ram_of_macos(output)
    return _ram_of_windows() if system == "win32" else _ram_of_linux(read)


def _ram_of_linux(read: Callable) -> Ram | None:
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)}
    if "MemTotal" not in kib:
        return None
    total, available = 1024 * kib["MemTotal"], 1024 * kib.get("MemAvailable", kib.get("MemFree", 0))
    groups = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in groups:  # version 2, version 1; without a limit they say "max", or more than the machine has
        most, taken = (read(f"/sys/fs/cgroup/{name}").strip() for name in (limit, used))
        if most.isdigit() and int(most) < total:
            return Ram(int(most), max(0, min(available, int(most) - int(taken or 0))), limited=True)
    return Ram(total, available)


def _ram_of_macos(output: Callable) -> Ram | None:
    total, pages = output("sysctl", "-n", "hw.memsize").strip(), output("vm_stat")
    if not total.isdigit():
        return None
    size = re.search(r"page size of (\d+) bytes", pages)
    # Inactive and purgeable pages are given up as soon as someone needs memory.
    free = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)", pages, re.MULTILINE)
    return Ram(int(total), int(size[1]) * sum(map(int, free)) if size else 0)


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API: two 32-bit fields, then seven 64-bit ones."""

    _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64)
        for name in ("total", "available", "page_total", "page_free", "virtual", "virtual_free", "extended")
    ]


def _ram_of_windows() -> Ram | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    known = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return Ram(status.total, status.available) if known else None


# ------------------------------------------------------------------------------------------------------------- cards


class Nvidia(NamedTuple):
    """What the driver says, whatever torch says: the cards' names, the newest CUDA it runs, the oldest card's kind."""

    cards: tuple[str, ...]
    cuda: tuple[int, int] | None = None
    capability: tuple[int, int] | None = None


def nvidia(output: Callable = output) -> Nvidia | None:
    """The NVIDIA cards of this machine; None if there is none, or no driver."""
    rows = re.findall(r"^(.+), (\d+)\.(\d+)$", output("nvidia-smi", *QUERY), re.MULTILINE)
    cards = [row[0] for row in rows]  # old drivers don't know the question
    cards = cards or re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", output("nvidia-smi", "-L"), re.MULTILINE)
    if not cards:
        return None
    version = re.search(r"CUDA[\w ]* Version:\s*(\d+)\.(\d+)", output("nvidia-smi"))
    kinds = [(int(major), int(minor)) for _, major, minor in rows]
    return Nvidia(tuple(cards), (int(version[1]), int(version[2])) if version else None, min(kinds, default=None))


QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader")


# ------------------------------------------------------------------------------------------------------------- types

# How far from float64, root mean square over root mean square, an honest result may be. A float32 that computes in
# TF32, which is what CUDA does with convolutions unless it is told otherwise, has 10 bits: some 5e-4.
ALLOWED = {"float32": 3e-3, "float16": 1e-2, "bfloat16": 5e-2, "float64": 1e-10}
SLOW = 4  # times as long as in float32: there is no native path. float64 takes twice as long where there is one


TIMES = 10  # of which the shortest counts: the machine may be busy otherwise


class Tried(NamedTuple):
    """A few operations in one type on one device: why some fail, and how long each of the others took (seconds)."""

    failed: dict[str, str]
    seconds: dict[str, float]


def operations(torch: ModuleType) -> dict[str, tuple[Callable, tuple["Tensor", ...]]]:
    """What drawing is made of, small: {name: (function, its arguments in float64)}."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> "Tensor":
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def attention(q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def convolution(x: "Tensor", weight: "Tensor") -> "Tensor":
        return torch.nn.functional.conv2d(x, weight, padding=1)

    def group_norm(x: "Tensor") -> "Tensor":
        return torch.nn.functional.group_norm(x, 8)

    picture = normal(1, 32, 32, 32)
    return {
        "matrix product": (torch.matmul, (normal(256, 256), normal(256, 256))),
        "convolution": (convolution, (picture, normal(32, 32, 3, 3))),
        "attention": (attention, (2 * normal(1, 4, 256, 32), normal(1, 4, 256, 32), normal(1, 4, 256, 32))),
        "group norm": (group_norm, (3 + 2 * picture,)),
    }


def try_dtype(
    torch: ModuleType, device: "str | pytorch.device", name: str, clock: Callable = time.perf_counter
) -> Tried:
    """Compute a little in the type of that name on `device`, and compare with float64 on the CPU."""
    failed, seconds = {}, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where other programs compute, and the clock means little
    try:
        for what, (function, given) in operations(torch).items():
            try:
                own = [x.to(getattr(torch, name)).to(device) for x in given]
                result = function(*own).cpu()  # the first time libraries are loaded and kernels chosen
                seconds[what] = min(timed(lambda: function(*own).cpu(), clock) for _ in range(TIMES))  # noqa: B023
                expected = function(*given)
                error = float((result.double() - expected).norm() / expected.norm())
                if not error <= ALLOWED[name]:  # NaN too
                    failed[what] = f"its numbers are wrong by {error:.2g} of their size"
            except Exception as error:
                failed[what] = " ".join(str(error).split())[:120] or type(error).__name__
    finally:
        torch.set_num_threads(threads)
    return Tried(failed, seconds)


def timed(function: Callable[[], object], clock: Callable[[], float]) -> float:
    since = clock()
    function()
    return clock() - since


def verdict(tried: Tried, float32: Tried | None = None) -> str:
    """What became of a trial: "works", "works, slowly: ..." or "fails: ..."; `float32` is that type's trial there."""
    if tried.failed:
        whys: dict[str, list[str]] = {}
        for what, why in tried.failed.items():
            whys.setdefault(why, []).append(what)
        return "fails: " + "; ".join(f"{', '.join(whats)}: {why}" for why, whats in whys.items())
    if float32 is None or float32.failed:
        return "works"
    times = {what: seconds / max(float32.seconds[what], 1e-9) for what, seconds in tried.seconds.items()}
    longer = sum(tried.seconds.values()) / max(sum(float32.seconds.values()), 1e-9)
    if longer < SLOW:
        return "works"
    worst = max(times, key=times.get)
    return f"works, slowly: {longer:.0f} times as long as float32, {worst} {times[worst]:.0f} times"


def free_disk(folder: Path) -> int | None:
    """Bytes free where `folder` lies, or will lie."""
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None
