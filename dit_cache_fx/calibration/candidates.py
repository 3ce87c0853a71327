"""The candidates of a calibration: predictors, and the steps that they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_cache_fx.calibration.programme import best_schedules
from dit_cache_fx.calibration.search import improved
from dit_cache_fx.calibration.simulate import Recorded
from dit_cache_fx.strategies import NewtonCache, Strategy, TaylorCache
from dit_cache_fx.strategies.even import EvenTimesteps, evenly_spaced
from dit_cache_fx.strategies.options import predictor_options
from dit_cache_fx.strategies.registry import BY_NAME

#: the number of predictors whose steps are searched, and of candidates of each kind to judge
SEARCHED = 8
JUDGED = 4
#: the origins of candidates' steps
EVEN_TIMESTEP, EVEN_INDEX, SEARCH = "even in timestep", "even in index", "searched"


@dataclass(frozen=True)
class Candidate:
    """A predictor (a strategy without its schedule), and the steps that it computes.

    `preset`: it equals a preset that computes as many steps.
    """

    predictor: Strategy
    steps: frozenset[int]
    placement: str
    preset: bool = False

    def __str__(self) -> str:
        return f"{describe(self.predictor)}, {self.placement}"


def predictors(own: Strategy, timesteps: Sequence[float]) -> list[Strategy]:
    """Return every predictor to try, each once: first the default, then the model's own.

    All of them leave the same blocks uncached as `own` does. The axis makes no difference if the
    timesteps are evenly spaced.
    """
    moves = torch.tensor(timesteps, dtype=torch.float64).diff()
    even = len(timesteps) < 3 or torch.allclose(moves, moves[0].expand_as(moves), rtol=1e-3)
    axes = ("step",) if even else ("step", "timestep")
    kinds: list[tuple[type[TaylorCache], int]] = [
        (TaylorCache, 1),
        (TaylorCache, 2),
        (NewtonCache, 2),
    ]
    common: dict[str, Any] = {
        "no_cache_steps": {0},
        "no_cache_block_id": own.no_cache_block_id,
        "process_group": own.process_group,
    }
    tried: list[Strategy] = [TaylorCache(**common), *_own(own)]
    for corrector in (0.5, 1.0, 0.0):
        for kind, order in kinds:
            for axis in axes:
                tried.append(kind(max_order=order, corrector=corrector, axis=axis, **common))
    once: dict[str, Strategy] = {}
    for strategy in tried:
        once.setdefault(describe(strategy), strategy)
    return list(once.values())


def _own(own: Strategy) -> Iterator[Strategy]:
    """Yield the model's own strategy without its schedule, if it needs nothing else to decide."""
    if own.has_rule or own.whole_model or BY_NAME.get(own.name) is not type(own):
        return
    yield replace(
        own,
        no_cache_steps=frozenset({0}),
        compute_ratio=None,
        schedule=None,
        computed_steps=None,
        num_steps=None,
        timesteps=None,
    )


def linear(predictor: Strategy) -> bool:
    """Return whether its predictions are linear in the computed values, element by element."""
    return isinstance(predictor, TaylorCache) and len(predictor.orders) == 1


def candidates(
    recorded: Recorded | None,
    predictors: Sequence[Strategy],
    timesteps: Sequence[float],
    computed: Sequence[int],
) -> dict[int, list[Candidate]]:
    """Return the candidates for each number of computed steps, the most promising first.

    They include the preset, which is the default predictor evenly placed by timestep, and its
    behaviour with unknown timesteps: evenly placed by index.
    """
    programme = {} if recorded is None else _programme(recorded, computed)
    return {
        count: _for_count(recorded, predictors, timesteps, count, programme.get(count, ()))
        for count in computed
    }


def _for_count(
    recorded: Recorded | None,
    predictors: Sequence[Strategy],
    timesteps: Sequence[float],
    count: int,
    found: Iterable[frozenset[int]],
) -> list[Candidate]:
    steps, even = len(timesteps), evenly_spaced(timesteps, count)
    index = frozenset(s for s in range(steps) if EvenTimesteps(count).computes(s, steps))
    always = [
        Candidate(predictors[0], even, EVEN_TIMESTEP, preset=True),
        Candidate(predictors[0], index, EVEN_INDEX),
    ]
    usable = [p for p in predictors if linear(p)]
    always += [Candidate(p, even, EVEN_TIMESTEP) for p in predictors if not linear(p)]
    if count == steps:
        return always[:1]
    if recorded is None:
        placed = [Candidate(p, even, EVEN_TIMESTEP) for p in usable[: 2 * JUDGED]]
        return _once([*always, *placed])
    starts = [even, index, *found]
    masks = torch.stack([_mask(start, steps) for start in starts])
    scored = [(p, recorded.score(p, masks)) for p in usable]
    by_even = sorted(scored, key=lambda pair: -float(pair[1][0]))
    placed = [Candidate(p, even, EVEN_TIMESTEP) for p, _ in by_even[:JUDGED]]
    by_best = sorted(scored, key=lambda pair: -float(pair[1].max()))[:SEARCHED]
    searched = [(p, *improved(recorded, p, masks[int(s.argmax())])) for p, s in by_best]
    searched.sort(key=lambda entry: -entry[2])
    best = [Candidate(p, _steps(mask), SEARCH) for p, mask, _ in searched[:JUDGED]]
    return _once([*always, *_alternately(best, placed)])


def _programme(recorded: Recorded, computed: Sequence[int]) -> dict[int, list[frozenset[int]]]:
    """Return the best schedules of straight lines over the steps, and over the timesteps."""
    steps = len(recorded.timesteps)
    even = torch.arange(steps, dtype=torch.float64)
    times = torch.tensor(recorded.timesteps, dtype=torch.float64)
    found: dict[int, list[frozenset[int]]] = {count: [] for count in computed}
    for axis in (even, times):
        for count, best in best_schedules(recorded, axis, computed).items():
            found[count].append(best)
    return found


def _alternately(first: list[Candidate], second: list[Candidate]) -> list[Candidate]:
    return [c for pair in zip(first, second, strict=True) for c in pair]


def _once(all_candidates: Sequence[Candidate]) -> list[Candidate]:
    known: dict[tuple[str, frozenset[int]], Candidate] = {}
    for candidate in all_candidates:
        known.setdefault((describe(candidate.predictor), candidate.steps), candidate)
    return list(known.values())


def _mask(steps: frozenset[int], number: int) -> Tensor:
    mask = torch.zeros(number, dtype=torch.bool)
    mask[sorted(steps)] = True
    return mask


def _steps(mask: Tensor) -> frozenset[int]:
    return frozenset(mask.nonzero().flatten().tolist())


def describe(strategy: Strategy) -> str:
    """Return a strategy's name, and its options with other values than the defaults."""
    options = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in predictor_options(strategy).items()
        if name != "no_cache_block_id"
    ]
    return ", ".join([strategy.name, *options])
