"""Batches of sessions (`cached.batch`) that several processes answer together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dit_cache_fx
from tests.distributed.models import RULED, SCHEDULED, Call, Dit, apart, dit
from tests.distributed.pair import Pair, RankError
from tests.distributed.test_apart import tokens
from tests.distributed.test_diffusers import CONTEXT, spread
from tests.distributed.test_engines import ENGINES

REQUESTS, STEPS = 3, 6


class Served(NamedTuple):
    """A request: what each of its steps gave, and what was done on each."""

    outputs: list[Tensor]
    actions: list[str]


def served(
    called: Any,
    cache: Any = None,
    first: Callable[[], Call] = lambda: {"x": torch.randn(1, 8, 4)},
    part: Callable[[Tensor], Tensor] = torch.clone,
    later: int = 1,
) -> list[Served]:
    """Requests, each call of all that are under way.

    `cache`: what answers them in batches; without it `called` answers each alone. `first`: makes
    the arguments of a request, its sample first. `part`: of a sample, for this process. `later`: by
    how many steps each begins after the one before it.
    """
    torch.manual_seed(2)
    asked = [first() for _ in range(REQUESTS)]
    sample = next(iter(asked[0]))
    for given in asked:
        given[sample] = part(given[sample])
    sessions = [(cache or called).new_session() for _ in asked]
    outputs: list[list[Tensor]] = [[] for _ in asked]
    for tick in range(STEPS + later * (REQUESTS - 1)):
        live = [r for r in range(REQUESTS) if 0 <= tick - later * r < STEPS]
        for group in [live] if cache else [[r] for r in live]:
            times = torch.tensor([1 - len(outputs[r]) / STEPS for r in group])
            with cache.batch([sessions[r] for r in group]) if cache else sessions[group[0]]:
                output = called(**joined([asked[r] for r in group]), timestep=times)
            output = output if isinstance(output, Tensor) else output[0]
            for row, r in enumerate(group):
                outputs[r].append(output[row : row + 1].clone())
                asked[r][sample] = asked[r][sample] - outputs[r][-1] / STEPS
    done = [actions(cache or called, session) for session in sessions]
    return list(map(Served, outputs, done))


def joined(each: list[Call]) -> Call:
    """The arguments of one call for several requests; what is no row is the same for all."""
    first = each[0]
    rows = [n for n, value in first.items() if isinstance(value, Tensor) and len(value) == 1]
    return first | {name: torch.cat([given[name] for given in each]) for name in rows}


def actions(cache: Any, session: Any) -> list[str]:
    with session:
        return [f"{r.step} {r.action}" for r in cache.cache_report().timeline]


def same(
    got: list[Served], want: list[Served], part: Callable[[Tensor], Tensor] = torch.clone
) -> list[list[str]]:
    """What was done for each request; raises where it is not what a process does alone."""
    for batched, alone in zip(got, want, strict=True):
        assert batched.actions == alone.actions, (batched.actions, alone.actions)
        assert apart(batched.outputs, list(map(part, alone.outputs))) < 1e-5
    return [batched.actions for batched in got]


# --- engines -------------------------------------------------------------------------------------


def run_together(engine: str, strategy: str, options: dict[str, Any], way: str) -> list[list[str]]:
    """Batches of a model that the processes run together."""
    want = served(dit_cache_fx.apply(dit(), strategy, **options))
    model: Any = ENGINES[engine](dit())
    torch._dynamo.reset()
    cache = model = dit_cache_fx.apply(model, strategy, **options)
    if way == "compile":
        model = torch.compile(model, backend="aot_eager")
    elif way == "compile_steps":
        model.compile_steps(backend="aot_eager")
    return same(served(model, cache), want)


def both(done: list[list[list[str]]]) -> set[str]:
    """What was done on any step. Both processes have done the same."""
    first, second = done
    assert first == second
    return {action.split()[1] for each in first for action in each}


CASES = [*SCHEDULED.items(), *RULED.items()]
#: what the default run tries: a rule that looks at a part of a block, one that measures outputs, a
#: prediction
DEFAULT = [("fsdp", CASES[2]), ("fsdp", CASES[4]), ("tensor_parallel", CASES[3]), ("ddp", CASES[1])]
ALL = [
    pytest.param(engine, *case, marks=() if (engine, case) in DEFAULT else pytest.mark.exhaustive)
    for engine in ENGINES
    for case in CASES
]


@pytest.mark.parametrize(("engine", "strategy", "options"), ALL, ids=lambda v: str(v)[:20])
def test_engines(pair: Pair, engine: str, strategy: str, options: dict[str, Any]) -> None:
    done = both(pair.run(run_together, engine, strategy, options, "eager"))
    assert "computed" in done
    assert len(done) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["compile", "compile_steps"])
@pytest.mark.parametrize("engine", ENGINES)
def test_compiled(pair: Pair, engine: str, way: str) -> None:
    for strategy, options in (
        ("teacache", RULED["teacache"]),
        ("taylorcache", RULED["taylorcache"]),
    ):
        assert len(both(pair.run(run_together, engine, strategy, options, way))) == 2


def through_backend(engine: str) -> list[list[str]]:
    """The same for `backend()`, whose requests begin together: one row alone is another graph."""
    options = RULED["teacache"]
    want = served(dit_cache_fx.apply(dit(), "teacache", **options), later=0)
    torch._dynamo.reset()
    cache = dit_cache_fx.backend("teacache", inner="aot_eager", **options)
    model = torch.compile(ENGINES[engine](dit()), backend=cache, dynamic=True)
    return same(served(model, cache, later=0), want)


@pytest.mark.exhaustive
def test_backend(pair: Pair) -> None:
    assert len(both(pair.run(through_backend, "tensor_parallel"))) == 2


@pytest.mark.exhaustive
def test_backend_refuses_what_dynamo_splits(pair: Pair) -> None:
    with pytest.raises(RankError, match=r"Dynamo splits the model .* a batch of sessions needs it"):
        pair.run(through_backend, "ddp")


# --- a part of each sequence ---------------------------------------------------------------------


def split(strategy: str, options: dict[str, Any]) -> list[list[str]]:
    """Each process has half of the tokens of every request."""
    want = served(dit_cache_fx.apply(dit(), strategy, **options))
    cached = dit_cache_fx.apply(dit(), strategy, **options, process_group=dist.group.WORLD)
    return same(served(cached, cached, part=tokens), want, tokens)


@pytest.mark.parametrize(("strategy", "options"), RULED.items(), ids=lambda v: str(v)[:20])
def test_a_rule_goes_by_the_whole_sequence_of_each_row(
    pair: Pair, strategy: str, options: dict[str, Any]
) -> None:
    assert len(both(pair.run(split, strategy, options))) == 2


def context_parallel(strategy: str, options: dict[str, Any]) -> list[list[str]]:
    """Batches of Flux, whose processes each have a part of the sequence inside."""
    from tests.distributed.diffusers_models import flux_more, made

    places = {name: flux_more()[name] for name in ("img_ids", "txt_ids")}

    def first() -> Call:
        return {
            "hidden_states": torch.randn(1, 16, 4),
            **flux_more(),
            **places,
            "return_dict": False,
        }

    want = served(dit_cache_fx.apply(made("flux"), strategy, **options), first=first)
    cached = dit_cache_fx.apply(spread(made("flux"), CONTEXT), strategy, **options)
    return same(served(cached, cached, first), want)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("taylorcache", SCHEDULED["taylorcache"]),
        pytest.param("teacache", RULED["teacache"], marks=pytest.mark.exhaustive),
        pytest.param("easycache", RULED["easycache"], marks=pytest.mark.exhaustive),
    ],
    ids=lambda v: str(v)[:20],
)
def test_context_parallelism(pair: Pair, strategy: str, options: dict[str, Any]) -> None:
    assert len(both(pair.run(context_parallel, strategy, options, limit=400))) == 2


# --- refused -------------------------------------------------------------------------------------


class Mixing(Dit):
    """In the second process its rows depend on each other."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x + x.mean(0) if dist.get_rank() else x, timestep)


def refused() -> str:
    torch.manual_seed(1)
    model = Mixing().eval()
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps={0}, process_group=dist.group.WORLD
    )
    try:
        served(cached, cached)
    except dit_cache_fx.CaptureError as error:
        return str(error)
    return ""


def test_what_one_process_refuses_all_refuse(pair: Pair) -> None:
    first, second = pair.run(refused)
    assert first.startswith("another process could not split the call into sessions")
    assert "the model mixes rows" in second
