"""`docs/scenarios.md` says what the registry says, and each scenario has a test that is there."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.scenarios.page import PAGE, Outcomes, page, row
from tests.scenarios.registry import OWN, ROOT, SCENARIOS, Scenario


def undated(text: str) -> list[str]:
    """Its lines, without the one that says which versions it is of."""
    return [at for at in text.splitlines() if not at.startswith("torch ")]


def test_the_page_is_what_the_registry_says() -> None:
    """Where every test passes: one that does not fails by itself."""
    passed = page(dict.fromkeys(SCENARIOS, "passed"))
    assert undated(PAGE.read_text()) == undated(passed)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.title)
def test_every_scenario_has_a_test_and_a_source(scenario: Scenario) -> None:
    assert scenario.exists, scenario.node
    assert scenario.source == OWN or re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", scenario.source)
    assert "|" not in scenario.title + scenario.elsewhere + scenario.here


def test_no_scenario_is_there_twice() -> None:
    assert len({scenario.title for scenario in SCENARIOS}) == len(SCENARIOS)
    assert len({scenario.test for scenario in SCENARIOS}) == len(SCENARIOS)


def test_a_test_that_is_not_there_is_seen() -> None:
    assert not replace(SCENARIOS[0], test="test_sessions.py::test_nothing").exists
    assert not replace(SCENARIOS[0], test="test_nowhere.py::test_nothing").exists


def test_every_new_test_is_in_the_registry() -> None:
    named = {scenario.node.partition("[")[0] for scenario in SCENARIOS}
    for file in (ROOT / "tests" / "scenarios").glob("test_*.py"):
        if file.name != "test_page.py":
            names = re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
            path = file.relative_to(ROOT).as_posix()
            assert {f"{path}::{name}" for name in names} <= named


@pytest.mark.parametrize(
    ("reported", "outcome", "cell"),
    [
        (["passed", "passed"], "passed", "well"),
        (["passed", "failed"], "failed", "**fails**"),
        (["passed", "skipped"], "passed", "well"),
        (["skipped"], "skipped", "not run"),
        ([], "skipped", "not run"),
    ],
)
def test_what_the_tests_gave_is_what_the_page_says(
    reported: list[str], outcome: str, cell: str
) -> None:
    scenario = Scenario("a", OWN, "b", "well", "test_x.py::test_y")
    outcomes = Outcomes()
    for number, what in enumerate(reported):
        node = f"tests/test_x.py::test_y[{number}]"
        report = pytest.TestReport(node, ("", 0, ""), {}, what, None, "call")  # type: ignore[arg-type]
        outcomes.pytest_runtest_logreport(report)
    assert outcomes.of(scenario) == outcome
    assert row(scenario, outcome) == f"| a | own | b | {cell} | `test_x.py::test_y` |"
