"""Batches of sessions through `backend()`, where Dynamo has made the number of rows dynamic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_cache_fx
from dit_cache_fx import CaptureError, DeepCache, OptionError, Strategy, TaylorCache, TeaCache
from tests.dynamo.inner import Inner
from tests.runtime.batch.serving import Serving, joined
from tests.runtime.batch.test_refusals import MixingDiT
from tests.toys import ToyDiT, make


def serving_of(
    strategy: Strategy, model: Any = None, dynamic: bool | None = True, **options: Any
) -> tuple[Serving, Inner]:
    """The batches go through the backend, the requests alone through `apply`."""
    model = model or make(ToyDiT)
    serving, inner = Serving(model, strategy, **options), Inner()
    cache = dit_cache_fx.backend(strategy, inner=inner)
    serving.cached = cache  # type: ignore[assignment]
    serving.called = torch.compile(model, backend=cache, dynamic=dynamic)
    serving.sessions = [cache.new_session() for _ in serving.sessions]
    return serving, inner


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(DeepCache(no_cache_steps={0, 2, 3}), marks=pytest.mark.exhaustive),
        TaylorCache(no_cache_steps={0, 2, 3}, corrector=0.5),
        TeaCache(rel_l1_thresh=1.0),
    ],
    ids=lambda strategy: strategy.name,
)
def test_rows_get_what_they_get_alone(strategy: Strategy) -> None:
    serving, _ = serving_of(strategy, smooth=True, requests=6)
    for requests in [(0, 1, 2), (2, 1, 0), (3, 0, 1, 2), (4, 3, 5), (5, 0), (1, 2, 3, 4, 5)] * 2:
        serving.step(*requests)
    assert min(serving.same_counts()) > 4


def test_graphs_are_one_for_each_power_of_two() -> None:
    serving, inner = serving_of(DeepCache(no_cache_steps={0, 2, 4}), requests=9)
    for count in (9, 5, 3, 7, 2, 8, 4, 6) * 3:
        serving.step(*range(count))
    compiled = len(inner.graphs)
    assert compiled <= 2 * 4  # of 1, 2, 4 and 8 rows
    for count in (2, 9, 3, 8):
        serving.step(*range(count))
    assert len(inner.graphs) == compiled
    assert min(serving.same_counts()) > 20


def test_one_session_is_a_batch_too() -> None:
    """Dynamo makes a graph of its own for one row; what is held is another one's then."""
    serving, _ = serving_of(DeepCache(no_cache_steps={0}), requests=2)
    serving.step(0)
    serving.step(0)
    assert serving.cached.cache_report().calls_reused == 1


def test_branches_of_guidance() -> None:
    serving, _ = serving_of(DeepCache(no_cache_steps={0, 2}), requests=3)
    for _ in range(4):
        serving.tick(0, 1, 2, context="cond")
        serving.step(0, 1, 2, context="uncond")
    assert serving.same_counts() == (12, 12)


def test_a_graph_for_one_number_of_rows_is_refused() -> None:
    serving, _ = serving_of(DeepCache(no_cache_steps={0}), requests=3, dynamic=False)
    call = joined([serving.inputs(request) for request in range(3)])
    with (
        serving.cached.batch(serving.sessions),
        pytest.raises(OptionError, match=r"sessions='3 of them'.*dynamic=True"),
    ):
        serving.called(**call)


def test_what_mixes_rows_is_refused() -> None:
    serving, _ = serving_of(DeepCache(no_cache_steps={0}), make(MixingDiT), requests=3)
    call = joined([serving.inputs(request) for request in range(3)])
    with serving.cached.batch(serving.sessions), pytest.raises(CaptureError, match="mixes rows"):
        serving.called(**call)


def test_a_batch_of_another_number_of_rows_is_refused() -> None:
    serving, _ = serving_of(DeepCache(no_cache_steps={0}), requests=3)
    call = joined([serving.inputs(request) for request in range(2)])
    with (
        serving.cached.batch(serving.sessions),
        pytest.raises(OptionError, match=r"no argument has as many rows: .*\[2, 6, 8\]"),
    ):
        serving.called(**call)
