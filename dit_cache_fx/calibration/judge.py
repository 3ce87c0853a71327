"""Judge candidates in whole generations: few runs for all of them, all runs for the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.calibration.candidates import Candidate, describe
from dit_cache_fx.calibration.engines import CandidateEngine, answering
from dit_cache_fx.calibration.progress import Progress
from dit_cache_fx.calibration.reference import Reference, Run
from dit_cache_fx.calibration.results import psnr, result_of

#: the share of the runs that each round uses, and the number of candidates besides the preset that
#: take part; all candidates do in the first
ROUNDS = ((0.15, math.inf), (0.4, 4), (1, 2))
#: the least gain over the preset in dB, if too few samples show how certain it is
LEAST_GAIN = 0.3
#: the number of samples from which on their spread is meaningful
_ENOUGH = 4


@dataclass(eq=False)
class Judged:
    """A candidate, and the PSNR in dB of each sample of its runs."""

    candidate: Candidate
    scores: list[list[float]] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        return [score for run in self.scores for score in run]

    @property
    def runs(self) -> list[float]:
        """The mean of each run."""
        return [fmean(run) for run in self.scores]

    @property
    def mean(self) -> float:
        """The mean over the runs."""
        return fmean(self.runs) if self.scores else -math.inf


class Judge:
    """Judges candidates in generations of the cached model, against the reference."""

    def __init__(
        self, cached: CachedModel, runs: Sequence[Run], reference: Reference, progress: Progress
    ) -> None:
        self._cached = cached
        self._runs = runs
        self._reference = reference
        self._progress = progress
        self._engines: dict[str, CandidateEngine] = {}

    def judge(self, judged: Sequence[Judged]) -> None:
        """Judge them in rounds; those left in the last one are judged on all runs."""
        for share, most in ROUNDS:
            upto = math.ceil(share * len(self._runs))
            for entry in leading(judged, most):
                for run in range(len(entry.scores), upto):
                    entry.scores.append(self._agreed(self._scores(entry.candidate, run)))

    def _agreed(self, scores: list[float]) -> list[float]:
        """Return the scores of all processes: they choose alike, by all samples."""
        ranks = self._reference.ranks
        if ranks is None:
            return scores
        each = ranks.of_all(scores)
        return [s for own in each for s in own] if ranks.own_calls else each[0]

    def _scores(self, candidate: Candidate, run: int) -> list[float]:
        reference, name = self._reference, f"runs[{run}]"
        engine, predictor = self._engine(candidate), candidate.predictor
        engine.follow(
            replace(predictor, no_cache_steps=candidate.steps, timesteps=reference.timesteps)
        )
        try:
            with answering(self._cached, engine):
                value = self._runs[run]()
        finally:
            engine.clear_states()
        self._progress.advance(f"{len(candidate.steps)} steps")
        reference.check_start(run, engine.start)
        whole = reference.results[run]
        return psnr(result_of(value, name, whole.batch), whole, reference.peak, name)

    def _engine(self, candidate: Candidate) -> CandidateEngine:
        key = describe(candidate.predictor)
        if key not in self._engines:
            self._engines[key] = CandidateEngine(self._reference.engine, candidate.predictor)
        return self._engines[key]


def generations(candidates: int, runs: int) -> int:
    """Return the number of generations that it takes to judge so many candidates."""
    total, before = 0, 0
    for share, most in ROUNDS:
        upto = math.ceil(share * runs)
        total += int(min(candidates, 1 + most)) * (upto - before)
        before = upto
    return total


def leading(judged: Sequence[Judged], most: float) -> Sequence[Judged]:
    """Return all of them, or the preset and the best `most` of the others."""
    if math.isinf(most):
        return judged
    ranked = sorted(judged, key=lambda entry: -entry.mean)
    presets = [entry for entry in ranked if entry.candidate.preset]
    others = [entry for entry in ranked if not entry.candidate.preset]
    return [*presets, *others[: int(most)]]


def winner(judged: Sequence[Judged], runs: int) -> Judged | None:
    """Return the best of those that were judged on all runs; None if there is none.

    The preset wins unless another one is better by more than chance: by more than the standard
    error of its gain over the samples.
    """
    ready = [entry for entry in judged if len(entry.scores) == runs]
    best = max(ready, key=lambda entry: entry.mean, default=None)
    preset = next((entry for entry in ready if entry.candidate.preset), None)
    if best is None or preset is None:
        return best
    gains = [a - b for a, b in zip(best.samples, preset.samples, strict=True)]
    return best if fmean(gains) > _chance(gains) else preset


def _chance(gains: Sequence[float]) -> float:
    if len(gains) < _ENOUGH:
        return LEAST_GAIN
    return stdev(gains) / math.sqrt(len(gains))
