"""TaylorCache's corrector and axis, against the formula written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CachedModel, Clock, OptionError, TaylorCache
from dit_cache_fx.strategies import Course
from dit_cache_fx.strategies.clock import MOMENTS
from dit_cache_fx.strategies.schedule import ListedSteps
from tests.capture.test_timesteps import shifted
from tests.compile.compiling import Counting, breaks, compiled, no_recompile
from tests.dynamo.inner import Inner
from tests.reference import split
from tests.test_errors import refused
from tests.toys import ToyDiT, actions, make, toy_inputs

STEPS = frozenset({0, 1, 4, 7, 9, 12})
LENGTH = 14
EVEN = [1000 * (1 - k / LENGTH) for k in range(LENGTH)]
SHIFTED = shifted(LENGTH)
CONTEXTS = ("cond", "uncond")


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


# --- by hand ------------------------------------------------------------------------------------


class ByHand:
    """One branch of a ToyDiT with TaylorCache, as the docstring says, step after step.

    `orders`: of the one band, or of both. `timesteps`: where they are known.
    """

    def __init__(
        self,
        model: Any,
        orders: Sequence[int],
        share: float,
        steps: Collection[int] = STEPS,
        timesteps: Sequence[float] | None = None,
        axis: str = "step",
    ) -> None:
        self.model, self.orders, self.share, self.steps = model, orders, share, steps
        known = timesteps is not None
        steps_alone = [float(k) for k in range(LENGTH)]
        t = list(timesteps) if timesteps is not None else steps_alone
        t.append(2 * t[-1] - t[-2])
        self.dt = [b - a for a, b in pairwise(t)]
        self.place = t if known and axis == "timestep" else [float(k) for k in range(LENGTH)]
        self.forget()

    def forget(self) -> None:
        self.last: int | None = None
        self.held: list[list[Tensor]] = [[] for _ in self.orders]
        self.value = self.correction = torch.zeros(())
        self.predicted: dict[int, Tensor] = {}

    def __call__(self, step: int, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        model = self.model
        c = model.condition(timestep, text)
        if step in self.steps or self.last is None:
            h = model.trunk(model.embed(x), c)
            self.store(step, h)
        else:
            h = self.sum(step)
            self.predicted[step] = h
            h = h + self.correction
        return model.gain * model.head(h)

    def sum(self, step: int) -> Tensor:
        assert self.last is not None
        d = self.place[step] - self.place[self.last]
        terms = [t * d**i / math.factorial(i) for band in self.held for i, t in enumerate(band)]
        return torch.stack(terms).sum(dim=0)

    def store(self, c: int, value: Tensor) -> None:
        p = self.last
        self.correction = torch.zeros(()) if p is None else self.corrected(p, c, value)
        for band, order, part in zip(
            self.held, self.orders, split(value) if len(self.orders) > 1 else [value], strict=True
        ):
            new = [part]
            for old in band[:order]:
                assert p is not None
                new.append((new[-1] - old) / (self.place[c] - self.place[p]))
            band[:] = new
        self.last, self.value, self.predicted = c, value, {}

    def corrected(self, p: int, c: int, value: Tensor) -> Tensor:
        error = torch.zeros_like(value)
        for k, predicted in self.predicted.items():
            share = (self.place[k] - self.place[p]) / (self.place[c] - self.place[p])
            line = self.value + (value - self.value) * share
            error = error + (line - predicted) * self.dt[k]
        following = min([s for s in self.steps if s > c], default=LENGTH)
        ahead = sum(self.dt[k] for k in range(c + 1, following))
        return self.share * error / ahead if ahead else torch.zeros(())


def agrees(got: Callable[..., Any], want: ByHand, timesteps: Sequence[float]) -> None:
    for step, timestep in enumerate(timesteps):
        inputs = toy_inputs(timestep, seed=step)
        expected = want(step, **inputs)
        torch.testing.assert_close(got(**inputs), expected, rtol=1e-5, atol=1e-5)


def toy(model: Any = None, **options: Any) -> CachedModel:
    options = {"no_cache_steps": STEPS} | options
    return dit_cache_fx.apply(model or make(ToyDiT), "taylorcache", check=False, **options)


FORMS: dict[str, tuple[Sequence[int], dict[str, Any]]] = {
    "order 0": ([0], {"max_order": 0}),
    "order 1": ([1], {"max_order": 1}),
    "order 2": ([2], {}),
    "order 3": ([3], {"max_order": 3, "low_freqs_order": 3, "high_freqs_order": 3}),
    "bands 2 and 0": ([2, 0], {"high_freqs_order": 0}),
    "bands 0 and 1": ([0, 1], {"low_freqs_order": 0, "high_freqs_order": 1}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.5, 2])
def test_steps_where_timesteps_are_not_known(form: str, share: float) -> None:
    orders, options = FORMS[form]
    model = make(ToyDiT)
    cached = toy(model, corrector=share, num_steps=LENGTH, **options)
    agrees(cached, ByHand(model, orders, share), SHIFTED)
    assert actions(cached) == "".join("C" if s in STEPS else "r" for s in range(LENGTH))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", ["step", "timestep"])
@pytest.mark.parametrize("timesteps", [EVEN, SHIFTED], ids=["even", "shifted"])
def test_known_timesteps(form: str, axis: str, timesteps: Sequence[float]) -> None:
    orders, options = FORMS[form]
    model = make(ToyDiT)
    cached = toy(model, corrector=0.5, axis=axis, timesteps=timesteps, **options)
    by_hand = ByHand(model, orders, 0.5, timesteps=timesteps, axis=axis)
    agrees(cached, by_hand, timesteps)


def test_both_axes_and_the_corrector_matter() -> None:
    outputs = []
    for options in ({}, {"corrector": 0.5}, {"axis": "timestep"}):
        cached = toy(timesteps=SHIFTED, max_order=1, **options)
        outputs += [[cached(**toy_inputs(t, seed=s)) for s, t in enumerate(SHIFTED)][6]]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_axis_alone() -> None:
    model = make(ToyDiT)
    cached = toy(model, axis="timestep", timesteps=SHIFTED)
    agrees(cached, ByHand(model, [2], 0, timesteps=SHIFTED, axis="timestep"), SHIFTED)


def test_timesteps_placed_by_their_values_are_in_the_formula_too() -> None:
    model = make(ToyDiT)
    cached = toy(model, no_cache_steps=None, computed_steps=5, timesteps=SHIFTED, corrector=0.5)
    course = TaylorCache(computed_steps=5).course(LENGTH, tuple(SHIFTED))
    steps = {s for s in range(LENGTH) if course.computes(s)}
    assert len(steps) == 5
    agrees(cached, ByHand(model, [2], 0.5, steps, SHIFTED), SHIFTED)


def test_computed_steps_are_bitwise_the_models() -> None:
    model = make(ToyDiT)
    cached = toy(model, corrector=0.5, timesteps=SHIFTED)
    for step, timestep in enumerate(SHIFTED):
        inputs = toy_inputs(timestep, seed=step)
        out = cached(**inputs)
        assert torch.equal(out, model(**inputs)) == (step in STEPS)


def test_branches_of_guidance() -> None:
    model = make(ToyDiT)
    cached = toy(model, corrector=0.5, timesteps=SHIFTED)
    by_hand = [ByHand(model, [2], 0.5, timesteps=SHIFTED) for _ in CONTEXTS]
    for step, timestep in enumerate(SHIFTED):
        for prompt, name in enumerate(CONTEXTS):
            inputs = toy_inputs(timestep, seed=step, prompt=prompt)
            with cached.cache_context(name):
                out = cached(**inputs)
            torch.testing.assert_close(out, by_hand[prompt](step, **inputs), rtol=1e-5, atol=1e-5)


def held_by(cached: CachedModel) -> list[Any]:
    (session,) = cached._engine.call_log.tracker.sessions()
    return session.branches[0].cached


@pytest.mark.parametrize("at", [5, 7, 8])
def test_after_a_step_that_was_forced(at: int) -> None:
    """What is held has been changed: the step computes, and nothing of it goes on."""
    model = make(ToyDiT)
    cached, by_hand = toy(model, corrector=0.5, timesteps=SHIFTED), ByHand(
        model, [2], 0.5, timesteps=SHIFTED
    )  # fmt: skip
    for step, timestep in enumerate(SHIFTED):
        if step == at:
            held_by(cached)[0].tensor.fill_(float("nan"))
            by_hand.forget()
        inputs = toy_inputs(timestep, seed=step)
        out = cached(**inputs)
        torch.testing.assert_close(out, by_hand(step, **inputs), rtol=1e-5, atol=1e-5)
    assert actions(cached)[at] == "C"


def test_one_more_tensor_is_held() -> None:
    for orders, options in FORMS.values():
        plain = TaylorCache(no_cache_steps=STEPS, **options)
        corrected = TaylorCache(no_cache_steps=STEPS, corrector=0.5, **options)
        assert plain.slots() == sum(orders) + len(orders)
        assert corrected.slots() == plain.slots() + 1


def test_a_reused_step_of_order_1_runs_no_more_than_one_of_order_2() -> None:
    nodes = []
    for options in ({"max_order": 2}, {"max_order": 1, "corrector": 0.5}, {"max_order": 1}):
        cached = toy(**options)
        cached(**toy_inputs(1000.0))
        nodes.append(cached.cache_report().captures[0].nodes_reused)
    assert nodes[2] < nodes[1] < nodes[0]


# --- the functions alone --------------------------------------------------------------------------


def clock(distance: float, computed: int, gap: Sequence[float] = (), reach: float = 0) -> Clock:
    filled = [*gap, *[0.0] * (MOMENTS - len(gap))]
    return Clock(
        *(torch.tensor(v, dtype=torch.float64) for v in (distance, computed, filled, reach, [0, 0]))
    )


def test_a_second_evaluation_of_a_step_keeps_the_correction() -> None:
    strategy = TaylorCache(no_cache_steps=STEPS, corrector=0.5, max_order=1)
    held = [torch.tensor(v) for v in (3.0, 0.5, 0.25)]
    new = strategy.store(held, torch.tensor(4.0), None, clock(0, 3))
    assert [float(t) for t in new] == [4.0, 0.5, 0.25]


def test_nothing_is_corrected_before_there_was_an_interval() -> None:
    strategy = TaylorCache(no_cache_steps=STEPS, corrector=0.5, max_order=1)
    held = [torch.zeros(()) for _ in range(3)]
    new = strategy.store(held, torch.tensor(4.0), None, clock(0, 0))
    assert [float(t) for t in new] == [4.0, 0.0, 0.0]
    broken = [torch.tensor(float("nan")) for _ in range(3)]  # of another request, in a program
    assert float(strategy.store(broken, torch.tensor(4.0), None, clock(0, 0))[-1]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays(dtype: torch.dtype) -> None:
    strategy = TaylorCache(no_cache_steps=STEPS, corrector=0.5)
    held = [torch.ones(3, dtype=dtype) for _ in range(4)]
    new = strategy.store(held, torch.ones(3, dtype=dtype), None, clock(3, 3, [2.0, 3.0, 5.0]))
    assert {t.dtype for t in new} == {dtype}
    assert strategy.reuse(new, None, clock(1, 4)).dtype == dtype


# --- the scalars --------------------------------------------------------------------------------


def test_sums_over_a_gap_of_steps() -> None:
    course = Course(ListedSteps(frozenset({0, 4, 6})), num_steps=8)
    # behind step 4: distances 1, 2, 3; before step 6: one step
    assert course.gap(0, 4)[:3] == [3, 6, 14]
    assert course.gap(4, 6)[:3] == [1, 1, 1]  # and behind it one, up to the end
    assert course.gap(6, 7) == [0] * MOMENTS


def test_sums_over_a_gap_of_timesteps() -> None:
    timesteps = (100.0, 99.0, 97.0, 93.0, 85.0, 80.0)  # in average steps of 4
    plan = ListedSteps(frozenset({0, 3, 5}))
    course = Course(plan, 6, timesteps)
    assert course.gap(0, 3)[:2] == [(2 / 4 + 4 / 4) / (5 / 4), (2 / 4 + 2 * 4 / 4) / (5 / 4)]
    along = Course(plan, 6, timesteps, by_timestep=True)
    assert along.distance(0, 3) == 7 / 4
    assert along.gap(0, 3)[1] == (2 / 4 * 1 / 4 + 4 / 4 * 3 / 4) / (5 / 4)


@pytest.mark.parametrize(
    "course",
    [
        Course(None, 20, ruled=True),
        Course(ListedSteps(frozenset({0, 4})), 20, ruled=True),
        Course(ListedSteps(frozenset({0, 4}))),
    ],
)
def test_the_last_gap_stands_for_one_that_is_not_known(course: Course) -> None:
    assert course.gap(0, 4)[:2] == [1, 2]


FADING = Course(ListedSteps(frozenset({0, 2, 5})), 6, (10.0, 9.0, 8.0, 6.0, 4.0, 2.0), fading=True)


@pytest.mark.parametrize(
    ("last", "step", "kept"),
    [(0, 2, 1 - 6 / 8), (2, 5, 0.0)],  # 6 of the 8 that are left; all of it
)
def test_the_gap_fades_by_the_share_of_the_way_left(last: int, step: int, kept: float) -> None:
    full = replace(FADING, fading=False)
    assert FADING.share(last, step) == pytest.approx(kept)
    assert FADING.gap(last, step) == pytest.approx([kept * g for g in full.gap(last, step)])


def test_where_a_rule_decides_the_last_interval_tells_what_is_kept() -> None:
    course = Course(None, 10, ruled=True, fading=True)
    assert course.share(0, 4) == pytest.approx(1 - 4 / 6)
    assert course.share(0, 6) == 0  # an interval as long as the last would pass the end
    assert Course(None, ruled=True, fading=True).share(0, 4) == 1  # no end is known


def test_the_way_is_a_share_of_the_whole() -> None:
    assert FADING.way(0, 2) == pytest.approx([2 / 10, 4 / 10])  # the end is at 0
    assert Course(None, 10).way(3, 5) == pytest.approx([0.2, 0.3])
    assert Course(None).way(3, 5) == pytest.approx([2 / 50, 3 / 50])


def test_timesteps_that_do_not_move_are_steps() -> None:
    course = Course(ListedSteps(frozenset({0, 3, 6})), 7, (5.0,) * 7, by_timestep=True)
    assert course.distance(0, 3) == 3
    assert course.gap(0, 3)[:2] == [1, 1.5]


# --- compiled, and where no host is -------------------------------------------------------------

OPTIONS: dict[str, Any] = {"corrector": 0.5, "timesteps": SHIFTED, "axis": "timestep"}
BOTH = [{**OPTIONS, "axis": axis, "max_order": 1} for axis in ("step", "timestep")]
BANDS = {**OPTIONS, "high_freqs_order": 0}


@pytest.mark.parametrize("options", [*BOTH, BANDS], ids=["step", "timestep", "bands"])
def test_one_graph_and_no_recompile(options: dict[str, Any]) -> None:
    model, counting = make(ToyDiT), Counting()
    eager, cached = toy(model, **options), toy(model, **options)
    run = compiled(cached, counting)
    with no_recompile():
        for _ in range(2):
            for step, timestep in enumerate(SHIFTED):
                inputs = toy_inputs(timestep, seed=step)
                torch.testing.assert_close(run(**inputs), eager(**inputs), rtol=1e-5, atol=1e-5)
    assert (counting.count, breaks()) == (1, 0)


def test_steps_compiled_one_by_one() -> None:
    model, counting = make(ToyDiT), Counting()
    eager, cached = toy(model, **OPTIONS), toy(model, **OPTIONS)
    cached.compile_steps(backend=counting, fullgraph=True)
    with no_recompile():
        for _ in range(2):
            for step, timestep in enumerate(SHIFTED):
                inputs = toy_inputs(timestep, seed=step)
                assert torch.equal(cached(**inputs), eager(**inputs))
    assert (counting.count, breaks()) == (2, 0)


def test_the_backend() -> None:
    model, inner = make(ToyDiT), Inner()
    backend = dit_cache_fx.backend("taylorcache", no_cache_steps=STEPS, inner=inner, **OPTIONS)
    run = torch.compile(model, backend=backend, fullgraph=True)
    by_hand = ByHand(model, [2], 0.5, timesteps=SHIFTED, axis="timestep")
    agrees(run, by_hand, SHIFTED)
    by_hand.forget()
    agrees(run, by_hand, SHIFTED)
    assert len(inner.graphs) == 2


@pytest.mark.parametrize("options", [OPTIONS, {"corrector": 0.5, "num_steps": LENGTH}])
def test_exported_programs(options: dict[str, Any]) -> None:
    model = make(ToyDiT)
    eager = toy(model, **options)
    first = toy_inputs(SHIFTED[0])
    runner = dit_cache_fx.export(toy(model, **options), kwargs=first).runner()
    for prompt in (0, 1):
        eager.reset_states()  # a program learns nothing from one generation for the next
        for step, timestep in enumerate(SHIFTED):
            inputs = toy_inputs(timestep, seed=step, prompt=prompt)
            torch.testing.assert_close(runner(**inputs), eager(**inputs), rtol=1e-5, atol=1e-5)


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.1, 2.1, float("nan"), True, "0.5", None])
def test_shares_that_cannot_be(share: Any) -> None:
    text = "corrector=.*: a share from 0"
    refused(text, make(ToyDiT), "taylorcache", no_cache_steps=STEPS, corrector=share)


@pytest.mark.parametrize("axis", ["steps", "", None, 1])
def test_axes_that_there_are_not(axis: Any) -> None:
    text = r"axis=.*: one of \['step', 'timestep'\]"
    refused(text, make(ToyDiT), "taylorcache", no_cache_steps=STEPS, axis=axis)


def test_orders_that_are_too_high_to_correct() -> None:
    high = dict.fromkeys(("max_order", "low_freqs_order", "high_freqs_order"), MOMENTS)
    TaylorCache(no_cache_steps=STEPS, **high)
    with pytest.raises(OptionError, match="max_order=8: at most 7 with a corrector"):
        TaylorCache(no_cache_steps=STEPS, corrector=0.5, **high)
