"""`calibrate`: find the best plans for a model, its sampler and some runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from dit_cache_fx.cached_model import CachedModel, is_compiled
from dit_cache_fx.calibration.calibration import Calibration
from dit_cache_fx.calibration.candidates import candidates, predictors
from dit_cache_fx.calibration.engines import answering
from dit_cache_fx.calibration.judge import Judge, Judged, generations, winner
from dit_cache_fx.calibration.progress import Progress
from dit_cache_fx.calibration.reference import Reference, Run
from dit_cache_fx.calibration.results import psnr, result_of
from dit_cache_fx.calibration.row import Row, calibrated
from dit_cache_fx.calibration.simulate import Recorded
from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.model_signature import ModelSignature

#: the largest number of samples that the search uses
MAX_SAMPLES = 24
#: the overhead of a generation with cached steps, as a share of a whole one
_OVERHEAD = 0.15
#: the assumed number of candidates of each number of computed steps, before they are made
_USUAL = 11

Plain = Callable[[int], Sequence[Any]]


def calibrate(
    cached: CachedModel,
    runs: Sequence[Run],
    computed: int | Sequence[int] = (7, 10, 15, 25),
    *,
    plain: Plain | None = None,
    progress: bool = True,
) -> Calibration:
    """Find the best plan for each number of computed steps, for a model and the sampler in use.

    Each run is recorded once with every step computed. On the recordings, dynamic programming and
    small moves of the steps search for good schedules of each predictor. The best of these, evenly
    placed steps and the presets are then judged in real generations: by the mean over the runs of
    the PSNR in dB to the same run with every step computed. There, a plan is never worse than the
    preset with as many steps.

    Before it starts, it prints the number of generations and the expected time on standard error.
    Ctrl-C ends it early and returns the results so far. The cached model keeps its strategy and its
    state, even if a run raises; nothing else may call it meanwhile.

    Args:
        cached (`CachedModel`):
            The model that `apply` returned, in the pipeline that the runs use. Its own strategy is
            among the candidates.
        runs (`Sequence[Callable[[], Any]]`):
            Functions without arguments. Each generates once through `cached`, the same each time
            (with a generator that it seeds), and returns the result: a tensor, several, arrays, or
            PIL images. 4 to 20 samples are enough.
        computed (`int | Sequence[int]`, defaults to `(7, 10, 15, 25)`):
            The numbers of computed steps to calibrate for, each from 1 to the number of steps.
        plain (`Callable[[int], Any]`, *optional*):
            A function of each of these numbers, called with the model uncached: it returns the
            results of the plain sampler in so many steps, one for each run. For the table and the
            plot.
        progress (`bool`, defaults to `True`):
            Report the progress on standard error, with a bar if tqdm is installed.

    Returns:
        The plans, by their number of computed steps.

    Raises:
        OptionError: An argument cannot work, or a run does not call the cached model, returns
            nothing, differs from one time to the next, or has timesteps of its own.

    Example:
        >>> runs = [lambda seed=seed: generate(cached, seed) for seed in range(2)]
        >>> calibration = dit_cache_fx.calibrate(cached, runs, computed=(4, 6))
        >>> faster = dit_cache_fx.apply(model, calibration.plan(4))
    """
    cached = _checked_model(cached)
    runs = _checked_runs(runs)
    numbers = _checked_numbers(computed)
    if plain is not None and not callable(plain):
        raise OptionError("plain", plain, "a function that takes a number of steps")
    bar = Progress(progress)
    try:
        return _Calibrating(cached, runs, numbers, plain, bar).run()
    finally:
        bar.end()


class _Calibrating:
    """One calibration under way."""

    def __init__(
        self,
        cached: CachedModel,
        runs: Sequence[Run],
        numbers: Sequence[int],
        plain: Plain | None,
        progress: Progress,
    ) -> None:
        self._cached = cached
        self._runs = runs
        self._numbers = numbers
        self._plain = plain
        self._progress = progress
        self._reference = Reference(cached, runs)

    def run(self) -> Calibration:
        self._record()
        rows: list[Row] = []
        try:
            self._judge(rows)
        except KeyboardInterrupt:
            if not rows:
                raise
            missing = [n for n in self._numbers if n not in {row.computed for row in rows}]
            self._progress.tell(f"interrupted: no plan for {missing} computed steps")
        return Calibration(self._signature(), self._reference.timesteps, len(self._runs), (*rows,))

    def _record(self) -> None:
        reference = self._reference
        reference.record()
        steps = len(reference.timesteps)
        if max(self._numbers) > steps:
            told = f"at most {steps}, the number of steps of a generation of runs[0]"
            raise OptionError("computed", list(self._numbers), told)
        reference.check_repeats()
        self._tell()
        for _ in self._runs[1:]:
            reference.record()
            self._progress.advance("recorded")

    def _tell(self) -> None:
        """Report the expected time."""
        runs, steps, seconds = len(self._runs), len(self._reference.timesteps), 0.0
        each = generations(_USUAL, runs)
        total = (runs - 1) + each * len(self._numbers)
        for number in self._numbers:
            seconds += each * (number / steps + _OVERHEAD) * self._reference.seconds
        seconds += (runs - 1) * self._reference.seconds
        self._progress.tell(
            f"calibrating for {list(self._numbers)} computed steps of {steps}: about {total} more "
            f"generations, {runs - 1} of them with every step computed, in about {seconds:.0f} s "
            f"(a whole one takes {self._reference.seconds:.2g} s)"
        )
        self._progress.begin(total)

    def _judge(self, rows: list[Row]) -> None:
        reference = self._reference
        own = self._cached._engine.subject.strategy
        recorded = Recorded.of(reference.timesteps, reference.trajectories, MAX_SAMPLES)
        tried = candidates(
            recorded, predictors(own, reference.timesteps), reference.timesteps, self._numbers
        )
        if reference.ranks is not None:  # all judge those that the first one has found
            tried = reference.ranks.of_all(tried)[0]
        judge = Judge(self._cached, self._runs, reference, self._progress)
        for number in self._numbers:
            judged = [Judged(candidate) for candidate in tried[number]]
            try:
                judge.judge(judged)
                rows += self._row(number, judged, self._plain)
            except KeyboardInterrupt:
                rows += self._row(number, judged, plain=None)
                raise

    def _row(self, number: int, judged: Sequence[Judged], plain: Plain | None) -> list[Row]:
        best = winner(judged, len(self._runs))
        if best is None:
            return []
        whole = [entry for entry in judged if len(entry.scores) == len(self._runs)]
        preset = next((entry.mean for entry in whole if entry.candidate.preset), best.mean)
        row = Row(
            number,
            calibrated(
                best.candidate.predictor,
                best.candidate.steps,
                self._reference.timesteps,
                self._signature(),
            ),
            best.candidate.placement,
            best.mean,
            min(best.samples),
            preset,
            None if plain is None else self._plain_psnr(plain, number),
        )
        return [row]

    def _plain_psnr(self, plain: Plain, number: int) -> float:
        name = f"plain({number})"
        with answering(self._cached, None):
            values = plain(number)
        reference, expected = self._reference, f"a list of {len(self._runs)} results, one a run"
        if not isinstance(values, Sequence) or len(values) != len(self._runs):
            raise OptionError(name, repr(values)[:60], expected)
        found = [
            fmean(psnr(result_of(value, name, 1, expected), whole, reference.peak, name))
            for value, whole in zip(values, reference.results, strict=True)
        ]
        return fmean(found)

    def _signature(self) -> ModelSignature:
        entry = self._reference.engine.graphs.all()[-1]
        return ModelSignature.of(self._cached._model, entry.program.block_lists)


def _checked_model(cached: Any) -> CachedModel:
    cached = cached._orig_mod if is_compiled(cached) else cached
    if not isinstance(cached, CachedModel):
        raise OptionError(
            "cached", type(cached).__name__, "the model that dit_cache_fx.apply returned"
        )
    return cached


def _checked_runs(runs: Any) -> list[Run]:
    expected = "functions without arguments, each of which generates once through the cached model"
    given = list(runs) if isinstance(runs, Iterable) else [runs]
    if not given or not all(map(callable, given)):
        raise OptionError("runs", repr(runs)[:60], expected)
    return given


def _checked_numbers(computed: Any) -> list[int]:
    numbers = [computed] if isinstance(computed, int) else computed
    expected = "the numbers of steps to compute in full: integers from 1, at least one"
    if not isinstance(numbers, Iterable) or isinstance(numbers, str):
        raise OptionError("computed", computed, expected)
    found = [_number(number) for number in numbers]
    if not found or min(found) < 1:
        raise OptionError("computed", computed, expected)
    return sorted(set(found))


def _number(value: Any) -> int:
    """Return the value as an integer; 0 if it is none."""
    if isinstance(value, bool):
        return 0
    try:
        return operator.index(value)
    except TypeError:
        return 0
