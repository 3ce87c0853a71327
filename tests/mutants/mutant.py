"""A mutant: one wrong line of the package, and the tests that have to see it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
#: what the tests of a mutant need
COPIED = ("dit_cache_fx", "tests", "pyproject.toml")
#: seconds for each test: a mutant may wait for ever
TIMEOUT = 240

#: the exit codes of pytest: every test has passed, a test has failed
_PASSED, _FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """A change that gives a user something wrong.

    `file`: within the package; `old` stands there once, and `new` takes its place. `wrong`: what a
    user would see. `tests`: node ids; each of them fails.
    """

    name: str
    file: str
    old: str
    new: str
    wrong: str
    tests: tuple[str, ...]

    def path(self, root: Path) -> Path:
        return root / "dit_cache_fx" / self.file

    def apply(self, root: Path) -> None:
        """Change the file. Raises `ValueError` where the old text is not there once."""
        path = self.path(root)
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {text.count(self.old)} of its text in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


class Outcome(NamedTuple):
    """`killed`: None where the tests did not run. `by`: the first that failed, or what happened."""

    killed: bool | None
    by: str
    seconds: float


def outcome(mutant: Mutant, root: Path = ROOT, each: bool = False) -> Outcome:
    """Run the tests of a mutant in a copy of the sources. `each`: every one of them has to fail."""
    began = time.perf_counter()
    with TemporaryDirectory(prefix="mutant_") as folder:
        for name in COPIED:
            copied = shutil.copytree if (root / name).is_dir() else shutil.copy
            copied(root / name, Path(folder, name))
        mutant.apply(Path(folder))
        rounds = [(test,) for test in mutant.tests] if each else [mutant.tests]
        found = [_tested(folder, tests) for tests in rounds]
    worst = next((f for f in found if not f[0]), found[0])
    return Outcome(*worst, time.perf_counter() - began)


def _tested(folder: str, tests: tuple[str, ...]) -> tuple[bool | None, str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", ""]
    done = subprocess.run(
        [*command, f"--timeout={TIMEOUT}", *tests],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == _PASSED:
        return False, "survives " + ", ".join(tests)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode != _FAILED or failed is None:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return None, f"pytest ended with {done.returncode}: {' '.join(lines[-2:])}"
    return True, failed[1]
