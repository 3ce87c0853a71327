"""What the pictures of the two trained models are like with few steps computed, and the tables.

Each floor is 2 dB or more below what was measured for these seeds.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from examples.few_steps.__main__ import PAGES, RESULTS
from examples.few_steps.measure import COMPUTED, PLAIN, even_indexes
from examples.few_steps.tables import ROWS, TABLES, fill, needed
from examples.few_steps.task import MODELS, Task
from examples.flow.sampling import adams_bashforth2, times

STEPS, SHIFT, FEW = 50, 3, 10


@cache
def task(model: str) -> Task:
    return Task.of(model, 3, [31, 32])


FLOORS = {"digits": 48.0, "shapes": 48.0}


@pytest.mark.parametrize("model", MODELS)
def test_ten_of_fifty_steps(model: str) -> None:
    given = task(model)
    best, computed = given.cached("newtoncache", STEPS, SHIFT, computed_steps=FEW)
    steps = even_indexes(STEPS, FEW)
    published, _ = given.cached("taylorcache", STEPS, SHIFT, no_cache_steps=steps)
    plain = max(given.sampled(sampler, FEW, STEPS, SHIFT) for sampler in PLAIN.values())
    assert computed == FEW
    assert best > FLOORS[model]
    assert best > published + 1
    assert best > plain + 10


@pytest.mark.parametrize("model", MODELS)
def test_a_tolerance_is_worth_its_steps(model: str) -> None:
    """Better than the published way with as many steps."""
    given = task(model)
    best, computed = given.cached("newtoncache", STEPS, SHIFT, tolerance=0.005)
    steps = even_indexes(STEPS, computed)
    published, _ = given.cached("taylorcache", STEPS, SHIFT, no_cache_steps=steps)
    assert 10 < computed < 25
    assert best > max(published + 2, 50)


# --- samplers -------------------------------------------------------------------------------------


def test_adams_bashforth_2_solves_a_line_exactly_at_uneven_times() -> None:
    """From its second step on: dx/dt = t from 1 to 0, whose first step is Euler's."""
    at = times(5, 3)
    start = torch.zeros(1)
    got = adams_bashforth2(lambda x, t: torch.full_like(x, t), start, at)
    first = (at[1] - at[0]) * at[0]
    assert float(got) == pytest.approx(first + (at[-1] ** 2 - at[1] ** 2) / 2)


# --- tables ---------------------------------------------------------------------------------------


def test_needed_steps_are_on_the_line_between_those_measured() -> None:
    row = [40.0, 43.0, 48.0, 58.0]
    assert [needed(row, goal) for goal in (39, 43, 45, 60)] == ["up to 7", "10", "12", "over 25"]
    assert COMPUTED == (7, 10, 15, 25)


def test_a_table_is_written_in_the_place_of_the_old_one() -> None:
    page = "a\n<!-- few_steps: goals -->\n| old |\n| --- |\n\nb\n"
    figures: dict[str, Any] = {"one": {"scores": {"3": dict.fromkeys(ROWS, [1.0] * 4)}}}
    filled = fill(page, figures)
    assert "old" not in filled
    assert filled.startswith("a\n<!-- few_steps: goals -->\n| computed steps for | 40 dB |")
    assert filled.endswith("|\n\nb\n")
    assert fill(filled, figures) == filled


def test_the_pages_show_the_figures_that_were_measured() -> None:
    known = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in MODELS}
    texts = {page: page.read_text() for page in PAGES}
    assert [page.name for page, text in texts.items() if fill(text, known) != text] == []
    assert all(any(f"few_steps: {name} " in text for text in texts.values()) for name in TABLES)
