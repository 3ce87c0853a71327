"""What runs return, as numbers to compare."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_cache_fx.calibration.results import MOST_DB, Result, peak_of, psnr, result_of

A = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
B = A + 0.01


def result(value: Any, batch: int = 1) -> Result:
    return result_of(value, "run", batch)


def db(a: Any, b: Any, batch: int = 1) -> list[float]:
    whole = result(b, batch)
    return psnr(result(a), whole, peak_of([whole]), "run")


def test_the_range_of_the_reference_is_the_peak() -> None:
    assert db(B, A) == [pytest.approx(10 * math.log10(2**2 / 0.01**2), abs=1e-3)]
    assert db(100 * B, 100 * A) == [pytest.approx(10 * math.log10(2**2 / 0.01**2), abs=1e-3)]
    assert peak_of([result(A), result(A + 1)]) == pytest.approx(3.0)


def test_equal_results_and_results_that_are_no_numbers() -> None:
    assert db(A, A) == [MOST_DB]
    assert db(A * math.nan, A) == [-math.inf]


def test_the_samples_of_a_batch_are_judged_each() -> None:
    c = torch.stack([A[0] + 0.01, A[1] + 0.1])
    right = [pytest.approx(20 * math.log10(2 / e), abs=1e-3) for e in (0.01, 0.1)]
    assert db(c, A, batch=2) == right
    assert db(c, A, batch=4) == right  # guidance in a batch
    assert len(db(c, A, batch=1)) == 1
    assert len(db(c, A, batch=3)) == 1  # two channels of something


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t.numpy(),
        lambda t: [t],
        lambda t: {"sample": t, "name": "none", "more": None},
        lambda t: SimpleNamespace(images=t),
        lambda t: (t.half().float().double(), 3, "text"),
    ],
)
def test_every_container_holds_the_same_numbers(wrap: Any) -> None:
    assert db(wrap(B), wrap(A)) == pytest.approx(db(B, A), abs=0.5)


def test_several_tensors_are_judged_each() -> None:
    assert db((B, A), (A, A)) == [*db(B, A), MOST_DB]


def test_complex_numbers() -> None:
    assert db(torch.complex(B, A), torch.complex(A, A))[0] == pytest.approx(
        db(B, A)[0] + 3.01, abs=0.01
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_pictures_have_a_range_of_255(mode: str) -> None:
    image = pytest.importorskip("PIL.Image")
    dark, bright = (image.new("RGB", (4, 3), (value, 0, 0)).convert(mode) for value in (0, 255))
    (found,) = db(bright, dark)
    assert db(dark, dark) == [MOST_DB]
    assert 0 <= found < 11.1
    assert result(dark).tensors[0].shape[:2] == (3, 4)
    assert db([dark, bright], [dark, dark]) == [MOST_DB, found]
