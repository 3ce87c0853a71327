"""The examples run as their headers say, and the README shows what they print."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def run(script: str, cwd: Path) -> str:
    """What `python examples/<script>` prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def blocks(language: str) -> list[str]:
    """The README's code blocks of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


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


def test_the_graph_in_the_readme(tmp_path: Path) -> None:
    assert run("read_the_graph.py", cwd=tmp_path) in blocks("text")


@pytest.mark.parametrize("strategy", ["teacache", "taylorcache"])
def test_read_the_graph_of(
    strategy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["read_the_graph.py", strategy])
    runpy.run_path(str(ROOT / "examples" / "read_the_graph.py"), run_name="__main__")
    assert "run_0 = cache_or_compute(0, run_0_compute, run_0_reuse" in capsys.readouterr().out
