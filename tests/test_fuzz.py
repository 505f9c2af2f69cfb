"""A sample of `fuzz.py`, and that the watch it keeps would see what it looks for."""

import os
import re
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")
INPUTS = 3000


def run(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, FUZZ, *words], capture_output=True, text=True, env=environment, timeout=300)


def test_spoiled_files_do_no_harm():
    ended = run("--inputs", str(INPUTS), "--seed", "1")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert re.search(rf"^{INPUTS} inputs in .* 0 found$", ended.stdout, re.MULTILINE), ended.stdout
    kinds = re.findall(r"^(\w+) +(\d+) inputs +(\d+) read +(\d+) refused", ended.stdout, re.MULTILINE)
    assert len(kinds) >= 20 and sum(int(read) for _, _, read, _ in kinds) > INPUTS // 20  # some spoiling does no harm
    assert sum(int(refused) for *_, refused in kinds) > INPUTS // 2


WATCHED = """
import os, sys
from fuzz import Watch
from ldm.errors import LDMError

def fail(): raise LDMError("x" * 9)
def hang():
    while True: pass
watch = Watch()
reads = [
    lambda: None, lambda: fail(), lambda: hang(), lambda: 1 / 0, lambda: eval("1"), lambda: os.system("true"),
    lambda: open("outside", "w"), lambda: __import__("sndhdr" if sys.version_info < (3, 13) else "antigravity"),
    lambda: print("\\x1b[2J", file=sys.stderr),
]
for read in reads:
    print(watch.run(read).split(":")[0][:25])
"""


def test_the_watch_sees_what_it_looks_for(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCHED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FUZZ.parent)},
        timeout=100,
    )
    seen = ended.stdout.splitlines()
    expected = [
        "read", "no sentence", "more than 1.0 s", "ZeroDivisionError at", "caused", "caused os.system", "caused open",
        "caused import", "said",
    ]  # fmt: skip
    assert len(seen) == len(expected), ended.stderr
    assert all(said.startswith(word) for said, word in zip(seen, expected, strict=True)), seen
