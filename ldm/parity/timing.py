"""Milliseconds and peak memory of both sides, measured in turns."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch

from ldm.parity.compare import Line

BUDGET, MOST = 0.5, 5  # seconds to spend on repeating a pair of runs, and repetitions at most
DEAR = 60.0  # seconds: a pair that took longer the first time isn't run again


class Timed(NamedTuple):
    """Both sides' answers, milliseconds and, on CUDA, bytes of memory at the peak beyond what lay there before."""

    ours: Any
    theirs: Any
    ours_ms: float
    theirs_ms: float
    ours_bytes: int | None
    theirs_bytes: int | None
    cold: bool  # each was run once, ours first

    def on(self, line: Line) -> Line:
        """The line, with these measurements."""
        note = "; ".join(filter(None, (line.note, "timed once, cold" * self.cold)))
        return replace(
            line, ours_ms=self.ours_ms, theirs_ms=self.theirs_ms, ours_bytes=self.ours_bytes,
            theirs_bytes=self.theirs_bytes, note=note,
        )  # fmt: skip


def both(ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device) -> Timed:
    """Run both: once for the answer and to warm up, then in turns, once and while that is cheap; the median counts.

    A dear pair is run once, cold, and that is its time.
    """
    answers, first, peaks = [], [], []
    for run in (ours, theirs):
        before = _watch(device)
        answer, seconds = _clock(run, device)
        answers.append(answer)
        first.append(seconds)
        peaks.append(torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None)
    times = ([], [])
    while len(times[0]) < MOST and sum(map(sum, times)) < BUDGET and sum(first) < DEAR:
        for run, kept in zip((ours, theirs), times, strict=True):
            kept.append(_clock(run, device)[1])
    mine, other = (1000 * (median(kept) if kept else once) for kept, once in zip(times, first, strict=True))
    return Timed(*answers, mine, other, *peaks, cold=not times[0])


def _watch(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _clock(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else None
    if wait:
        wait()
    began = time.perf_counter()
    answer = run()
    if wait:
        wait()
    return answer, time.perf_counter() - began


@contextmanager
def full_float32(threads: int | None = None):
    """No TF32, which would round float32's products to ten bits; so many threads. All is put back at the end."""
    matmul, cudnn, count = torch.backends.cuda.matmul, torch.backends.cudnn, torch.get_num_threads()
    kept = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = kept
        torch.set_num_threads(count)
