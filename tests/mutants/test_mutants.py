"""The mutants can still be made, their tests are there, and each of these sees its mutant."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import __main__ as script
from tests.mutants.mutant import ROOT, Mutant, outcome
from tests.mutants.registry import MUTANTS

#: how many there are at least of each folder
LEAST = {"capture": 8, "passes": 8, "runtime": 12, "strategies": 8, "lowering": 6, "dynamo": 4}


def functions(path: Path) -> Iterator[str]:
    """The tests of a file, as node ids name them."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        yield from (f"{owner}{each.name}" for each in inside if isinstance(each, ast.FunctionDef))


def test_each_has_a_name_of_its_own() -> None:
    assert [name for name, times in Counter(m.name for m in MUTANTS).items() if times > 1] == []


def test_every_folder_has_some() -> None:
    found = Counter(m.file.partition("/")[0] for m in MUTANTS)
    assert {name: found[name] for name, least in LEAST.items() if found[name] < least} == {}


def test_the_text_that_each_changes_is_there_once() -> None:
    files = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("dit_cache_fx/**/*.py")}
    found = {m.name: files.get(m.path(ROOT), "").count(m.old) for m in MUTANTS}
    assert {name: times for name, times in found.items() if times != 1} == {}


def test_the_tests_of_each_are_there() -> None:
    named = sorted({test.partition("[")[0] for m in MUTANTS for test in m.tests})
    files = {test.partition("::")[0] for test in named}
    there = {f"{file}::{name}" for file in files for name in functions(ROOT / file)}
    assert [test for test in named if test not in there] == []
    assert all(m.tests for m in MUTANTS)


def project(root: Path) -> Mutant:
    """A package with two tests, one of which sees the mutant."""
    (root / "dit_cache_fx").mkdir()
    (root / "dit_cache_fx" / "toy.py").write_text("def double(x):\n    return x + x\n")
    (root / "tests").mkdir()
    (root / "tests" / "test_toy.py").write_text(
        "from dit_cache_fx.toy import double\n\n"
        "def test_two():\n    assert double(2) == 4\n\n"
        "def test_three():\n    assert double(3) == 6\n"
    )
    (root / "pyproject.toml").write_text("")
    tests = ("tests/test_toy.py::test_two", "tests/test_toy.py::test_three")
    return Mutant("square", "toy.py", "x + x", "x * x", "3 twice is 9", tests)


def test_what_becomes_of_a_mutant(tmp_path: Path) -> None:
    mutant = project(tmp_path)
    killed = outcome(mutant, tmp_path)
    assert (killed.killed, killed.by) == (True, "tests/test_toy.py::test_three")
    survives = outcome(mutant, tmp_path, each=True)
    assert (survives.killed, survives.by) == (False, "survives tests/test_toy.py::test_two")
    assert "x + x" in mutant.path(tmp_path).read_text()


def test_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        script, "outcome", lambda _, each: outcome(project(tmp_path), tmp_path, each)
    )
    assert script.main([MUTANTS[0].name]) == 0
    assert "| tests/test_toy.py::test_three |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no mutant is called 'nothing'"):
        script.main(["nothing"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_of_its_tests_sees_it(mutant: Mutant) -> None:
    result = outcome(mutant, each=True)
    assert result.killed, f"{result.by}: {mutant.wrong}"
