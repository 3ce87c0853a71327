"""`enable_parallelism` of diffusers."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import dit_cache_fx
from tests.distributed.models import RULED, SCHEDULED, apart, generate
from tests.distributed.pair import Pair, RankError

CONTEXT, TENSOR = {"ulysses_degree": 2}, {"tp_degree": 2}


class Outcome(NamedTuple):
    """What was done on each step, and what is held beside what one process alone holds."""

    actions: list[str]
    share: float


def spread(model: Any, config: dict[str, int]) -> Any:
    """The model, run by the two processes together."""
    import diffusers.hooks.tensor_parallel as tensor_parallel
    from diffusers import ContextParallelConfig, TensorParallelConfig

    kind = TensorParallelConfig if "tp_degree" in config else ContextParallelConfig
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    with one_accelerator():
        model.enable_parallelism(config=kind(**config))
    return model


def as_one(
    family: str, config: dict[str, int], strategy: str, options: dict[str, Any], after: bool = False
) -> Outcome:
    """A generation on the two processes, compared with one on a process alone."""
    from tests.distributed.diffusers_models import calls, made

    one = generate(dit_cache_fx.apply(made(family), strategy, **options), calls(family))
    model = made(family)
    cached = dit_cache_fx.apply(model if after else spread(model, config), strategy, **options)
    if after:
        spread(model, config)
    two = generate(cached, calls(family))
    assert two.actions == one.actions, (two.actions, one.actions)
    assert apart(two.outputs, one.outputs) < 1e-5
    return Outcome(two.actions, two.bytes_held / one.bytes_held)


def compiled(way: str, strategy: str, options: dict[str, Any]) -> bool:
    """A generation of a compiled Flux, compared with one that is not compiled."""
    from tests.distributed.diffusers_models import calls, made

    torch._dynamo.reset()
    want = generate(dit_cache_fx.apply(made("flux"), strategy, **options), calls("flux"))
    model = spread(made("flux"), CONTEXT)
    if way == "backend":
        cache: Any = dit_cache_fx.backend(strategy, inner="aot_eager", **options)
        model = torch.compile(model, backend=cache, fullgraph=True)
    else:
        cache = model = dit_cache_fx.apply(model, strategy, **options)
    if way == "compile":
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif way == "compile_steps":
        model.compile_steps(backend="aot_eager", fullgraph=True)
    got = generate(model, calls("flux"))
    assert apart(got.outputs, want.outputs) < 1e-5
    return [f"{r.step} {r.action}" for r in cache.cache_report().timeline] == want.actions


def uncached(config: dict[str, int]) -> None:
    from tests.distributed.diffusers_models import calls, made

    generate(spread(made("flux"), config), calls("flux"), steps=1)


class one_accelerator:
    """diffusers asks how many accelerators there are; gloo on the CPU has none."""

    def __enter__(self) -> None:
        self._before = torch.accelerator.device_count
        torch.accelerator.device_count = lambda: 1

    def __exit__(self, *error: object) -> None:
        torch.accelerator.device_count = self._before


#: by model, the strategies that the default run tries: the first is split where it begins, the
#: others at their first block
DEFAULT: list[tuple[str, str, dict[str, Any]]] = [
    ("flux", "taylorcache", SCHEDULED["taylorcache"]),
    ("wan", "teacache", RULED["teacache"]),
    ("qwen", "easycache", RULED["easycache"]),
]


def for_a_tiny_model(family: str, strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    """Its random weights move it farther in each step than the toy for which the options are."""
    if "tolerance" in options:
        return {"tolerance": 3.0}
    return {"threshold": 0.5} if (family, strategy) == ("qwen", "firstblockcache") else options


ALL = [
    (family, strategy, for_a_tiny_model(family, strategy, options))
    for family in ("flux", "wan", "qwen")
    for strategy, options in (*SCHEDULED.items(), *RULED.items())
]
REST = [pytest.param(*case, marks=pytest.mark.exhaustive) for case in ALL if case not in DEFAULT]


@pytest.mark.parametrize(
    ("family", "strategy", "options"), [*DEFAULT, *REST], ids=lambda v: str(v)[:20]
)
def test_context_parallelism(
    pair: Pair, family: str, strategy: str, options: dict[str, Any]
) -> None:
    first, second = pair.run(as_one, family, CONTEXT, strategy, options)
    assert first.actions == second.actions
    assert len({action.split()[1] for action in first.actions}) == 2
    share = 1.0 if strategy == "easycache" else 0.5  # the output is whole in each process
    assert first.share == pytest.approx(share, abs=0.01)


def test_enabled_after_apply(pair: Pair) -> None:
    first, second = pair.run(as_one, "flux", CONTEXT, "teacache", RULED["teacache"], True)
    assert first.actions == second.actions


def test_tensor_parallelism(pair: Pair) -> None:
    first, second = pair.run(as_one, "flux", TENSOR, "teacache", RULED["teacache"])
    assert first.actions == second.actions
    assert first.share == 1.0


@pytest.mark.parametrize("way", ["compile", "compile_steps", "backend"])
@pytest.mark.parametrize(
    "case", [("teacache", RULED["teacache"]), *SCHEDULED.items()], ids=lambda c: c[0]
)
@pytest.mark.exhaustive
def test_compiled(pair: Pair, way: str, case: tuple[str, dict[str, Any]]) -> None:
    assert all(pair.run(compiled, way, *case))


@pytest.mark.exhaustive
def test_ring_attention_does_not_run_on_the_cpu(pair: Pair) -> None:
    with pytest.raises(RankError, match="return_lse"):
        pair.run(uncached, {"ring_degree": 2})
