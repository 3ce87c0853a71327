"""The verifier finds what a broken pass would leave."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from dit_cache_fx import DeepCache, OptionError, Strategy, VerifyError
from dit_cache_fx.ir.names import CLOCK_NAMES
from dit_cache_fx.ir.node_meta import BlockId, mark
from dit_cache_fx.ir.program import Program, Region
from dit_cache_fx.ir.verify import verify
from dit_cache_fx.lowering import lower_variants
from dit_cache_fx.passes import PASSES, manager, run_passes
from dit_cache_fx.strategies import CLOCK, Clock
from tests.passes.toy import captured, inputs, passed

DEEP = DeepCache(no_cache_steps=[0])


def test_a_captured_program_is_sound() -> None:
    verify(captured(DEEP))


def test_an_in_place_operator_is_refused() -> None:
    program = captured(DEEP)
    add = next(n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    add.target = torch.ops.aten.add_.Tensor
    with pytest.raises(VerifyError, match=r"changes a tensor in place: aten\.add_\.Tensor"):
        verify(program)


@pytest.mark.parametrize(
    ("notes", "told"),
    [
        ({"block": BlockId("blocks", 7)}, r"marked as a call of blocks\.7, and is no call"),
        ({"keys": ("a", "b", "c")}, "has 1 parts and 3 keys"),
    ],
    ids=["block", "keys"],
)
def test_notes_on_the_wrong_node_are_refused(notes: dict[str, Any], told: str) -> None:
    program = captured(DEEP)
    add = next(n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor)
    mark(add, **notes)
    with pytest.raises(VerifyError, match=told):
        verify(program)


def test_two_signals_are_refused() -> None:
    program = captured(DEEP)
    for call in program.block_calls()[:2]:
        mark(call, signal=True)
    with pytest.raises(VerifyError, match="more than one value is the rule's signal"):
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
    program.regions = (replace(region, run_inputs=()),)
    with pytest.raises(VerifyError, match="run 0 has 1 values"):
        verify(program)


class TooMany(Strategy):
    """Holds more tensors than it says."""

    def store(self, cached, value, run_input, clock: Clock):  # type: ignore[no-untyped-def]
        return [value, value]

    def reuse(self, cached, run_input, clock: Clock):  # type: ignore[no-untyped-def]
        return cached[0]


def test_a_strategy_that_holds_more_than_it_says_is_refused() -> None:
    strategy = TooMany(no_cache_steps=[0])
    told = "in pass guard_runs: strategy TooMany: store gave 2 tensors, 1 expected"
    with pytest.raises(VerifyError, match=told):
        run_passes(captured(strategy), strategy)


# --- the two sides of a run --------------------------------------------------------------------


def guarded() -> Program:
    return passed(DEEP, until="guard_runs")


def side(program: Program, name: str) -> fx.GraphModule:
    found: fx.GraphModule = getattr(program.gm, name)
    return found


def outputs_of(gm: fx.GraphModule) -> tuple[Any, ...]:
    results: Any = gm.graph.output_node().args[0]
    return tuple(results)


def test_the_sides_of_a_run_are_sound() -> None:
    verify(guarded())
    verify(passed(DEEP, until="dead_code"))


def test_an_in_place_operator_in_a_side_is_refused() -> None:
    program = guarded()
    gm = side(program, "run_0_compute")
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        gm.graph.call_function(torch.ops.aten.add_.Tensor, (outputs_of(gm)[0], 1))
    with pytest.raises(VerifyError, match=r"run_0_compute: add.* changes a tensor in place"):
        verify(program)


def test_a_malformed_side_is_refused() -> None:
    program = guarded()
    first, *_, last = [
        n for n in side(program, "run_0_compute").graph.nodes if n.op == "call_module"
    ]
    first.args = (last, *first.args[1:])
    with pytest.raises(VerifyError, match="run_0_compute: the graph is malformed"):
        verify(program)


def test_a_side_that_reads_what_is_not_there_is_refused() -> None:
    program = guarded()
    call = next(n for n in side(program, "run_0_compute").graph.nodes if n.op == "call_module")
    call.target = "model.blocks.17"
    with pytest.raises(VerifyError, match=r"run_0_compute: .*model.blocks.17"):
        verify(program)


@pytest.mark.parametrize("name", ["run_0_compute", "run_0_reuse"])
def test_a_side_that_gives_another_number_of_results_is_refused(name: str) -> None:
    program = guarded()
    gm = side(program, name)
    gm.graph.output_node().args = ((*outputs_of(gm), outputs_of(gm)[0]),)
    with pytest.raises(VerifyError, match=r"its (compute|reuse) side gives \d results"):
        verify(program)


@pytest.mark.parametrize("name", ["run_0_compute", "run_0_reuse"])
def test_a_side_that_takes_another_number_of_operands_is_refused(name: str) -> None:
    program = guarded()
    graph = side(program, name).graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("one_more")
    with pytest.raises(VerifyError, match=r"operands"):
        verify(program)


def test_a_side_that_is_not_there_is_refused() -> None:
    program = guarded()
    program.gm.run_0_reuse = torch.nn.Identity()
    with pytest.raises(VerifyError, match="run_0_reuse is no graph"):
        verify(program)


def test_results_that_are_not_the_regions_values_are_refused() -> None:
    program = guarded()
    region = program.regions[0]
    run = next(n for n in program.graph.nodes if n.name == "run_0")
    (value,) = run.users
    value.args = (run, 1)
    with pytest.raises(VerifyError, match=r"is none of its values \["):
        verify(program)
    program = guarded()
    program.regions = (replace(region, index=3),)
    with pytest.raises(VerifyError, match="run 0: there is no such region"):
        verify(program)


def test_a_name_of_the_caches_own_operands_is_refused() -> None:
    program = captured(DEEP)
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    with program.graph.inserting_after(node):
        program.graph.create_node(
            "call_function", torch.ops.aten.neg.default, (node,), name="forced"
        )
    with pytest.raises(VerifyError, match=r"\['forced'\] are reserved names"):
        verify(program)


# --- the manager ---------------------------------------------------------------------------------


def test_an_error_in_a_pass_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(program: Program, strategy: Strategy) -> None:
        raise KeyError("b0")

    def breaks(program: Program, strategy: Strategy) -> None:
        program.inputs = ()

    for broken, text in ((fails, "in pass fails: KeyError: 'b0'"), (breaks, "in pass breaks: the")):
        monkeypatch.setattr(manager, "PASSES", (*manager.PASSES[:2], broken))
        with pytest.raises(VerifyError, match=text) as caught:
            run_passes(captured(DEEP), DEEP)
        assert caught.value.__cause__ is not None
        monkeypatch.undo()


@pytest.mark.parametrize("name", [p.__name__ for p in PASSES])
def test_without_any_one_pass_a_computed_step_is_the_models_own(name: str) -> None:
    program = captured(DEEP)
    want = program.gm(*inputs().values())
    run_passes(program, DEEP, skip={name})
    variants = lower_variants(program)
    given = dict(zip(program.inputs, inputs().values(), strict=True))
    given |= {n: spec.zeros() for n, spec in variants.cached.items()}
    results = variants.compute.run(*variants.compute.operands(given))
    assert torch.equal(results[0], want[0])


def test_a_pass_that_there_is_not_cannot_be_left_out() -> None:
    with pytest.raises(OptionError, match=r"skip=\['sinking'\]: the names of passes"):
        run_passes(captured(DEEP), DEEP, skip={"sinking"})


def test_the_log_says_which_operations_came_and_went(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="dit_cache_fx"):
        run_passes(captured(DEEP), DEEP)
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("manager")]
    assert [line.partition(":")[0] for line in lines] == [p.__name__ for p in PASSES]
    text = next(line for line in lines if line.startswith("guard_runs"))
    assert "cache_or_compute +1" in text
    assert "operations" in text


def test_the_observer_sees_every_pass() -> None:
    seen: list[str] = []
    run_passes(captured(DEEP), DEEP, lambda name, _: seen.append(name))
    assert seen == [
        "forward_slices",
        "fold_constants",
        "select_runs",
        "find_values",
        "guard_runs",
        "sink",
        "dead_code",
    ]


def test_the_verifier_knows_the_clock() -> None:
    assert CLOCK_NAMES == Clock._fields == tuple(CLOCK)
