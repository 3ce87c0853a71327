"""examples/serve.py: what it prints is right; how fast it is, is for `python -m examples.serve`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
import torch

from examples import serve


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_batches_give_what_one_at_a_time_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--requests", "7", "--steps", "6", "--slots", "6", "--rounds", "1"]
    monkeypatch.setattr(serve, "SIZES", (8, 12))
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    serve.main()
    printed = capsys.readouterr().out
    assert "rows computed with a cache: 50%" in printed
    assert float(re.search(r"one at a time: ([\d.e+-]+)", printed)[1]) < 1e-4  # type: ignore[index]
    assert float(re.search(r"no cache: ([\d.]+) dB", printed)[1]) > 25  # type: ignore[index]


def test_requests_are_the_same_for_the_same_seed() -> None:
    first, again = (serve.arrivals(20, steps=4, slots=4, seed=1) for _ in range(2))
    assert [(r.size, r.arrival) for r in first] == [(r.size, r.arrival) for r in again]
    assert {r.size for r in first} == set(serve.SIZES)
    assert [r.arrival for r in first] == sorted(r.arrival for r in first)
