"""The figures of the tables: what is measured of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from examples.few_steps.task import Task
from examples.flow.sampling import Sampler, adams_bashforth2, euler

STEPS = 50
COMPUTED = (7, 10, 15, 25)
SHIFTS = (1, 3, 5)
PRESETS = ("quality", "balanced", "fast")
RUNS = (20, 50)  # steps of a generation with a preset
TOLERANCES = (0.01, 0.005, 0.0025)

PLAIN: Mapping[str, Sampler] = {
    "Euler, as many steps": euler,
    "Adams-Bashforth 2, as many steps": adams_bashforth2,
}
PUBLISHED = "TaylorCache, even in index"
#: beside the two above: the strategy and its options
CACHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "TaylorCache": ("taylorcache", {}),
    "TaylorCache, order 1, corrector 0.5": ("taylorcache", {"max_order": 1, "corrector": 0.5}),
    "NewtonCache": ("newtoncache", {}),
}
#: measured at a shift of 3 alone
OTHERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DeepCache": ("deepcache", {}),
    "TeaCache": ("teacache", {}),
    "TaylorCache, order 1 (and FoCa)": ("taylorcache", {"max_order": 1}),
    "TaylorCache, corrector 0.5": ("taylorcache", {"corrector": 0.5}),
    "HiCache": ("hicache", {}),
    "Exponential": ("exponential", {}),
    "NewtonCache, no corrector": ("newtoncache", {"corrector": 0}),
    "NewtonCache, curvature 1": ("newtoncache", {"curvature": 1}),
    "NewtonCache, axis timestep": ("newtoncache", {"axis": "timestep"}),
}

Figures = dict[str, Any]


def even_indexes(steps: int, computed: int) -> set[int]:
    """Computed steps that are evenly spaced by their index, the first and the last among them."""
    return {round(i * (steps - 1) / (computed - 1)) for i in range(computed)}


def scores(task: Task, shift: float) -> Iterator[tuple[str, list[float]]]:
    """The table's rows at a shift: decibels for each number of computed steps."""

    def row(score: Callable[[int], float]) -> list[float]:
        return [round(score(computed), 2) for computed in COMPUTED]

    def placed(name: str, options: Mapping[str, Any]) -> Callable[[int], float]:
        return lambda k: task.cached(name, STEPS, shift, computed_steps=k, **options)[0]

    for name, sampler in PLAIN.items():
        yield name, row(lambda k, s=sampler: task.sampled(s, k, STEPS, shift))  # type: ignore[misc]
    yield (
        PUBLISHED,
        row(
            lambda k: task.cached(
                "taylorcache", STEPS, shift, no_cache_steps=even_indexes(STEPS, k)
            )[0]
        ),
    )
    for name, (strategy, options) in {**CACHED, **(OTHERS if shift == 3 else {})}.items():
        yield name, row(placed(strategy, options))


def presets(task: Task, shift: float) -> Iterator[Figures]:
    """What each preset gives, with NewtonCache, beside plain samplers of as many steps."""
    for steps in RUNS:
        for preset in PRESETS:
            known, computed = task.cached("newtoncache", steps, shift, schedule=preset)
            unknown, _ = task.cached("newtoncache", steps, shift, known=False, schedule=preset)
            plain = [task.sampled(s, computed, steps, shift) for s in PLAIN.values()]
            found = [round(score, 2) for score in (*plain, unknown, known)]
            yield {"preset": preset, "steps": steps, "computed": computed, "decibels": found}


def tolerances(task: Task, shift: float) -> Iterator[Figures]:
    """What each tolerance computes and gives, with NewtonCache."""
    for tolerance in TOLERANCES:
        score, computed = task.cached("newtoncache", STEPS, shift, tolerance=tolerance)
        yield {"tolerance": tolerance, "computed": computed, "decibels": round(score, 2)}


def figures(task: Task, done: Callable[[str], None]) -> Figures:
    """All of a model. `done` is told what has been measured."""
    found: Figures = {"scores": {}, "presets": {}, "tolerances": {}}
    for shift in SHIFTS:
        rows: dict[str, list[float]] = found["scores"].setdefault(str(shift), {})
        for name, row in scores(task, shift):
            rows[name] = row
            done(f"shift {shift}, {name}: {row}")
        for part, measure in (("presets", presets), ("tolerances", tolerances)):
            found[part][str(shift)] = list(measure(task, shift))
            done(f"shift {shift}, {part}")
    return found
