"""`Row`: the result of a calibration for one number of computed steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_cache_fx.calibration.candidates import describe
from dit_cache_fx.strategies import Strategy, make_strategy
from dit_cache_fx.strategies.calibrated import CalibratedSteps
from dit_cache_fx.strategies.model_signature import ModelSignature
from dit_cache_fx.strategies.options import predictor_options


@dataclass(frozen=True)
class Row:
    """The result for one number of computed steps. A PSNR is in dB, the mean over the runs.

    Attributes:
        computed (`int`):
            The number of computed steps.
        plan (`Strategy`):
            The plan.
        placement (`str`):
            The origin of its steps, in words.
        psnr (`float`):
            The PSNR to the run with every step computed.
        lowest (`float`):
            The lowest PSNR of a single sample.
        preset (`float`):
            The PSNR of the preset that computes as many steps, with known timesteps.
        plain (`float`, *optional*):
            The PSNR of the plain sampler in so many steps, if `plain` was passed.
    """

    computed: int
    plan: Strategy
    placement: str
    psnr: float
    lowest: float
    preset: float
    plain: float | None = None


def calibrated(
    predictor: Strategy, steps: frozenset[int], timesteps: tuple[float, ...], model: ModelSignature
) -> Strategy:
    """Return the plan: a predictor with the steps that it computes."""
    schedule = CalibratedSteps(steps, timesteps, model)
    return replace(predictor, no_cache_steps=None, schedule=schedule)


def row_to_json(row: Row) -> dict[str, Any]:
    """Return the result as JSON; infinities become None."""
    schedule = row.plan.schedule
    assert isinstance(schedule, CalibratedSteps)
    options = predictor_options(row.plan)
    ids = options.get("no_cache_block_id")
    if ids is not None:
        options["no_cache_block_id"] = {name: sorted(i) for name, i in ids.items()}
    return {
        "computed": row.computed,
        "strategy": row.plan.name,
        "options": options,
        "steps": sorted(schedule.steps),
        "placement": row.placement,
        "psnr": _finite(row.psnr),
        "lowest": _finite(row.lowest),
        "preset": _finite(row.preset),
        "plain": _finite(row.plain),
    }


def row_from_json(
    data: Mapping[str, Any], timesteps: tuple[float, ...], model: ModelSignature
) -> Row:
    """Return the result that `row_to_json` has written.

    `timesteps`, `model`: of the calibration. Raises KeyError or TypeError for other data.
    """
    predictor = make_strategy(data["strategy"], {**data["options"], "no_cache_steps": {0}})
    steps = frozenset(int(step) for step in data["steps"])
    if not steps <= set(range(len(timesteps))):
        raise TypeError(f"steps {sorted(steps)} of {len(timesteps)}")
    psnr, lowest, preset = (_number(data[name]) for name in ("psnr", "lowest", "preset"))
    plan = calibrated(predictor, steps, timesteps, model)
    plain = None if data["plain"] is None else float(data["plain"])
    return Row(int(data["computed"]), plan, str(data["placement"]), psnr, lowest, preset, plain)


def _finite(value: float | None) -> float | None:
    """Return None for infinities, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> float:
    return -math.inf if value is None else float(value)


def cells(row: Row) -> list[str]:
    """Return the columns of the printed table."""
    plain = "-" if row.plain is None else f"{row.plain:.1f}"
    plan = f"{describe(row.plan)}, {row.placement}"
    return [
        str(row.computed),
        f"{row.psnr:.1f}",
        f"{row.lowest:.1f}",
        f"{row.preset:.1f}",
        plain,
        plan,
    ]
