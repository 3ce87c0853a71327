"""Run every scenario's test and write `docs/scenarios.md`: `python -m tests.scenarios.page`.

This takes some minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.scenarios.registry import OWN, ROOT, SCENARIOS, SECTIONS, Scenario

PAGE = ROOT / "docs" / "scenarios.md"
COLUMNS = ("scenario", "source", "fault elsewhere", "behavior here", "test")
FAILS, NOT_RUN = "**fails**", "not run"

INTRODUCTION = """\
# Tested scenarios

Step caches often fail when something around them changes: another request, another size, another
LoRA. Each row is such a case, with a test that asserts the right values: the test compares with a
reference written by hand, or with the model without a cache.

*Source* is the thread in the project that reported the fault, or "own" if it was found here.

`python -m tests.scenarios.page` runs the tests and writes this page.

{versions}

"""


class Outcomes:
    """A pytest plugin that records the outcome of each test."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._seen.setdefault(report.nodeid, set()).add(report.outcome)

    def of(self, scenario: Scenario) -> str:
        """ "passed", "failed", or "skipped" where none of its tests ran."""
        ours = (f"{scenario.node}", f"{scenario.node}[")
        seen = {
            outcome
            for node, outcomes in self._seen.items()
            if node == ours[0] or node.startswith(ours[1])
            for outcome in outcomes
        }
        return "failed" if "failed" in seen else "passed" if "passed" in seen else "skipped"


def ran(scenarios: Sequence[Scenario] = SCENARIOS) -> dict[Scenario, str]:
    """Run the tests and return the outcome of each scenario."""
    outcomes = Outcomes()
    nodes = sorted({str(ROOT / scenario.node) for scenario in scenarios})
    pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *nodes], [outcomes])
    return {scenario: outcomes.of(scenario) for scenario in scenarios}


def row(scenario: Scenario, outcome: str) -> str:
    """A line of the table."""
    here = {"passed": scenario.here, "failed": FAILS}.get(outcome, NOT_RUN)
    cells = (scenario.title, scenario.link, scenario.elsewhere, here, f"`{scenario.test}`")
    return line(cells)


def page(outcomes: Mapping[Scenario, str]) -> str:
    """The page."""
    lines = [INTRODUCTION.format(versions=versions()) + _count(outcomes)]
    for title, scenarios in SECTIONS.items():
        lines += ["", f"## {title}", "", line(COLUMNS), line(["---"] * len(COLUMNS))]
        lines += [row(scenario, outcomes[scenario]) for scenario in scenarios]
    return "\n".join(lines) + "\n"


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def versions() -> str:
    """The versions that the page is about. Nothing is imported for it; pytest must import first."""
    return f"torch {version('torch').split('+')[0]}, diffusers {version('diffusers')}, on a CPU."


def _count(outcomes: Mapping[Scenario, str]) -> str:
    good = sum(outcome == "passed" for outcome in outcomes.values())
    reported = sum(scenario.source != OWN for scenario in outcomes)
    return f"{good} of {len(outcomes)} scenarios pass; {reported} were reported to other projects."


def _main(target: Path = PAGE) -> int:
    outcomes = ran()
    target.write_text(page(outcomes))
    return 0 if all(outcome == "passed" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(_main())
