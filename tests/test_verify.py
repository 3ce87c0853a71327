"""The verifier finds what a broken pass would leave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_cache_fx import DeepCache, Strategy, VerifyError
from dit_cache_fx.ir.names import CLOCK_NAMES
from dit_cache_fx.ir.program import BlockId, Region
from dit_cache_fx.ir.verify import verify
from dit_cache_fx.passes import run_passes
from dit_cache_fx.strategies import CLOCK, Clock
from tests.passes.toy import captured

DEEP = DeepCache(no_cache_steps=[0])


def test_a_captured_program_is_sound() -> None:
    verify(captured(DEEP))


def test_an_in_place_operator_is_refused() -> None:
    program = captured(DEEP)
    add = next(n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    add.target = torch.ops.aten.add_.Tensor
    with pytest.raises(VerifyError, match=r"changes a tensor in place: aten\.add_\.Tensor"):
        verify(program)


def test_an_order_that_cannot_run_is_refused() -> None:
    program = captured(DEEP)
    first, *_, last = [n for n in program.graph.nodes if n.op == "call_module"]
    first.args = (last,)
    with pytest.raises(VerifyError, match="malformed"):
        verify(program)


def test_another_input_list_is_refused() -> None:
    program = captured(DEEP)
    program.inputs = ("x", "timestep")
    with pytest.raises(VerifyError, match="the call gives"):
        verify(program)


def test_a_block_in_two_runs_is_refused() -> None:
    program = captured(DEEP)
    block = (BlockId("blocks", 0),)
    program.regions = (Region(0, block), Region(1, block))
    with pytest.raises(VerifyError, match="in two runs"):
        verify(program)


def test_a_value_that_is_no_node_is_refused() -> None:
    program = captured(DEEP)
    region = Region(0, (BlockId("blocks", 0),), ("nowhere",), (None,))
    program.regions = (region,)
    with pytest.raises(VerifyError, match="no node is called"):
        verify(program)
    program.regions = (replace(region, inputs=()),)
    with pytest.raises(VerifyError, match="run 0 has 1 values"):
        verify(program)


class TooMany(Strategy):
    """Holds more tensors than it says."""

    def store(self, held, value, start, clock: Clock):  # type: ignore[no-untyped-def]
        return [value, value]

    def reuse(self, held, start, clock: Clock):  # type: ignore[no-untyped-def]
        return held[0]


def test_a_strategy_that_holds_more_than_it_says_is_refused() -> None:
    strategy = TooMany(no_cache_steps=[0])
    told = "in pass guard_runs: strategy TooMany: store gave 2 tensors, 1 expected"
    with pytest.raises(VerifyError, match=told):
        run_passes(captured(strategy), strategy)


def test_the_observer_sees_every_pass() -> None:
    seen: list[str] = []
    run_passes(captured(DEEP), DEEP, lambda name, _: seen.append(name))
    assert seen == [
        "forward_slices",
        "select_runs",
        "find_values",
        "guard_runs",
        "sink",
        "dead_code",
    ]


def test_the_verifier_knows_the_clock() -> None:
    assert CLOCK_NAMES == Clock._fields == tuple(CLOCK)
