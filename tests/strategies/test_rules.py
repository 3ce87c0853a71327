"""Rules that users come from: each decides as published on a recorded run."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import EasyCache, FirstBlockCache, MagCache, OptionError, TaylorCache
from dit_cache_fx.runtime import step as runtime_step
from tests.strategies.recorded import (
    STEPS,
    actions,
    calls,
    decided,
    letters,
    mean,
    model,
    run,
    samples_and_outputs,
    streams,
)
from tests.toys import JoinedDiT, ToyDiT, make, toy_inputs
from tests.zoo import case, flat

pytestmark = pytest.mark.usefixtures("no_grad")


def both(text: str) -> str:
    """The same, where both kinds of steps are in it: a test of one kind alone shows little."""
    assert set(text) == {"C", "r"}
    return text


# --- the first blocks' residual -------------------------------------------------------------------


def first_block_by_hand(
    threshold: float,
    blocks: int = 1,
    warmup: int = 0,
    in_a_row: float = math.inf,
    reused: float = math.inf,
    accumulated: float = math.inf,
) -> str:
    """DBCache's `can_cache`, with at most `in_a_row` cached steps one after another."""
    computed: list[bool] = []
    kept, total = torch.zeros(()), 0.0
    for step, (before, after) in enumerate(streams(blocks)):
        residual = after - before
        row = next((i for i, c in enumerate(reversed(computed)) if c), len(computed))
        free = step >= max(warmup, 1) and total < accumulated
        free = free and row < in_a_row and computed.count(False) < reused
        if free:
            change = mean(residual - kept) / mean(kept)
            total += change
            free = change < threshold
        computed.append(not free)
        kept = kept if free else residual
    return letters(computed)


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"threshold": 0.1}, {"threshold": 0.1}),
        ({"threshold": 0.4}, {"threshold": 0.4}),
        ({"threshold": 0.3, "first_blocks": 2}, {"threshold": 0.3, "blocks": 2}),
        ({"threshold": 0.3, "last_blocks": 2}, {"threshold": 0.3}),
        ({"threshold": 0.4, "warmup_steps": 6}, {"threshold": 0.4, "warmup": 6}),
        ({"threshold": 0.6, "max_reused_in_a_row": 2}, {"threshold": 0.6, "in_a_row": 2}),
        ({"threshold": 0.6, "max_reused": 5}, {"threshold": 0.6, "reused": 5}),
        ({"threshold": 0.6, "max_accumulated": 2.0}, {"threshold": 0.6, "accumulated": 2.0}),
    ],
)
def test_first_block_cache_decides_as_published(
    options: dict[str, Any], by_hand: dict[str, Any]
) -> None:
    assert decided("firstblockcache", **options) == both(first_block_by_hand(**by_hand))


def test_the_name_of_cache_dit() -> None:
    assert decided("dbcache", threshold=0.4) == decided("firstblockcache", threshold=0.4)


def test_the_first_and_the_last_blocks_run_on_every_step() -> None:
    made = model()
    ran = [0] * 4
    for index, block in enumerate(made.blocks):  # type: ignore[arg-type]
        block.register_forward_hook(lambda *_, i=index: ran.__setitem__(i, ran[i] + 1))
    options = {"threshold": 0.4, "first_blocks": 1, "last_blocks": 1}
    cached = dit_cache_fx.apply(made, "firstblockcache", check=False, **options)
    cached(**calls()[0])
    ran[:] = [0] * 4
    run(cached, calls()[1:])
    computed = both(actions(cached)).count("C") - 1
    assert ran == [STEPS - 1, computed, computed, STEPS - 1]


def test_a_reused_step_adds_what_the_other_blocks_added() -> None:
    """By hand: this step's first block, then the residual of the newest computed step."""
    plain = model()
    cached = dit_cache_fx.apply(model(), "firstblockcache", threshold=0.4)
    rest = torch.zeros(())
    for inputs in calls():
        got = cached(**inputs)
        c = plain.condition(inputs["timestep"], inputs["text"])
        first = plain.blocks[0](plain.embed(inputs["x"]), c)
        h = first
        for block in list(plain.blocks)[1:]:
            h = block(h, c)
        if cached.cache_report().timeline[-1].action == "computed":
            rest = h - first
            assert torch.equal(got, plain.head(h))
        else:
            assert torch.equal(got, plain.head(first + rest))
    both(actions(cached))


def test_text_that_the_last_block_reads_starts_from_this_steps_text_too() -> None:
    plain = make(JoinedDiT, depth=4)
    options = {"threshold": 0.5, "last_blocks": 1}
    cached = dit_cache_fx.apply(make(JoinedDiT, depth=4), "firstblockcache", **options)
    rest = (torch.zeros(()), torch.zeros(()))
    for inputs in calls():
        got = cached(**inputs)
        c = plain.condition(inputs["timestep"], inputs["text"])
        first = plain.blocks[0](plain.embed(inputs["x"]), plain.text_in(inputs["text"]), c)
        if cached.cache_report().timeline[-1].action == "computed":
            middle = plain.blocks[2](*plain.blocks[1](*first, c), c)
            rest = middle[0] - first[0], middle[1] - first[1]
        else:
            middle = first[0] + rest[0], first[1] + rest[1]
        want = plain.head(plain.blocks[3](*middle, c)[0])
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    both(actions(cached))


# --- the peers themselves -------------------------------------------------------------------------

#: a threshold at which each model both computes and reuses
PEERS = {"FluxTransformer2DModel": 0.5, "HunyuanVideoTransformer3DModel": 0.8}


def moving(name: str, steps: int = 12) -> list[dict[str, Any]]:
    """The calls of a model of the zoo, its sample on a line."""
    model_case = case(name)
    ends = [model_case.inputs(0.5, seed=seed)["hidden_states"] for seed in (0, 1)]
    made = []
    for i, timestep in enumerate(model_case.timesteps(steps)):
        way = ((i + 1) / (steps + 1)) ** 2
        inputs = dict(model_case.inputs(timestep))
        made.append(inputs | {"hidden_states": (1 - way) * ends[0] + way * ends[1]})
    return made


def like_diffusers(name: str, config: Any, strategy: str, **options: Any) -> str:
    """The cached model gives what diffusers' own cache gives, bit by bit."""
    own = case(name).build()
    peer = copy.deepcopy(own)
    peer.enable_cache(config)
    cached = dit_cache_fx.apply(own, strategy, **options)
    for inputs in moving(name):
        with peer.cache_context("cond"):
            want = flat(peer(**inputs))
        assert torch.equal(flat(cached(**inputs)), want)
    return actions(cached)


@pytest.mark.parametrize("name", PEERS)
def test_diffusers_first_block_cache(name: str) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    config = hooks.FirstBlockCacheConfig(threshold=PEERS[name])
    both(like_diffusers(name, config, "firstblockcache", threshold=PEERS[name]))


@pytest.mark.parametrize("options", [(0.06, 3, 0.2), (0.3, 5, 0.3)])
def test_diffusers_mag_cache(options: tuple[float, int, float]) -> None:
    """With more ratios than steps: both take the nearest."""
    hooks = pytest.importorskip("diffusers.hooks")
    given = dict(zip(("threshold", "max_skip_steps", "retention_ratio"), options, strict=True))
    ratios = [1.0, *(1 + 0.08 * math.sin(3 * i) for i in range(16))]
    config = hooks.MagCacheConfig(num_inference_steps=12, mag_ratios=ratios, **given)
    ours = {**given, "mag_ratios": ratios, "num_steps": 12}
    both(like_diffusers("LTXVideoTransformer3DModel", config, "magcache", **ours))


# --- magnitudes -----------------------------------------------------------------------------------


def magnitudes_by_hand(ratios: list[float], threshold: float, most: int, share: float) -> str:
    computed: list[bool] = []
    product, error, reused = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        skip = False
        if step >= int(share * len(ratios) + 0.5):
            product, reused = product * ratio, reused + 1
            error += abs(1 - product)
            skip = step > 0 and error <= threshold and reused <= most
            if not skip:
                product, error, reused = 1.0, 0.0, 0
        computed.append(not skip)
    return letters(computed)


@pytest.mark.parametrize("options", [(0.06, 3, 0.2), (0.2, 4, 0.0), (0.5, 2, 0.5)])
def test_mag_cache_decides_as_published(options: tuple[float, int, float]) -> None:
    ratios = [1 + 0.1 * math.sin(2 * i) for i in range(STEPS)]
    names = ("threshold", "max_skip_steps", "retention_ratio")
    got = decided("magcache", mag_ratios=ratios, **dict(zip(names, options, strict=True)))
    assert got == both(magnitudes_by_hand(ratios, *options))


def test_ratios_are_measured() -> None:
    """By hand: tokens' norms of what all blocks add, against those of the step before."""
    made = streams(4)
    residuals = [(after - before).norm(dim=-1) for before, after in made]
    want = [1.0] + [
        (new / (old + 1e-8)).mean().item() for old, new in itertools.pairwise(residuals)
    ]
    cached = dit_cache_fx.apply(model(), "magcache", calibrate=True)
    run(cached)
    assert actions(cached) == "C" * STEPS
    measured = [record.measured for record in cached.cache_report().timeline]
    assert measured == pytest.approx(want, rel=1e-5)
    again = dit_cache_fx.apply(model(), "magcache", mag_ratios=measured, threshold=0.5)
    run(again)
    assert actions(again) == both(magnitudes_by_hand(want, 0.5, 3, 0.2))


# --- the rate of transformation -------------------------------------------------------------------


def easy_by_hand(
    threshold: float, warmup: int, steps: int | None = None
) -> tuple[str, list[Tensor]]:
    """The published loop; with the number of `steps` the last one computes."""
    computed: list[bool] = []
    outputs: list[Tensor] = []
    rate, total = math.nan, 0.0
    newest = before = torch.zeros(())  # outputs and samples of computed steps
    previous, cache = torch.zeros(()), torch.zeros(())
    for step, (x, y) in enumerate(samples_and_outputs()):
        if step < max(warmup, 1) or step + 1 == steps:
            compute, total = True, 0.0
        else:
            total += rate * mean(x - previous) / mean(newest)
            compute = not total < threshold
            total = 0.0 if compute else total
        previous = x
        if compute:
            if step > 0:
                rate = mean(y - newest) / mean(x - before)
            newest, before, cache = y, x, y - x
        computed.append(compute)
        outputs.append(y if compute else x + cache)
    return letters(computed), outputs


@pytest.mark.parametrize(
    ("threshold", "warmup", "steps"), [(0.3, 4, None), (0.8, 2, None), (0.8, 0, STEPS)]
)
def test_easy_cache_decides_as_published(threshold: float, warmup: int, steps: int | None) -> None:
    options = {"threshold": threshold, "warmup_steps": warmup, "num_steps": steps}
    cached = dit_cache_fx.apply(model(), "easycache", **options)
    got = run(cached)
    want, outputs = easy_by_hand(threshold, warmup, steps)
    assert actions(cached) == both(want)
    for a, b in zip(got, outputs, strict=True):
        assert torch.equal(a, b)


def test_easy_cache_runs_nothing_of_the_model_on_a_reused_step() -> None:
    cached = dit_cache_fx.apply(model(), "easycache", threshold=1e9, warmup_steps=2)
    made = run(cached)
    assert actions(cached) == "CC" + "r" * (STEPS - 2)
    assert "call_module" not in str(cached.explain().graphs[0].reused)
    assert "model." not in cached.explain().graphs[0].reused
    assert all(t.isfinite().all() for t in made)


class WideDiT(ToyDiT):
    """Its sample has a condition behind it in the channels, as image-to-video models take it."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        out = super().forward(x, timestep, text)
        return out[..., : out.shape[-1] // 2]


def test_easy_cache_compares_the_part_of_the_sample_that_the_output_is_of() -> None:
    cached = dit_cache_fx.apply(make(WideDiT), "easycache", threshold=1e9, warmup_steps=1)
    plain = make(WideDiT)
    given = calls(4)
    y, x = plain(**given[1]), given[1]["x"][..., :4]
    got = run(cached, given)
    assert actions(cached) == "CCrr"
    assert torch.equal(got[3], given[3]["x"][..., :4] + (y - x))


class TwoWaysDiT(ToyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return super().forward(x, timestep, text).mean(dim=1)


def test_an_output_that_is_not_to_be_compared_with_the_sample_is_refused() -> None:
    cached = dit_cache_fx.apply(make(TwoWaysDiT), "easycache")
    with pytest.raises(dit_cache_fx.CaptureError, match="cannot be compared with the sample x, of"):
        cached(**toy_inputs(1.0))


# --- a tolerance ----------------------------------------------------------------------------------


#: a run on which a step is much like the one before
SMOOTH = calls(span=60.0)


def tolerance_by_hand(
    tolerance: float, places: list[float], given: list[dict[str, Any]]
) -> tuple[str, list[float]]:
    """Order 1: the line through the newest two computed values, and its error at the next.

    `places`: of the steps and the end behind them, as shares of the whole way.
    """
    computed: list[bool] = []
    errors: list[float] = []
    values: list[tuple[int, Tensor]] = []
    error = gap = math.nan
    for step, (_, value) in enumerate(streams(4, given)):
        distance = step - values[-1][0] if values else 0
        onward = places[step + 1] - places[step - distance]
        expected = onward**2
        if len(values) > 1:
            growth = onward / gap
            expected = error * gap * growth**3 if growth <= 2.5 else math.inf
        compute = step == 0 or not expected <= tolerance
        errors.append(expected)
        computed.append(compute)
        if compute:
            predicted = values[-1][1] if values else value
            if len(values) > 1:
                (a, old), (b, new) = values[-2:]
                predicted = new + (new - old) * (distance / (b - a))
            if values:
                error = ((value - predicted).norm() / value.norm()).item()
                gap = places[step] - places[step - distance]
            values.append((step, value))
    return letters(computed), errors


#: timesteps with which the last steps are the longest
SHIFTED = [1000 * 5 * u / (1 + 4 * u) for u in (1 - i / 24 for i in range(24))]


@pytest.mark.parametrize("timesteps", [None, SHIFTED], ids=["steps", "shifted"])
@pytest.mark.parametrize("tolerance", [0.004, 0.01, 0.04])
def test_the_tolerance_by_hand(tolerance: float, timesteps: list[float] | None) -> None:
    known = {"timesteps": timesteps} if timesteps else {"num_steps": 24}
    cached = dit_cache_fx.apply(model(), "taylorcache", max_order=1, tolerance=tolerance, **known)
    given = [
        inputs | {"timestep": torch.full([1], t, dtype=torch.float64)}
        for inputs, t in zip(SMOOTH, timesteps or [1000.0 - i for i in range(24)], strict=True)
    ]
    run(cached, given)
    ends = [*timesteps, 2 * timesteps[-1] - timesteps[-2]] if timesteps else [*range(25)]
    places = [(t - ends[0]) / (ends[-1] - ends[0]) for t in ends]
    want, errors = tolerance_by_hand(tolerance, places, given)
    assert actions(cached) == both(want)
    records = cached.cache_report().timeline
    assert [r.measured for r in records[1:]] == pytest.approx(errors[1:], rel=1e-3)
    assert cached.cache_report().threshold == tolerance


def test_a_smaller_tolerance_computes_more() -> None:
    counts = []
    for tolerance in (0.0005, 0.005, 0.05):
        cached = dit_cache_fx.apply(model(), "taylorcache", tolerance=tolerance)
        run(cached, SMOOTH)
        counts.append(actions(cached).count("C"))
    assert counts[0] > counts[1] > counts[2]


def test_a_constant_model_is_asked_again_within_two_and_a_half_times_the_gap() -> None:
    """Its error is 0: the gaps grow, but not without end."""
    cached = dit_cache_fx.apply(model(), "taylorcache", max_order=0, tolerance=0.0017)
    inputs = calls()[0]
    for i in range(40):
        cached(**inputs | {"timestep": torch.full([1], 1000.0 + 1e-4 * i, dtype=torch.float64)})
    assert actions(cached) == "CrC" + "r" * 4 + "C" + "r" * 11 + "C" + "r" * 20


def test_nothing_is_read_on_reused_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured goes to the CPU once for each computed step."""
    gathered: list[int] = []
    original = runtime_step.in_one
    monkeypatch.setattr(runtime_step, "in_one", lambda ts: (gathered.append(1), original(ts))[1])
    cached = dit_cache_fx.apply(model(), "taylorcache", max_order=1, tolerance=0.01)
    counts = []
    for inputs in SMOOTH:
        cached(**inputs)
        counts.append(len(gathered))
    done = both(actions(cached))
    new = [b - a for a, b in itertools.pairwise(counts)]
    # one to note a computed step in the timeline, one to decide on the step behind it
    want = [(now == "C") + (before == "C") for before, now in itertools.pairwise(done)]
    assert new == want


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (FirstBlockCache, {"threshold": 0}, "threshold=0: a number above 0"),
        (FirstBlockCache, {"threshold": math.nan}, "threshold=nan: a number above 0"),
        (FirstBlockCache, {"threshold": True}, "threshold=True: a number above 0"),
        (FirstBlockCache, {"first_blocks": 0}, "first_blocks=0: an integer from 1"),
        (FirstBlockCache, {"last_blocks": -1}, "last_blocks=-1: an integer from 0"),
        (FirstBlockCache, {"warmup_steps": 1.5}, "warmup_steps=1.5: an integer from 0"),
        (FirstBlockCache, {"max_reused": -1}, "max_reused=-1: an integer from 0, or None"),
        (FirstBlockCache, {"max_reused_in_a_row": "2"}, "max_reused_in_a_row='2': an integer"),
        (FirstBlockCache, {"max_accumulated": 0}, "max_accumulated=0: a number above 0"),
        (
            MagCache,
            {},
            "mag_ratios=None: a finite ratio above 0 for each step; or pass calibrate=True",
        ),
        (MagCache, {"mag_ratios": []}, r"mag_ratios=\[\]: a finite ratio above 0"),
        (MagCache, {"mag_ratios": [1.0, 0.0]}, r"mag_ratios=\[1.0, 0.0\]: a finite ratio"),
        (MagCache, {"mag_ratios": "ab"}, "mag_ratios='ab': a finite ratio"),
        (MagCache, {"mag_ratios": [1.0], "threshold": -1}, "threshold=-1: a number above 0"),
        (MagCache, {"mag_ratios": [1.0], "max_skip_steps": -1}, "max_skip_steps=-1: an integer"),
        (MagCache, {"mag_ratios": [1.0], "retention_ratio": 2}, "retention_ratio=2: a share"),
        (EasyCache, {"threshold": -0.1}, "threshold=-0.1: a number above 0"),
        (EasyCache, {"warmup_steps": None}, "warmup_steps=None: an integer from 0"),
        (
            EasyCache,
            {"no_cache_block_id": {"blocks": {1}}},
            "None: EasyCache reuses the whole model",
        ),
        (TaylorCache, {"tolerance": 0}, "tolerance=0: a number above 0, for example"),
        (TaylorCache, {"tolerance": math.inf}, "tolerance=inf: a number above 0"),
        (TaylorCache, {}, "or pass a tolerance"),
    ],
)
def test_options_that_cannot_work(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        kind(**options)


@pytest.mark.parametrize("ends", [(4, 0), (2, 2), (1, 9)])
def test_blocks_that_all_run_are_refused(ends: tuple[int, int]) -> None:
    first, last = ends
    cached = dit_cache_fx.apply(model(), "firstblockcache", first_blocks=first, last_blocks=last)
    with pytest.raises(OptionError, match="each of the model's 4 blocks always runs"):
        run(cached)


# --- what is no number ----------------------------------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "firstblockcache": {"threshold": 1e6, "max_accumulated": 1e9},
    "easycache": {"threshold": 1e6, "warmup_steps": 0},
    "taylorcache": {"tolerance": 1e9, "max_order": 1},
}


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("name", RULES)
def test_a_measure_that_is_no_number_computes_and_the_rule_recovers(
    name: str, value: float
) -> None:
    """Two steps whose sample is `value` throughout, in a run that is reused elsewhere."""
    cached = dit_cache_fx.apply(model(), name, **RULES[name])
    plain = model()
    made = calls()
    for index in (8, 9):
        made[index]["x"] = torch.full_like(made[index]["x"], value)
    got, done = [], ""
    for inputs in made:  # such a sample is known for that of another generation
        got.append(cached(**inputs))
        done += actions(cached)[-1]
    if not math.isfinite(value) and name != "taylorcache":
        assert done[8] == "C"
    assert "r" in done[14:]
    for letter, out, inputs in zip(done, got, made, strict=True):
        if letter == "C":
            assert torch.equal(out.nan_to_num(), plain(**inputs).nan_to_num())
    assert all(out.isfinite().all() for out in got[16:])


# --- what reports say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("magcache", {"mag_ratios": [1.0] * 6}, "on those of 6 magnitude ratios: 0, 4 (2 in all)"),
        (
            "easycache",
            {"warmup_steps": 2},
            "on those of the first 2 and the last 1: 0-1, 5 (3 in all), when its rule on the "
            "sample decides so (measured against 0.05)",
        ),
        (
            "firstblockcache",
            {"threshold": 0.2},
            "when its rule on the residual of the first blocks decides so (measured against 0.2)",
        ),
        ("taylorcache", {"tolerance": 0.5}, "its rule on its measurements on computed steps"),
    ],
)
def test_explain_tells_what_decides(name: str, options: dict[str, Any], text: str) -> None:
    cached = dit_cache_fx.apply(model(), name, num_steps=6, **options)
    run(cached, calls(6))
    assert text in cached.explain().decides
    assert str(cached.explain())
