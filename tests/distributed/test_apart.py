"""Each process is given something else: a part of the sequence, say. All of them do the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import OptionError, RuleState, TeaCache
from tests.distributed.models import RULED, STEPS, Call, Dit, Run, apart, dit, generate
from tests.distributed.pair import Pair

CASES = [*RULED.items()]


def tokens(values: Tensor) -> Tensor:
    """This process's half of a sequence."""
    return values.chunk(2, dim=1)[dist.get_rank()]


def half(step: int, before: Tensor | None) -> Call:
    """The arguments of a step, of this process's part."""
    x = tokens(torch.randn(2, 8, 4)) if before is None else before
    return {"x": x, "timestep": torch.full((2,), 1 - step / STEPS)}


def split(strategy: str, options: dict[str, Any]) -> Run:
    one = generate(dit_cache_fx.apply(dit(), strategy, **options))
    group = dist.group.WORLD
    two = generate(dit_cache_fx.apply(dit(), strategy, **options, process_group=group), half)
    assert two.actions == one.actions, (two.actions, one.actions)
    assert apart(two.outputs, list(map(tokens, one.outputs))) < 1e-5
    return two


@pytest.mark.parametrize(("strategy", "options"), CASES, ids=lambda v: str(v)[:20])
def test_a_rule_goes_by_the_whole_sequence(
    pair: Pair, strategy: str, options: dict[str, Any]
) -> None:
    first, second = pair.run(split, strategy, options)
    assert first.actions == second.actions


# --- decisions of one's own -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OwnPart(TeaCache):
    """A rule that asks no other process: the second one never computes by itself."""

    def should_compute(
        self, signal: Tensor, state: RuleState, forced: Tensor
    ) -> tuple[Tensor, RuleState]:
        count = state[1] + 1
        due = (count >= 3) & (dist.get_rank() == 0)
        compute = forced | due
        return compute, (signal, torch.where(compute, 0.0, count), count)


def own_rule(grouped: bool) -> list[str]:
    group = dist.group.WORLD if grouped else None
    strategy = OwnPart(rel_l1_thresh=1.0, signal="input", process_group=group)
    return generate(dit_cache_fx.apply(dit(), strategy), half).actions


def test_where_one_computes_all_do(pair: Pair) -> None:
    first, second = pair.run(own_rule, True)
    assert first == second
    assert [a for a in first if "computed" in a] == [f"{i} computed" for i in (0, 3, 6, 9)]


def test_what_is_not_known_to_belong_together_decides_by_itself(pair: Pair) -> None:
    first, second = pair.run(own_rule, False)
    assert first != second


# --- evidence -------------------------------------------------------------------------------------


class Told(Dit):
    """A model that is told what to draw, token by token."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + text, timestep)


def branches() -> list[str]:
    """Two prompts in turn, of which the second process has the same part."""
    torch.manual_seed(1)
    cached = dit_cache_fx.apply(
        Told().eval(), "deepcache", no_cache_steps=range(0, 8, 2), process_group=dist.group.WORLD
    )
    prompts = [torch.zeros(1, 4, 4), torch.full((1, 4, 4), float(dist.get_rank() == 0))]
    x = torch.randn(1, 8, 4)
    for step in range(8):
        for text in prompts:
            time = torch.tensor([1 - step / 8])
            cached(x=tokens(x).clone(), timestep=time, text=text.clone())
        x = x + 0.01 * torch.randn(1, 8, 4)
    return [f"{r.step} {r.branch} {r.action}" for r in cached.cache_report().timeline]


def test_a_branch_is_one_branch_in_all_processes(pair: Pair) -> None:
    first, second = pair.run(branches)
    assert first == second
    assert len({line.split()[1] for line in first}) == 2
    assert [line.split()[2] for line in first] == ["computed", "computed", "reused", "reused"] * 4


def broken_off() -> list[str]:
    """A generation is broken off; in the second process the new sample looks like the old one."""
    options = {"no_cache_steps": range(0, STEPS, 4), "process_group": dist.group.WORLD}
    cached = dit_cache_fx.apply(dit(), "deepcache", **options)
    old, new = tokens(torch.randn(2, 8, 4)), torch.randn(2, 4, 4)
    if dist.get_rank() == 1:
        new = old
    actions: list[str] = []
    for step in range(8):
        x = (old if step < 4 else new) + 0.001 * step
        cached(x=x, timestep=torch.full((2,), 1 - step / STEPS))
        actions.append(str([f"{r.step} {r.action}" for r in cached.cache_report().timeline][-1:]))
    return actions


def test_another_sample_is_another_one_in_all_processes(pair: Pair) -> None:
    first, second = pair.run(broken_off)
    assert first == second
    assert "0 computed" in first[4]


# --- a capture that fails -------------------------------------------------------------------------


class Random(Dit):
    """In the second process something random stands outside of its blocks."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        noise = torch.rand(()) if dist.get_rank() == 1 else 1.0
        return super().forward(x * noise, timestep)


def refused() -> str:
    torch.manual_seed(1)
    cached = dit_cache_fx.apply(
        Random().eval(), "deepcache", no_cache_steps=[0], process_group=dist.group.WORLD
    )
    try:
        generate(cached, half)
    except dit_cache_fx.CaptureError as error:
        return str(error)
    return ""


def test_a_capture_that_one_process_refuses_all_refuse(pair: Pair) -> None:
    first, second = pair.run(refused)
    assert "another process" in first
    assert "randomness" in second


# --- the option -----------------------------------------------------------------------------------


@pytest.mark.parametrize("no_group", ["world", 0])
def test_what_is_no_process_group(no_group: object) -> None:
    with pytest.raises(OptionError, match=r"process_group=.*a torch.distributed process group"):
        TeaCache(rel_l1_thresh=0.2, process_group=no_group)
