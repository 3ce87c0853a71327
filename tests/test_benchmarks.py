"""The benchmark runs, and says of this library's rows what it has to: no break, no recompile."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks.__main__ import main
from benchmarks.figures import figures, physical_limit
from benchmarks.run import Settings, measure
from benchmarks.systems import ROWS
from benchmarks.table import write

OURS = ("apply", "apply-compile")
SYSTEMS = ("eager", "compiled", "limit", *OURS, "angelslim-deepcache-eager", "firstblock-eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a smoke run of one model leaves."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--devices", "cpu", "--models", "flux", "--threads", "1"]
    assert main([*arguments, "--systems", ",".join(SYSTEMS), "--docs", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cpu.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rows(data: dict[str, Any]) -> dict[str, Any]:
    return data["models"]["flux"]["rows"]  # type: ignore[no-any-return]


def test_table_and_picture(folder: Path) -> None:
    text = (folder / "benchmarks.md").read_text()
    for name in SYSTEMS:
        assert f"| {ROWS[name].title} |" in text.replace("**", "")
    assert "Physical limit" in text
    assert (folder / "img" / "bench_cpu_flux.png").stat().st_size > 10_000


def test_figures_are_finite(data: dict[str, Any], rows: dict[str, Any]) -> None:
    for row in figures(rows, data["settings"]):
        if row.system == "angelslim-deepcache-eager" and row.failed:
            assert "not installed" in row.failed
            continue
        assert row.failed is None
        assert row.seconds is not None
        assert math.isfinite(row.seconds)
        assert row.kind == "limit" or row.computed_ms is not None
        assert row.kind == "uncached" or row.reused_ms is not None
    limit = physical_limit(rows, data["settings"])
    assert limit is not None
    assert limit > 0


@pytest.mark.parametrize("name", OURS)
def test_no_break_and_no_recompile(rows: dict[str, Any], name: str) -> None:
    row = rows[name]
    assert row["breaks"] == 0, row["break_reasons"]
    assert row["recompiles"] == 0
    assert [g["compiles"] for g in row["generations"]] == [0, 0]
    assert row["graphs"] == (name == "apply-compile")
    assert [g["computed"] for g in row["generations"]] == [6, 6]
    assert row["error_computed"] == 0
    assert row["error_reused"] > 1e-4  # or it would be the uncached model
    assert row["cache_bytes"] == 16 * 32 * 4  # one float32 tensor of 16 tokens, 32 channels


def test_computed_steps_of_the_others(rows: dict[str, Any]) -> None:
    assert rows["eager"]["generations"][0]["computed"] == 8
    assert rows["firstblock-eager"]["generations"][0]["computed"] in (5, 6)


def test_a_crash_is_a_row(tmp_path: Path) -> None:
    """A worker that dies takes nothing with it; what failed is not tried again."""
    settings = Settings(tmp_path, size="tiny", dtype="no_such_dtype", models=["dit"], live=1)
    settings.job("dit", "eager")
    (tmp_path / "work").mkdir()
    Path(settings.job("dit", "eager").reference).touch()
    for _ in range(2):
        data = measure(Settings(**{**vars(settings), "systems": ["eager"], "threads": 1}))
        row = data["models"]["dit"]["rows"]["eager"]
        assert re.match("failed: AttributeError: .*no_such_dtype", row["failed"])


def test_writing_keeps_what_is_around(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    write(file, ["first"])
    file.write_text(file.read_text() + "\nby hand\n")
    write(file, ["second"])
    assert "second" in file.read_text()
    assert "first" not in file.read_text()
    assert file.read_text().endswith("\nby hand\n")
