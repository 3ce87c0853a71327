"""`python -m tests.mutants`: apply each mutant to a copy of the package, and run its tests.

Exits with 1 where one survives.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatch

from tests.mutants.mutant import Mutant, Outcome, outcome
from tests.mutants.registry import MUTANTS


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, or in these folders (wildcards may stand for parts of both)."""
    found = []
    for name in names or ["*"]:
        matches = [m for m in MUTANTS if fnmatch(m.name, name) or fnmatch(m.file, f"{name}/*")]
        if not matches:
            raise SystemExit(f"no mutant is called {name!r}; there are {[m.name for m in MUTANTS]}")
        found += [m for m in matches if m not in found]
    return found


def line(mutant: Mutant, result: Outcome) -> str:
    by = result.by if result.killed else f"{result.by} ({mutant.wrong})"
    return f"{mutant.name:45} | {by} | {result.seconds:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="names or folders, such as 'guard*' or runtime")
    parser.add_argument("--all", action="store_true", help="each of a mutant's tests has to fail")
    given = parser.parse_args(arguments)
    print(f"{'mutant':45} | killed by | seconds")
    alive = 0
    for mutant in chosen(given.names):
        result = outcome(mutant, each=given.all)
        alive += not result.killed
        print(line(mutant, result), flush=True)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
