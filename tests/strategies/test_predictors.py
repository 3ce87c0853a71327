"""HiCache, FoCa and exponential extrapolation: each against its formula written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CachedModel, Clock, Exponential, FoCa, HiCache, NewtonCache, TaylorCache
from dit_cache_fx.strategies.clock import MOMENTS
from dit_cache_fx.strategies.hicache import hermite
from tests.compile.compiling import Counting, breaks, compiled, no_recompile
from tests.strategies.test_corrector import LENGTH, SHIFTED, ByHand
from tests.test_errors import refused
from tests.toys import ToyDiT, actions, make, toy_inputs

STEPS = frozenset({0, 2, 5, 7})
TIMES = [1000 * (1 - k / 10) for k in range(10)]


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def at(distance: float, computed: int = 3, gap: Sequence[float] = (), reach: float = 0) -> Clock:
    filled = [*gap, *[0.0] * (MOMENTS - len(gap))]
    return Clock(
        *(torch.tensor(v, dtype=torch.float64) for v in (distance, computed, filled, reach, [0, 0]))
    )


def physicists(order: int, x: float) -> float:
    """Hermite polynomials, written out."""
    return [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x, 16 * x**4 - 48 * x**2 + 12][order]


# --- HiCache --------------------------------------------------------------------------------------


def test_hermite_polynomials() -> None:
    assert [hermite(n) for n in range(4)] == [[1], [0, 2], [-2, 0, 4], [0, -12, 0, 8]]
    assert hermite(4) == [12, 0, -48, 0, 16]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("sigma", [0.5, 0.7, 1])
def test_hicache_is_its_formula(order: int, sigma: float) -> None:
    orders = {"max_order": order, "low_freqs_order": order, "high_freqs_order": order}
    strategy = HiCache(no_cache_steps=STEPS, sigma=sigma, **orders)
    held = [*torch.randn(order + 1, 4)]
    for d in (1.0, 2.5, 4.0):
        terms = [
            h / math.factorial(i) * sigma**i * physicists(i, sigma * d) for i, h in enumerate(held)
        ]
        torch.testing.assert_close(strategy.reuse(held, None, at(d)), torch.stack(terms).sum(0))


def test_half_the_square_root_of_two_is_taylor_in_order_1() -> None:
    held = [*torch.randn(2, 4)]
    hicache = HiCache(no_cache_steps=STEPS, sigma=math.sqrt(0.5), max_order=1)
    taylor = TaylorCache(no_cache_steps=STEPS, max_order=1)
    want = taylor.reuse(held, None, at(3.0))
    torch.testing.assert_close(hicache.reuse(held, None, at(3.0)), want)


def test_hicache_with_the_corrector_is_its_formula() -> None:
    """Two reused steps behind the last computed one, three to come, each of length 1."""
    strategy, share = HiCache(no_cache_steps=STEPS, corrector=0.5), 0.5
    held, value = [*torch.randn(3, 4), torch.randn(4)], torch.randn(4)
    gap = [sum(d**i for d in (1, 2)) / 3 for i in range(MOMENTS)]
    correction = strategy.store(held, value, None, at(3.0, 3, gap))[-1]
    error = torch.zeros(4)
    for d in (1, 2):
        line = held[0] + (value - held[0]) * d / 3
        error += line - strategy.reuse([*held[:3], torch.zeros(4)], None, at(d))
    torch.testing.assert_close(correction, share * error / 3)


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf"), True, "0.5"])
def test_sigmas_that_cannot_be(sigma: Any) -> None:
    options = {"no_cache_steps": STEPS, "sigma": sigma}
    refused("sigma=.*: a number above 0", make(ToyDiT), "hicache", **options)


# --- Newton ---------------------------------------------------------------------------------------


def parabola(t: float) -> Tensor:
    return torch.tensor([1.0, -2.0]) + t * torch.tensor([0.5, 3.0]) + t * t * torch.tensor([2, -1])


@pytest.mark.parametrize("places", [(0, 2, 5, 9), (0, 1, 2, 3), (0, 4, 5, 11)])
def test_newton_goes_on_along_a_parabola(places: Sequence[float]) -> None:
    """TaylorCache of order 2 does not."""
    got = []
    newton = NewtonCache(no_cache_steps=STEPS, corrector=0, curvature=1)
    for strategy in (newton, TaylorCache(no_cache_steps=STEPS)):
        held: Sequence[Tensor] = [torch.zeros(2) for _ in range(3)]
        for i, place in enumerate(places):
            distance = place - places[i - 1] if i else 0
            reach = places[i - 1] - places[i - 2] if i > 1 else 0
            now = at(distance, i, reach=reach)
            held = strategy.store(held, parabola(place), None, now)
            held = strategy.store(held, parabola(place), None, at(0, i + 1, reach=distance))
        got.append(strategy.reuse(held, None, at(2.5)))
    want = parabola(places[-1] + 2.5)
    torch.testing.assert_close(got[0], want)
    assert not torch.allclose(got[1], want, rtol=1e-2)


def test_newton_of_order_1_is_taylor() -> None:
    held, value = [*torch.randn(2, 4)], torch.randn(4)
    stored = [
        kind(no_cache_steps=STEPS, max_order=1, corrector=0).store(
            held, value, None, at(3, 2, reach=2)
        )
        for kind in (NewtonCache, TaylorCache)
    ]
    assert all(map(torch.equal, *stored))


def test_newton_has_no_higher_order() -> None:
    high = {"max_order": 3, "low_freqs_order": 3}
    refused("max_order=3: at most 2", make(ToyDiT), "newtoncache", no_cache_steps=STEPS, **high)


@pytest.mark.parametrize("curvature", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_curvatures_that_cannot_be(curvature: Any) -> None:
    options = {"no_cache_steps": STEPS, "curvature": curvature}
    refused("curvature=.*: a share from 0", make(ToyDiT), "newtoncache", **options)


FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "as it is": (2, {}),
    "the whole parabola, half corrected": (2, {"curvature": 1, "corrector": 0.5}),
    "no corrector": (2, {"corrector": 0}),
    "order 1": (1, {"max_order": 1}),
}


#: what runs as a program by default; the first has the most in its graph
IN_A_PROGRAM = (("the whole parabola, half corrected", "timestep"), ("as it is", "step"))


def newton(form: str, axis: str) -> tuple[CachedModel, Newton]:
    """A cached toy, and the same by hand."""
    order, given = FORMS[form]
    options = {"axis": axis, "timesteps": SHIFTED, "no_cache_steps": STEPS, **given}
    model = make(ToyDiT)
    curvature = given.get("curvature", 0.5) if order > 1 else 0
    by_hand = Newton(curvature, model, [order], given.get("corrector", 1), STEPS, SHIFTED, axis)
    return dit_cache_fx.apply(model, "newtoncache", **options), by_hand


def newton_agrees(run: Callable[..., Tensor], by_hand: Newton) -> None:
    for step, timestep in enumerate(SHIFTED):
        inputs = toy_inputs(timestep, seed=step)
        # Lagrange's weights cancel each other, which rounds more
        torch.testing.assert_close(run(**inputs), by_hand(step, **inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", ["step", "timestep"])
@pytest.mark.parametrize("form", FORMS)
def test_newton_is_its_formula(form: str, axis: str) -> None:
    newton_agrees(*newton(form, axis))


@pytest.mark.parametrize(
    ("form", "axis"),
    [
        pytest.param(f, a, marks=() if (f, a) in IN_A_PROGRAM else pytest.mark.exhaustive)
        for f in FORMS
        for a in ("step", "timestep")
    ],
)
def test_newton_in_a_cached_model_and_in_a_program(form: str, axis: str) -> None:
    newton_agrees(*newton(form, axis))
    cached, by_hand = newton(form, axis)
    runner = dit_cache_fx.export(cached, kwargs=toy_inputs(SHIFTED[0])).runner()
    newton_agrees(runner, by_hand)


class Newton(ByHand):
    """By Lagrange's formula through the last computed values, at most three of them."""

    def __init__(self, curvature: float, *args: Any) -> None:
        super().__init__(*args)
        self.curvature = curvature
        self.points: list[tuple[float, Tensor]] = []

    def store(self, c: int, value: Tensor) -> None:
        super().store(c, value)
        self.points = [*self.points[-2:], (self.place[c], value)]

    def sum(self, step: int) -> Tensor:
        parabola = lagrange(self.points, self.place[step])
        line = lagrange(self.points[-2:], self.place[step])
        return self.curvature * parabola + (1 - self.curvature) * line

    def corrected(self, p: int, c: int, value: Tensor) -> Tensor:
        points = [*self.points[-2:], (self.place[c], value)]
        missed = [
            (lagrange(points, self.place[k]) - predicted) * self.dt[k]
            for k, predicted in self.predicted.items()
        ]
        following = min([s for s in self.steps if s > c], default=LENGTH)
        ahead = sum(self.dt[k] for k in range(c + 1, following))
        fade = 1 - sum(self.dt[c:following]) / sum(self.dt[c:])
        return self.share * fade * sum(missed) / ahead if ahead else torch.zeros(())


def lagrange(points: Sequence[tuple[float, Tensor]], place: float) -> Tensor:
    """The polynomial through the points."""
    total = torch.zeros(())
    for t, value in points:
        others = [o for o, _ in points if o != t]
        total = total + value * math.prod((place - o) / (t - o) for o in others)
    return total


# --- FoCa -----------------------------------------------------------------------------------------


def forecast_then_calibrated(before: Tensor, computed: Tensor, gap: int, steps: int) -> Tensor:
    """Equations 6 to 8 of the paper, step by step from the newest computed value."""
    anchor = slope = (computed - before) / gap
    previous, now = computed - slope, computed
    for _ in range(steps):
        forecast = 4 / 3 * now - 1 / 3 * previous + 2 / 3 * slope
        slope = (3 * forecast - 4 * now + previous) / 2
        previous, now = now, now + (anchor + slope) / 2
    return now


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_foca_is_its_equations(steps: int) -> None:
    strategy = FoCa(no_cache_steps=STEPS)
    before, value = torch.randn(2, 4)
    held = strategy.store([before, torch.randn(4)], value, None, at(3.0))
    assert len(held) == strategy.slots() == 2
    got = strategy.reuse(held, None, at(steps))
    torch.testing.assert_close(got, forecast_then_calibrated(before, value, 3, steps))


# --- exponential ----------------------------------------------------------------------------------


def test_exponential_is_its_formula() -> None:
    slope = torch.randn(2, 3, 4)
    rates = torch.tensor([-0.3, -0.05])
    value, curvature = torch.randn(2, 3, 4), slope * rates[:, None, None]
    strategy = Exponential(no_cache_steps=STEPS)
    for d in (1.0, 4.0):
        want = value + slope * ((torch.exp(rates * d) - 1) / rates)[:, None, None]
        torch.testing.assert_close(strategy.reuse([value, slope, curvature], None, at(d)), want)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_what_does_not_fade_is_a_line(rate: float) -> None:
    value, slope = torch.randn(2, 3, 4)
    strategy = Exponential(no_cache_steps=STEPS)
    got = strategy.reuse([value, slope, rate * slope], None, at(3.0))
    torch.testing.assert_close(got, value + 3 * slope)
    zero = torch.zeros(3, 4)
    torch.testing.assert_close(strategy.reuse([value, zero, zero], None, at(3.0)), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exponential_keeps_the_dtype(dtype: torch.dtype) -> None:
    held = [torch.ones(2, 3, dtype=dtype)] * 3
    assert Exponential(no_cache_steps=STEPS).reuse(held, None, at(2.0)).dtype == dtype


# --- in a cached model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("newtoncache", {"corrector": 0.5}),
        ("hicache", {"corrector": 0.5}),
        ("hicache", {"high_freqs_order": 1}),
        ("foca", {}),
        ("exponential", {}),
    ],
)
def test_one_graph_without_recompiling(name: str, options: dict[str, Any]) -> None:
    model, counting = make(ToyDiT), Counting()
    eager, cached = (
        dit_cache_fx.apply(model, name, no_cache_steps=STEPS, check=False, **options)
        for _ in range(2)
    )
    run = compiled(cached, counting)
    with no_recompile():
        for step, timestep in enumerate(TIMES):
            inputs = toy_inputs(timestep, seed=step, batch=2)
            out = eager(**inputs)
            torch.testing.assert_close(run(**inputs), out, rtol=1e-5, atol=1e-5)
            assert torch.equal(out, model(**inputs)) == (step in STEPS)
    assert (counting.count, breaks()) == (1, 0)
    assert (
        actions(eager) == actions(cached) == "".join("C" if s in STEPS else "r" for s in range(10))
    )
