"""The runs with every step computed: the reference for candidates."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.calibration.engines import RecordingEngine, answering
from dit_cache_fx.calibration.record import Recorder, Trajectory
from dit_cache_fx.calibration.results import Result, peak_of, psnr, result_of
from dit_cache_fx.errors import OptionError
from dit_cache_fx.ranks import Ranks
from dit_cache_fx.runtime.call_log import CallLog
from dit_cache_fx.strategies import DeepCache

Run = Callable[[], Any]

#: a run is reproducible if its two results are nearer than this (dB)
_SAME_DB = 60.0
#: the share of its size by which a run's first sample may differ from time to time
_SAME_START = 1e-2


class Reference:
    """The results and the recordings of the runs, one after another.

    `engine`: has the captures. `seconds`: the time of an uncached generation.
    """

    def __init__(self, cached: CachedModel, runs: Sequence[Run]) -> None:
        own = cached._engine
        strategy = own.subject.strategy
        self._strategy = DeepCache(
            compute_ratio=1.0,
            no_cache_block_id=strategy.no_cache_block_id,
            process_group=strategy.process_group,
        )
        self._cached = cached
        self._runs = runs
        self.engine = RecordingEngine(own, self._strategy, Recorder())
        self.results: list[Result] = []
        self.timesteps: tuple[float, ...] = ()
        self.trajectories: list[Trajectory] = []
        self._starts: list[torch.Tensor | None] = []
        self.seconds = 0.0

    @property
    def peak(self) -> float:
        """The range of the results' numbers."""
        return peak_of(self.results)

    @property
    def ranks(self) -> Ranks | None:
        """The processes that run the model together."""
        return self.engine.graphs.ranks

    def record(self) -> None:
        """Run the next one with every step computed.

        Raises `OptionError` if it does not call the cached model, returns nothing, or has other
        timesteps than the runs before.
        """
        name, recorder = f"runs[{len(self.results)}]", Recorder()
        self.engine.call_log, self.engine.listener = CallLog(self._strategy), recorder
        try:
            with answering(self._cached, self.engine):
                value = self._runs[len(self.results)]()
        finally:
            self.engine.clear_states()
        found = recorder.timesteps
        if not found:
            raise OptionError(name, "no call of the cached model", _NOT_CALLED)
        self.timesteps = self.timesteps or found[0]
        self._check_timesteps(name, found)
        result = result_of(value, name, recorder.batch)
        if not all(bool(t.isfinite().all()) for t in result.tensors):
            raise OptionError(name, "results that are not finite", "numbers, with no step reused")
        self.results.append(result)
        self.trajectories += recorder.trajectories()
        self._starts.append(recorder.start)

    def check_repeats(self) -> None:
        """Run the first one again, uncached. Raises `OptionError` if its result differs."""
        began = time.perf_counter()
        with answering(self._cached, None):
            again = result_of(self._runs[0](), "runs[0]", self.results[0].batch)
        self.seconds = time.perf_counter() - began
        same = fmean(psnr(again, self.results[0], self.peak, "runs[0]"))
        if same < _SAME_DB:
            told = f"results that are {same:.1f} dB apart when it is called twice"
            raise OptionError("runs[0]", told, _SAME_EACH_TIME)

    def check_start(self, run: int, start: torch.Tensor | None) -> None:
        """Raise `OptionError` if a run began with another sample than when it was recorded."""
        before = self._starts[run]
        if start is None or before is None or start.shape != before.shape:
            return
        apart = float((start - before).norm() / before.norm().clamp(min=1e-30))
        if not apart <= _SAME_START:
            told = f"first samples that differ by {apart:.0%} when it is called twice"
            raise OptionError(f"runs[{run}]", told, _SAME_EACH_TIME)

    def _check_timesteps(self, name: str, found: Sequence[tuple[float, ...]]) -> None:
        for timesteps in found:
            if timesteps != self.timesteps:
                told = f"a generation of {_span(timesteps)}"
                raise OptionError(
                    name,
                    told,
                    f"the timesteps of the first generation, {_span(self.timesteps)}, in every "
                    "generation of every run: a plan is for one sampler and number of steps",
                )


_NOT_CALLED = (
    "a whole generation through the calibrated model: put that model into the pipeline that the "
    "run uses, in evaluation mode"
)
_SAME_EACH_TIME = (
    "the same result each time it is called, so that results can be compared: pass a generator "
    "with a seed that the function creates itself"
)


def _span(timesteps: Sequence[float]) -> str:
    if not timesteps:
        return "unknown timesteps"
    return f"{len(timesteps)} steps from {timesteps[0]:g} to {timesteps[-1]:g}"
