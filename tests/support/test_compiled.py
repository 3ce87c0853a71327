"""The ways to compile on every class of the support table, judged against the model itself.

Computed steps are those of the uncached model, the others those of the eager cached model, within
what a compiler may round. A graph break is none of ours: there are as many as without a cache.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import dit_cache_fx
from dit_cache_fx import DitCacheWarning
from tests.compile.compiling import new_compiler
from tests.support.case import SupportCase
from tests.support.checks import CLOSE, COMPUTED, Seen, error_of
from tests.support.classes import SUPPORT

__all__ = ["new_compiler"]

#: Dynamo splits these inside the trunk: their forward has a loop that breaks the graph, so that
#: Dynamo gives up all of it and compiles each block, or what is in it, by itself
SPLIT = frozenset(
    {
        "HiDreamImageTransformer2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "MochiTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "WanAnimate2Transformer3DModel",
    }
)
#: these are no single graph without a cache either
NOT_WHOLE = frozenset(
    {
        "HiDreamImageTransformer2DModel",
        "OmniGenTransformer2DModel",
        "WanAnimate2Transformer3DModel",
    }
)

pytestmark = [
    pytest.mark.exhaustive,  # toys have what these taught: `tests/dynamo`, `tests/compile`
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


def run(seen: Seen, model: Callable[..., Any]) -> tuple[list[torch.Tensor], int]:
    """The output of each step, and how often a graph broke."""
    torch._dynamo.reset()
    counters.clear()
    outputs, _ = seen.subject.generation(model, Counter())
    return outputs, sum(counters["graph_break"].values())


def assert_close(seen: Seen, outputs: list[torch.Tensor]) -> None:
    for step, (got, cached) in enumerate(zip(outputs, seen.outputs, strict=True)):
        want = seen.subject.exact[step] if step in COMPUTED else cached
        assert error_of(got, want) <= CLOSE, f"step {step}"


@pytest.mark.parametrize("case", SUPPORT, ids=lambda case: case.name)
def test_backend(case: SupportCase) -> None:
    seen = Seen(case)
    own, breaks = run(seen, torch.compile(seen.subject.model, backend="aot_eager"))
    cache = dit_cache_fx.backend(
        "deepcache", inner="aot_eager", timestep=case.timestep, no_cache_steps=COMPUTED
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DitCacheWarning)
        outputs, more = run(seen, torch.compile(seen.subject.model, backend=cache))
    said = [str(w.message) for w in caught if issubclass(w.category, DitCacheWarning)]
    assert more == breaks
    if case.name in SPLIT:
        (text,) = said
        assert "Dynamo splits the model" in text
        assert "dit_cache_fx.apply(" in text
        assert not cache.cache_report().captures
        assert max(map(error_of, outputs, own)) <= CLOSE
        return
    assert said == []
    assert_close(seen, outputs)
    steps = [r.step for r in cache.cache_report().timeline if r.action == "computed"]
    assert steps == sorted(COMPUTED)


@pytest.mark.parametrize(
    "case", [c for c in SUPPORT if c.name not in NOT_WHOLE], ids=lambda case: case.name
)
def test_torch_compile_in_one_graph(case: SupportCase) -> None:
    seen = Seen(case)
    cached = seen.subject.cached("deepcache")
    compiled = torch.compile(cached, fullgraph=True, backend="aot_eager")
    outputs, breaks = run(seen, compiled)
    assert breaks == 0
    assert_close(seen, outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ChromaTransformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "LTX2VideoTransformer3DModel",
    ],
)
def test_backend_with_inductor(name: str) -> None:
    seen = Seen(next(c for c in SUPPORT if c.name == name))
    cache = dit_cache_fx.backend("deepcache", no_cache_steps=COMPUTED)
    outputs, _ = run(seen, torch.compile(seen.subject.model, backend=cache))
    assert max(map(error_of, outputs, seen.outputs)) <= 1e-3
