"""The examples run as their headers say, and the docs show what they print."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

from dit_cache_fx import TEACACHE_COEFFICIENTS
from dit_cache_fx.strategies.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
GRAPHS = (ROOT / "docs" / "how_it_works.md").read_text()
SCHEDULES = (ROOT / "docs" / "schedules.md").read_text()
COEFFICIENTS = (ROOT / "docs" / "teacache_coefficients.md").read_text()


def run(script: str, cwd: Path) -> str:
    """What `python examples/<script>` prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def blocks(language: str, text: str) -> list[str]:
    """A text's code blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_pipeline(tmp_path: Path) -> None:
    output = run("pipeline.py", cwd=tmp_path)
    assert "without a cache: 300 block calls" in output
    assert "with the cache:  60 block calls" in output
    assert "last generation: 10 steps computed, 40 not" in output
    assert "the same picture again: True" in output
    difference = float(re.search(r"of a pixel: ([\d.]+)", output)[1])  # type: ignore[index]
    assert 0 < difference < 0.01


def test_own_strategy(tmp_path: Path) -> None:
    output = run("own_strategy.py", cwd=tmp_path)
    scores = re.findall(r"^(.+?) +10 of 50 steps computed, ([\d.]+) dB", output, re.MULTILINE)
    decibels = {name: float(score) for name, score in scores}
    assert list(decibels) == ["deepcache", "taylorcache", "dampedline 0.5", "dampedline 0.9"]
    assert decibels["deepcache"] < decibels["dampedline 0.5"] < decibels["dampedline 0.9"]
    assert decibels["dampedline 0.9"] > 35


def test_the_graph_in_the_docs(tmp_path: Path) -> None:
    assert run("read_the_graph.py", cwd=tmp_path) in blocks("text", GRAPHS)


@pytest.mark.parametrize("strategy", ["teacache", "taylorcache"])
def test_read_the_graph_of(
    strategy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["read_the_graph.py", strategy])
    runpy.run_path(str(ROOT / "examples" / "read_the_graph.py"), run_name="__main__")
    assert "run_0 = cache_or_compute(0, run_0_compute, run_0_reuse" in capsys.readouterr().out


def test_the_code_in_the_schedules_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    names: dict[str, object] = {}
    for code in blocks("python", SCHEDULES):
        exec(compile(code, "schedules.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "10 steps computed, 10 not\nschedule: balanced, for 20 steps" in printed
    assert "16 steps computed, 34 not\nschedule: balanced, for 50 steps" in printed


def test_the_schedules_page_lists_the_presets() -> None:
    for name, preset in PRESETS.items():
        counts = [sum(preset.computes(i, n) for i in range(n)) for n in (20, 30, 50)]
        cells = " | ".join(map(str, counts))
        assert f'| `"{name}"` | {preset.ratio:g} | {cells} |' in SCHEDULES


def test_the_coefficients_page_lists_every_set() -> None:
    for name, published in TEACACHE_COEFFICIENTS.items():
        row = next(r for r in COEFFICIENTS.splitlines() if r.startswith(f'| `"{name}"`'))
        assert f"| {published.signal} |" in row
        assert published.source in row
        assert all(f"{t:g} (" in row for t in published.thresholds)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_several_devices(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "several-devices.md").read_text()
    script = str(ROOT / "examples" / "several_devices.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, "--local-addr", "127.0.0.1", "--nproc_per_node", "2", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert [result.stdout] == blocks("text", page)
