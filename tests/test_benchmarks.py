"""The benchmark runs, and says of this library's rows what it has to: no break, no recompile."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from benchmarks.__main__ import main
from benchmarks.figures import figures, physical_limit, run_name
from benchmarks.run import Settings, measure
from benchmarks.systems import ROWS
from benchmarks.table import write

#: this library's rows, and the graphs that Dynamo makes
OURS = {"apply": 0, "apply-compile": 1, "apply-steps": 2, "backend": 1}
SYSTEMS = ("eager", "compiled", "limit", *OURS, "angelslim-deepcache-eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a smoke run of one model leaves."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--quick", "--devices", "cpu", "--models", "dit", "--threads", "1"]
    assert main([*arguments, "--systems", ",".join(SYSTEMS), "--docs", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cpu.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rows(data: dict[str, Any]) -> dict[str, Any]:
    return data["models"]["dit"]["rows"]  # type: ignore[no-any-return]


@pytest.mark.exhaustive
def test_table_and_picture(folder: Path) -> None:
    text = (folder / "benchmarks.md").read_text()
    for name in SYSTEMS:
        assert f"| {ROWS[name].title} |" in text.replace("**", "")
    assert "Physical limit" in text
    assert (folder / "img" / "bench_cpu_dit.png").stat().st_size > 10_000


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OURS)
def test_no_break_and_no_recompile(rows: dict[str, Any], name: str) -> None:
    row = rows[name]
    assert row["breaks"] == 0, row["break_reasons"]
    assert row["recompiles"] == 0
    assert [g["compiles"] for g in row["generations"]] == [0, 0]
    assert row["graphs"] == OURS[name]
    assert [g["computed"] for g in row["generations"]] == [6, 6]
    assert row["error_computed"] == 0
    assert row["error_reused"] > 1e-4  # or it would be the uncached model
    held = 16 * 32 * 4  # one float32 tensor of 16 tokens, 32 channels
    assert held <= row["cache_bytes"] <= held + 3 * 1024  # and what the calls are known by


@pytest.mark.exhaustive
def test_the_uncached_model_computes_every_step(rows: dict[str, Any]) -> None:
    assert rows["eager"]["generations"][0]["computed"] == 8


def test_a_failure_is_a_row_and_not_tried_again(tmp_path: Path) -> None:
    settings = _one_worker(tmp_path, in_process=True, dtype="no_such_dtype")
    for _ in range(2):
        row = measure(settings)["models"]["dit"]["rows"]["eager"]
        assert re.match("failed: AttributeError: .*no_such_dtype", row["failed"])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_crash_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is forked here, so that it need not import everything anew."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("benchmarks.run._processes", lambda _: fork)
    monkeypatch.setattr("benchmarks.run.serve", lambda *_: os._exit(3))
    row = measure(_one_worker(tmp_path))["models"]["dit"]["rows"]["eager"]
    assert row["failed"] == "failed: crashed (exit code 3)"


def _one_worker(folder: Path, **more: Any) -> Settings:
    return Settings(folder, size="tiny", models=["dit"], systems=["eager"], live=1, **more)


def test_writing_keeps_what_is_around(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    write(file, ["first"])
    file.write_text(file.read_text() + "\nby hand\n")
    write(file, ["second"])
    assert "second" in file.read_text()
    assert "first" not in file.read_text()
    assert file.read_text().endswith("\nby hand\n")


def test_a_run_of_another_number_of_steps_has_files_of_its_own() -> None:
    told = {"device": "cuda", "size": "cuda", "steps": 50}
    assert run_name(told) == "cuda"
    assert run_name({**told, "steps": 28}) == "cuda-28"


def test_what_other_runs_have_measured_stays_on_the_page(tmp_path: Path) -> None:
    assert main(["--report", "--devices", "cuda-28", "--docs", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## AMD EPYC" in page
    assert "### FLUX-shaped" in page
