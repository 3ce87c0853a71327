"""The life cycle of a cached model: steps that are set, on and off, forgetting, the report."""

from __future__ import annotations

import warnings
from typing import Any

import expecttest
import pytest
import torch
from torch import nn

import dit_cache_fx
from dit_cache_fx import CachedModel, CacheReport, OptionError
from tests.toys import (
    DEPTH,
    DIM,
    TOKENS,
    TOY,
    ByHand,
    JoinedDiT,
    ToyDiT,
    actions,
    follows,
    generation,
    make,
    runs_of,
    toy_inputs,
)
from tests.zoo import case

STEPS = {0, 2, 3}
ONE = TOKENS * DIM * 4  # bytes of one block's result


pytestmark = pytest.mark.usefixtures("no_grad")


def pair(steps: set[int] = STEPS, **options: Any) -> tuple[CachedModel, ByHand]:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=steps, **options)
    return cached, ByHand(model, ["blocks"])


def steps_of(cached: CachedModel) -> list[int]:
    return [record.step for record in cached.cache_report().timeline]


# --- cur_timestep ------------------------------------------------------------------------------


def test_cur_timestep_reads_the_newest_calls_step() -> None:
    cached, _ = pair()
    seen = [cached.cur_timestep]
    for _ in range(2):
        for _, inputs in generation(TOY, STEPS, steps=4):
            cached(**inputs)
            seen.append(cached.cur_timestep)
    assert seen == [0, 0, 1, 2, 3, 0, 1, 2, 3]


def test_cur_timestep_that_is_set_overrides_the_timesteps_value() -> None:
    cached, by_hand = pair()
    times = [500.0, 500.0, 900.0, 1.0, 800.0, 2.0]
    for _ in range(2):
        for step, t in enumerate(times):
            cached.cur_timestep = step
            assert cached.cur_timestep == step
            follows(cached, by_hand, [(step in STEPS, toy_inputs(t, seed=step))])
        assert actions(cached) == "CrCCrr"
    assert steps_of(cached) == [0, 1, 2, 3, 4, 5]


def test_no_cache_steps_count_from_the_first_cur_timestep_of_a_generation() -> None:
    """An image-to-image run may start its index late; its first call is step 0 all the same."""
    cached, by_hand = pair({0, 1, 3})
    for step, computes in ((4, True), (5, True), (6, False), (7, True), (8, False)):
        cached.cur_timestep = step
        follows(cached, by_hand, [(computes, toy_inputs(1000.0 - step, seed=step))])
    assert steps_of(cached) == [0, 1, 2, 3, 4]


def test_cur_timestep_may_jump() -> None:
    cached, by_hand = pair({0, 6})
    for step, computes in ((0, True), (2, False), (5, False), (6, True), (9, False)):
        cached.cur_timestep = step
        follows(cached, by_hand, [(computes, toy_inputs(1000.0 - step, seed=step))])
    assert steps_of(cached) == [0, 2, 5, 6, 9]


def test_cur_timestep_that_goes_back_starts_a_generation() -> None:
    cached, by_hand = pair({0})
    for step, computes in ((0, True), (1, False), (2, False), (1, True), (2, False)):
        cached.cur_timestep = step
        follows(cached, by_hand, [(computes, toy_inputs(1000.0 - step, seed=step))])


def test_cur_timestep_of_several_branches() -> None:
    cached, by_hand = pair()
    for step in range(6):
        cached.cur_timestep = step
        for branch in range(2):
            inputs = toy_inputs(7.0, seed=step, prompt=branch)
            want = by_hand(step in STEPS, branch=branch, **inputs)
            assert torch.equal(cached(**inputs), want)


def test_cur_timestep_none_goes_back_to_the_timesteps_value() -> None:
    cached, by_hand = pair()
    cached.cur_timestep = 3
    follows(cached, by_hand, [(True, toy_inputs(800.0))])
    cached.cur_timestep = None
    follows(cached, by_hand, generation(TOY, STEPS))
    assert actions(cached).endswith("CrCCrr")
    assert cached.cur_timestep == 5


@pytest.mark.parametrize("value", [-1, 1.5, "3", True, [1]])
def test_cur_timestep_refuses_what_is_no_index(value: Any) -> None:
    cached, by_hand = pair()
    calls = generation(TOY, STEPS)
    follows(cached, by_hand, calls[:2])
    with pytest.raises(OptionError, match=r"cur_timestep=.*: a step index: an integer from 0"):
        cached.cur_timestep = value
    assert cached.cur_timestep == 1
    follows(cached, by_hand, calls[2:])


def test_clear_states_unsets_cur_timestep() -> None:
    cached, by_hand = pair()
    cached.cur_timestep = 4
    cached.clear_states()
    assert cached.cur_timestep == 0
    follows(cached, by_hand, generation(TOY, STEPS))


# --- enable and disable ---------------------------------------------------------------------------


def test_disabled_is_the_original_models_forward() -> None:
    cached, _ = pair()
    model = make(ToyDiT)
    calls = generation(TOY, STEPS)
    for _, inputs in calls[:2]:
        cached(**inputs)
    cached.disable()
    with runs_of(cached.blocks) as counts:
        for _, inputs in calls:
            assert torch.equal(cached(**inputs), model(**inputs))
    assert counts == [len(calls)] * DEPTH
    report = cached.cache_report()
    assert not report.enabled
    assert report.bytes_held == 0
    assert report.calls_computed == 1


def test_disabled_takes_part_in_training_without_a_warning() -> None:
    cached, _ = pair()
    cached.disable()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        cached.train()
        cached(**toy_inputs(1.0)).sum().backward()
    assert all(parameter.grad is not None for parameter in cached.parameters())


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_no_module_is_patched_at_any_time(calls: int) -> None:
    model = make(ToyDiT)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=STEPS)
    for _, inputs in generation(TOY, STEPS)[:calls]:
        cached(**inputs)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    cached.disable()
    assert not any("forward" in vars(m) for m in (*model.modules(), cached))
    assert nn.Module.__call__.__module__ == "torch.nn.modules.module"


def test_twice_enabled_and_twice_disabled() -> None:
    cached, by_hand = pair()
    for _ in range(2):
        cached.enable()
        cached.enable()
        assert cached.cache_report().enabled
        follows(cached, by_hand, generation(TOY, STEPS))
        assert actions(cached) == "CrCCrr"
        cached.disable()
        cached.disable()
        assert not cached.cache_report().enabled
        for _, inputs in generation(TOY, STEPS):
            assert torch.equal(cached(**inputs), by_hand(True, **inputs))


def test_enabled_again_in_the_middle_of_a_generation_starts_by_computing() -> None:
    cached, by_hand = pair({0})
    calls = generation(TOY, {0})
    follows(cached, by_hand, calls[:2])
    cached.disable()
    cached(**calls[2][1])
    cached.enable()
    follows(cached, by_hand, [(True, calls[3][1]), *calls[4:]])


# --- forgetting ----------------------------------------------------------------------------------


def test_clear_states_forgets_what_is_held_and_keeps_graphs_and_counts() -> None:
    cached, by_hand = pair()
    calls = generation(TOY, STEPS)
    follows(cached, by_hand, calls[:2])
    cached.clear_states()
    report = cached.cache_report()
    assert (report.bytes_held, len(report.captures)) == (0, 1)
    assert (report.calls_computed, report.calls_reused) == (1, 1)
    assert cached.cur_timestep == 0
    with runs_of(cached.blocks) as counts:
        follows(cached, by_hand, generation(TOY, STEPS))
    assert counts == [3] * DEPTH


def test_reset_states_forgets_everything() -> None:
    cached, by_hand = pair()
    follows(cached, by_hand, generation(TOY, STEPS))
    cached.reset_states()
    assert (
        cached.cache_report()
        == dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps=STEPS).cache_report()
    )
    follows(cached, by_hand, generation(TOY, STEPS))
    report = cached.cache_report()
    assert (report.calls_computed, report.calls_reused, len(report.captures)) == (3, 3, 1)


def test_clearing_before_the_first_call_and_while_disabled_is_harmless() -> None:
    cached, by_hand = pair()
    cached.clear_states()
    cached.reset_states()
    cached.disable()
    cached.clear_states()
    cached.reset_states()
    cached.enable()
    follows(cached, by_hand, generation(TOY, STEPS))


# --- the report ----------------------------------------------------------------------------------


def test_report_before_the_first_call() -> None:
    cached, _ = pair()
    report = cached.cache_report()
    assert isinstance(report, CacheReport)
    assert report.strategy == "deepcache"
    assert report.enabled
    assert report.captures == ()
    assert report.timeline == ()
    assert (report.bytes_held, report.calls_computed, report.calls_reused) == (0, 0, 0)


def test_report_fields() -> None:
    ids = {"blocks": {1}}
    cached, _ = pair(no_cache_block_id=ids)
    for _, inputs in generation(TOY, STEPS, steps=4):
        cached(**inputs)
    report = cached.cache_report()
    assert report.blocks == {"blocks": DEPTH}
    assert report.cached_blocks == {"blocks": (0, 2)}
    assert report.captures[0].runs == (("blocks.0",), ("blocks.2",))
    assert (report.bytes_held, report.bytes_per_block) == (2 * ONE, 2 * ONE)
    assert report.bytes_rule == 0
    assert (report.steps_computed, report.steps_reused) == (3, 1)
    assert (report.captures[0].nodes, report.captures[0].nodes_reused) == (14, 11)
    assert [(r.step, r.timestep, r.branch, r.action) for r in report.timeline[:2]] == [
        (0, 1000.0, 0, "computed"),
        (1, 750.0, 0, "reused"),
    ]


def test_report_of_two_block_lists_that_are_cached_as_one_run() -> None:
    flux = case("FluxTransformer2DModel")
    cached = dit_cache_fx.apply(flux.build(), "deepcache", no_cache_steps={0})
    for _, inputs in generation(flux, {0}, steps=2):
        cached(**inputs)
    report = cached.cache_report()
    assert report.blocks == {"transformer_blocks": 3, "single_transformer_blocks": 3}
    assert report.cached_blocks == dict.fromkeys(report.blocks, (0, 1, 2))
    assert [(len(run), run[0], run[-1]) for run in report.captures[0].runs] == [
        (6, "transformer_blocks.0", "single_transformer_blocks.2")
    ]


def test_report_counts_bytes_of_every_branch_and_slot() -> None:
    model = make(JoinedDiT)
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS, max_order=1)
    for _, inputs in generation(TOY, STEPS, steps=3):
        for prompt in range(2):
            cached(**(inputs | {"text": toy_inputs(1.0, prompt=prompt)["text"]}))
    report = cached.cache_report()
    text = toy_inputs(1.0)["text"].nbytes
    assert report.bytes_held == 2 * 2 * ONE  # branches, slots; the text is not held
    assert report.bytes_per_block == 2 * 2 * DEPTH * (ONE + text)


def test_report_of_a_rule_counts_what_it_remembers() -> None:
    cached = dit_cache_fx.apply(
        make(ToyDiT), "teacache", rel_l1_thresh=0.2, signal="input", no_cache_steps={4}
    )
    for _, inputs in generation(TOY, set()):
        cached(**inputs)
    report = cached.cache_report()
    assert ONE <= report.bytes_rule <= ONE + 16
    assert report.bytes_held == ONE


def test_reports_action_is_the_strategys() -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "taylorcache", no_cache_steps={0})
    for _, inputs in generation(TOY, {0}, steps=2):
        cached(**inputs)
    assert [r.action for r in cached.cache_report().timeline] == ["computed", "predicted"]


def test_report_is_a_snapshot() -> None:
    cached, _ = pair()
    before = cached.cache_report()
    cached(**toy_inputs(1.0))
    assert before.calls_computed == 0
    assert before.timeline == ()


class TestPrintedReport(expecttest.TestCase):
    def test_toy(self) -> None:
        cached, _ = pair(no_cache_block_id={"double_blocks": {2}})
        for _, inputs in generation(TOY, STEPS):
            cached(**inputs)
        self.assertExpectedInline(
            str(cached.cache_report()),
            """\
deepcache: blocks: 2 of 3 blocks cached
held: 192 B (one result per block would take 384 B)
last generation: 3 steps computed, 3 not
graph for x[1, 6, 8], timestep[1], text[1, 4, 8]:
  14 nodes captured, 11 on a reused step
  blocks.0 .. blocks.1 (2 blocks) holds model_blocks_1[1, 6, 8]""",
        )

    def test_nothing_captured_and_disabled(self) -> None:
        cached, _ = pair()
        cached.disable()
        self.assertExpectedInline(
            str(cached.cache_report()),
            """\
deepcache (disabled): nothing captured
held: 0 B (one result per block would take 0 B)
last generation: 0 steps computed, 0 not""",
        )


def test_a_change_of_the_model_is_seen_on_a_step_that_the_rule_computes() -> None:
    """Nothing but the rule says that the step computes: its graph is looked at all the same."""
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "teacache", rel_l1_thresh=1e-6)
    with torch.no_grad():
        cached(**toy_inputs(1.0))
        model.gain = 2.0
        assert torch.equal(cached(**toy_inputs(0.5)), model(**toy_inputs(0.5)))
        assert actions(cached) == "CC"
