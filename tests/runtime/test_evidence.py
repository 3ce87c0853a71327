"""What tells which request, branch, step and generation a call belongs to where nobody says it.

A call is answered from what is held only where the evidence says that it goes on from it. Each test
is of a kind of calls that would get another request's picture otherwise, or that would be computed
in vain.
"""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CachedModel, DitCacheWarning
from dit_cache_fx.runtime.tracking.trajectory import Trajectory
from tests.toys import DIM, ByHand, ToyDiT, make, toy_inputs

STEPS = 8
WIDE = 64  # tokens: a sample that says something


pytestmark = pytest.mark.usefixtures("no_grad")


def cache(computed: Any = (0,), **options: Any) -> CachedModel:
    return dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps=computed, **options)


def noise(seed: int) -> Tensor:
    return torch.randn(1, WIDE, 8, generator=torch.Generator().manual_seed(seed))


def sample(seed: int, step: float, steps: int = STEPS) -> Tensor:
    """A sample on its way from noise to a picture, as a sampler moves it."""
    left = 1 - step / steps
    return left * noise(seed) + (1 - left) * noise(1000 + seed)


def time(step: float, steps: int = STEPS) -> Tensor:
    return torch.tensor([1000 * (1 - step / steps)])


TEXT = toy_inputs(0.0)["text"]


def call(cached: CachedModel, x: Tensor, t: Tensor, text: Tensor = TEXT) -> str:
    """Call it; what it did: the step and "c" or "r"."""
    output = cached(x=x, timestep=t, text=text)
    record = cached.cache_report().timeline[-1]
    if record.action == "computed":
        assert torch.equal(output, cached._model(x=x, timestep=t, text=text))
    return f"{record.step}{record.action[0]}"


# --- requests, windows ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_requests_with_one_prompt_in_turn_are_told_apart_by_their_samples(offset: int) -> None:
    cached = cache(computed=range(0, STEPS, 4))
    by_hand = ByHand(cached._model, ["blocks"])
    for tick in range(STEPS + 2 * offset):
        for request in range(3):
            step = tick - offset * request
            if 0 <= step < STEPS:
                given = {"x": sample(request, step), "timestep": time(step), "text": TEXT}
                got = cached(**given)
                computed = cached.cache_report().timeline[-1].action == "computed"
                assert torch.equal(got, by_hand(computed, branch=request, **given))
    assert cached.cache_report().calls_reused >= 3 * STEPS // 2


@pytest.mark.parametrize("named", [False, True])
def test_windows_of_one_picture_are_known_again_by_their_samples(named: bool) -> None:
    """Four windows, one prompt, one timestep: not four steps."""
    cached = cache()
    by_hand = ByHand(cached._model, ["blocks"])
    with cached.cache_context("cond") if named else nullcontext():
        for step in range(STEPS):
            for window in range(4):
                given = {"x": sample(window, step), "timestep": time(step), "text": TEXT}
                got = cached(**given)
                assert torch.equal(got, by_hand(step == 0, branch=window, **given))
    assert [r.step for r in cached.cache_report().timeline][-1] == STEPS - 1


def test_windows_that_nothing_tells_apart_compute_with_one_warning() -> None:
    cached = cache()
    with pytest.warns(DitCacheWarning) as caught:
        done = [call(cached, noise(10 * i + w), time(i)) for i in range(4) for w in range(9)]
    assert {action[-1] for action in done} == {"c"}
    assert len({str(w.message) for w in caught}) == len(caught)


def test_more_windows_than_are_known_are_never_answered_from_each_other() -> None:
    cached = cache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DitCacheWarning)
        done = [call(cached, noise(100 * i + w), time(i)) for i in range(3) for w in range(40)]
    assert {action[-1] for action in done} == {"c"}


# --- conditioning ---------------------------------------------------------------------------------


def test_guidance_that_ends_with_conditioning_made_anew_in_each_call() -> None:
    cached = cache(computed={0, 4})
    by_hand = ByHand(cached._model, ["blocks"])
    texts = {"uncond": TEXT, "cond": toy_inputs(0.0, prompt=1)["text"]}
    for step in range(6):
        for name in ("uncond", "cond") if step < 2 else ("cond",):
            given = {"x": sample(0, step), "timestep": time(step), "text": texts[name].clone()}
            got = cached(**given)
            assert torch.equal(got, by_hand(step in {0, 4}, branch=name, **given)), (step, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_conditioning_that_is_changed_in_place_is_other_conditioning(mode: Any) -> None:
    with mode():
        cached = cache()
        text = TEXT.clone()
        assert call(cached, sample(0, 0), time(0), text) == "0c"
        assert call(cached, sample(0, 1), time(1), text) == "1r"
        text.add_(1)
        assert call(cached, sample(0, 2), time(2), text).endswith("c")


def test_conditioning_of_permuted_values_is_other_conditioning() -> None:
    cached = cache()
    call(cached, sample(0, 0), time(0), TEXT)
    assert call(cached, sample(0, 1), time(1), TEXT.flip(1).contiguous()).endswith("c")


def test_conditioning_that_changes_in_each_call_is_computed_with_one_warning() -> None:
    cached = cache()
    with pytest.warns(DitCacheWarning, match=r"the conditioning of the blocks \(text\)") as caught:
        done = [call(cached, sample(0, i, 20), time(i, 20), TEXT + i) for i in range(20)]
    assert {action[-1] for action in done} == {"c"}
    assert len(caught) == 1


def test_what_varies_in_a_cache_context_is_known_from_its_second_change_on() -> None:
    """A ControlNet's residuals, say: the context tells the branch, the sample that it goes on."""
    cached = cache()
    with cached.cache_context("cond"):
        done = [call(cached, sample(0, i), time(i), TEXT + i) for i in range(5)]
        assert done == ["0c", "1c", "2r", "3r", "4r"]
        # another prompt, another sample, further down: another request
        assert call(cached, sample(7, 6), time(6), TEXT - 9) == "0c"


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [True, False], ids=["sampled", "constant"])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("shift", "steps"), [(3, 200), (9, 50)])
def test_timesteps_that_round_to_one_value_are_steps(
    shift: int, steps: int, branches: int, moves: bool
) -> None:
    cached = cache(computed=range(0, steps, 4))
    texts = [toy_inputs(0.0, prompt=branch)["text"] for branch in range(branches)]
    for step in range(steps):
        left = 1 - step / steps
        shifted = shift * left / (1 + (shift - 1) * left)
        t = torch.tensor([1000 * shifted]).bfloat16().float()
        x = sample(0, 1 - shifted, 1) if moves else noise(0)
        for text in texts:
            done = call(cached, x, t, text)
            if moves or step > 1:  # a first call that comes again is computed, and counted later
                assert done == f"{step}{'c' if step % 4 == 0 else 'r'}"


def test_rounded_timesteps_do_not_jump_where_samples_tell_nothing() -> None:
    """In bfloat16 a step of 4 after steps of 0 and 4 may be one of 8."""
    cached, steps = cache(), 50
    with cached.cache_context("cond"):
        for step in range(steps):
            t = torch.tensor([1000 * 9 * (1 - step / steps) / (1 + 8 * (1 - step / steps))])
            done = call(cached, noise(step), t.bfloat16().float())
            assert step < 2 or done == f"{step}r"


def test_a_timestep_that_moves_back_begins_anew_whatever_the_sample_says() -> None:
    """A picture that is edited: the sample is nearly the same in each call."""
    cached = cache()
    steps = [0, 1, 2, 0, 1, 2, 1, 2]
    done = [call(cached, noise(0) + 1e-3 * i, time(step)) for i, step in enumerate(steps)]
    assert done == ["0c", "1r", "2r", "0c", "1r", "2r", "0c", "1r"]


def test_a_sampler_that_evaluates_timesteps_twice() -> None:
    """Heun: each timestep but the first; PNDM: the second one."""
    for steps in ([0, 1, 1, 2, 2, 3, 3, 4], [0, 1, 1, 2, 3, 4]):
        cached = cache(computed={0, 3})
        done = [
            call(cached, sample(0, step + 0.1 * (i % 2)), time(step))
            for i, step in enumerate(steps)
        ]
        want = [f"{i}{'c' if i in {0, 3} else 'r'}" for i in range(len(steps))]
        assert done == want


def test_steps_that_ran_uncached_count() -> None:
    cached = cache(computed=range(0, 20, 5))
    done = []
    for step in range(12):
        with torch.set_grad_enabled(6 <= step < 10), warnings.catch_warnings():
            warnings.simplefilter("ignore", DitCacheWarning)
            done.append(call(cached, sample(0, step, 20), time(step, 20)))
    assert done[:6] == ["0c", "1r", "2r", "3r", "4r", "5c"]
    assert done[10:] == ["10c", "11r"]


@pytest.mark.parametrize("uncached", [True, False], ids=["gradients", "guidance off"])
def test_state_from_before_a_computed_step_that_was_missed_is_not_used(uncached: bool) -> None:
    cached = cache(computed={0, 3})
    other = toy_inputs(0.0, prompt=1)["text"]
    for step in range(6):
        if step in (2, 3, 4) and uncached:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DitCacheWarning)
                cached(x=sample(0, step), timestep=time(step), text=TEXT)
            continue
        if step in (2, 3, 4):
            call(cached, sample(0, step), time(step), other)
            continue
        done = call(cached, sample(0, step), time(step))
    assert done == "5c"


def test_steps_that_cur_timestep_leaves_out_are_not_missed() -> None:
    cached = cache(computed={0, 3})
    done = []
    for step in (0, 1, 2, 4):
        cached.cur_timestep = step
        done.append(call(cached, sample(0, step), time(step)))
    assert done == ["0c", "1r", "2r", "4r"]


# --- generations ----------------------------------------------------------------------------------


def test_an_eleventh_step_of_ten_is_another_generation() -> None:
    cached = cache(computed={0}, num_steps=4)
    done = [call(cached, sample(0, step), time(step)) for step in range(6)]
    assert done == ["0c", "1r", "2r", "3r", "0c", "1r"]


def test_more_steps_than_the_generation_before_had_are_none() -> None:
    """Only what the user says ends a generation: the number that was counted does not."""
    cached = cache(computed={0})
    for steps in (3, 6):
        done = [call(cached, sample(steps, step), time(step)) for step in range(steps)]
    assert done == ["0c", "1r", "2r", "3r", "4r", "5r"]


def test_any_element_of_a_timestep_that_moves_back_is_another_generation() -> None:
    """A video in chunks: a timestep for each frame, the newest frame begins anew."""
    cached = cache()
    times = [(9, 9, 9), (7, 7, 7), (5, 5, 5), (0.2, 0.2, 9), (0.2, 0.2, 7)]
    text = TEXT.repeat(3, 1, 1)
    done = []
    for step, values in enumerate(times):
        cached(x=noise(step).repeat(3, 1, 1), timestep=torch.tensor(values), text=text)
        record = cached.cache_report().timeline[-1]
        done.append(f"{record.step}{record.action[0]}")
    assert done == ["0c", "1r", "2r", "0c", "1r"]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("broken_off", [2, 3, 5])
def test_a_run_broken_off_then_one_that_starts_lower(broken_off: int, named: bool) -> None:
    """With the very same conditioning: the sample does not go on from the one before."""
    cached, steps = cache(computed={0, 2}), 20
    with cached.cache_context("cond") if named else nullcontext():
        for step in range(broken_off):
            call(cached, sample(0, step, steps), time(step, steps))
        first = broken_off + 1
        done = [call(cached, sample(5, s, steps), time(s, steps)) for s in range(first, first + 4)]
    assert done == ["0c", "1r", "2c", "3r"]


def test_a_sample_unlike_the_one_before_is_of_elsewhere() -> None:
    """The late steps of a shifted schedule are long: there any two samples are near enough."""
    cached = cache(computed={0, 4})
    for step in (0, 0.6, 1.6, 3.3):
        call(cached, sample(0, step, 10), time(step, 10))
    assert call(cached, sample(5, 6.2, 10), time(6.2, 10)) == "0c"
    assert call(cached, sample(5, 8, 10), time(8, 10)) == "1r"


def test_a_long_step_goes_on() -> None:
    cached = cache(computed={0})
    for step in (0, 0.6, 1.6, 3.3):
        call(cached, sample(0, step, 10), time(step, 10))
    assert call(cached, sample(0, 6.2, 10), time(6.2, 10)) == "4r"


def test_another_sample_of_the_same_picture_computes() -> None:
    """Variations of one picture at a low noise level are alike, but too far apart for a step."""
    cached = cache()

    def edited(seed: int, step: int) -> Tensor:
        return (1 - step / 20) * noise(seed) + step / 20 * noise(1000)

    for step in (14, 15, 16):
        call(cached, edited(0, step), time(step, 20))
    assert call(cached, edited(5, 17), time(17, 20)) == "3c"
    assert call(cached, edited(5, 18), time(18, 20)) == "4r"


def test_a_timestep_that_jumps_far_computes_where_the_sample_is_alike() -> None:
    cached = cache()
    for step in range(3):
        call(cached, sample(0, step, 50), time(step, 50))
    assert call(cached, sample(0, 20, 50), time(20, 50)) == "3c"


def test_a_timestep_that_jumps_computes() -> None:
    """Where the samples say nothing: each is far from the one before."""
    cached = cache()
    for step in range(4):
        call(cached, noise(step), time(step, 50))
    assert call(cached, noise(50), time(5.3, 50)) == "4c"
    assert call(cached, noise(51), time(30, 50)) == "0c"


def test_a_timestep_that_is_known_to_come_next_is_no_jump() -> None:
    steps = [0, 0.1, 0.2, 0.3, 4.0, 7.0]
    times = [float(time(step)) for step in steps]
    cached = cache(timesteps=times)
    done = [call(cached, sample(0, step), time(step)) for step in steps]
    assert done == ["0c", "1r", "2r", "3r", "4r", "5r"]


def test_a_sample_of_no_numbers_computes() -> None:
    cached = cache()
    call(cached, sample(0, 0), time(0))
    call(cached, sample(0, 1), time(1))
    cached(x=sample(0, 2) * float("nan"), timestep=time(2), text=TEXT)
    assert cached.cache_report().timeline[-1].action == "computed"


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
def test_retries_of_the_first_call_begin_anew(branches: int, kept: bool) -> None:
    """The same seed and prompt once more, from the start: no second step."""
    cached = cache(computed={0, 3})
    texts = [toy_inputs(0.0, prompt=branch)["text"] for branch in range(branches)]
    for _ in range(3):
        for text in texts:
            assert call(cached, sample(0, 0), time(0), text if kept else text.clone()) == "0c"
    for text in texts:
        assert call(cached, sample(0, 1), time(1), text if kept else text.clone()) == "1r"


def test_arguments_that_change_in_each_call_are_named_by_one_warning() -> None:
    class WithNumber(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, gain: float = 1.0) -> Any:
            return super().forward(x, timestep, text) * gain

    cached = dit_cache_fx.apply(make(WithNumber), "deepcache", no_cache_steps={0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            cached(**toy_inputs(1000.0 - step), gain=0.1 * step)
    assert [type(w.message) for w in caught] == [DitCacheWarning]
    assert re.search(r"gain is \d\.\d+, was \d\.\d+", str(caught[0].message))


def test_a_second_timestep_is_no_conditioning() -> None:
    """Flow maps take both ends of a step."""

    class BothEnds(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, r_timestep: Tensor) -> Any:
            return super().forward(x, timestep, text) + super().forward(x, r_timestep, text)

    cached = dit_cache_fx.apply(make(BothEnds), "deepcache", no_cache_steps={0})
    for step in range(4):
        cached(x=sample(0, step), timestep=time(step), text=TEXT, r_timestep=time(step + 1))
    assert [r.action for r in cached.cache_report().timeline] == ["computed"] + 3 * ["reused"]


class SoundDiT(ToyDiT):
    """Denoises two samples in one call."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, sound: Tensor) -> Any:  # type: ignore[override]
        h = torch.cat([self.embed(x), self.embed(sound)], dim=1)
        h = self.head(self.trunk(h, self.condition(timestep, text)))
        return h[:, : x.shape[1]], h[:, x.shape[1] :]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_second_sample_is_no_conditioning(autocast: bool) -> None:
    """What the model gives back in its shape moves with the steps; autocast changes its dtype."""
    cached = dit_cache_fx.apply(make(SoundDiT), "deepcache", no_cache_steps={0, 3})
    for step in range(6):
        sound = sample(1, step)[:, :3]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            cached(x=sample(0, step), timestep=time(step), text=TEXT, sound=sound)
    actions = [r.action for r in cached.cache_report().timeline]
    assert actions == ["computed", "reused", "reused", "computed", "reused", "reused"]


def test_ids_shaped_like_a_second_result_are_conditioning() -> None:
    class WithIds(SoundDiT):
        def forward(  # type: ignore[override]
            self, x: Tensor, timestep: Tensor, text: Tensor, ids: Tensor, sound: Tensor
        ) -> Any:
            return super().forward(x + ids.sum(), timestep, text, sound)

    cached = dit_cache_fx.apply(make(WithIds), "deepcache", no_cache_steps={0})
    for step in range(2):
        for number in range(2):
            ids, sound = torch.full((1, 3, DIM), number), sample(1, step)[:, :3]
            cached(x=sample(0, step), timestep=time(step), text=TEXT, ids=ids, sound=sound)
    branches = [(r.branch, r.action) for r in cached.cache_report().timeline]
    assert branches == [(0, "computed"), (1, "computed"), (0, "reused"), (1, "reused")]


def test_conditioning_shaped_like_the_only_sample_is_conditioning() -> None:
    class Edited(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x + image, timestep, text)

    cached = dit_cache_fx.apply(make(Edited), "deepcache", no_cache_steps={0})
    for step in range(2):
        for image in (sample(1, 0), sample(2, 0)):
            cached(x=sample(0, step), timestep=time(step), text=TEXT, image=image)
    branches = [(r.branch, r.action) for r in cached.cache_report().timeline]
    assert branches == [(0, "computed"), (1, "computed"), (0, "reused"), (1, "reused")]


def test_a_second_timestep_is_known_by_the_name_of_the_first() -> None:
    class TwoTimesDiT(ToyDiT):
        def forward(  # type: ignore[override]
            self, x: Tensor, x_time: Tensor, text: Tensor, sound_time: Tensor
        ) -> Any:
            return super().forward(x, x_time + sound_time, text)

    cached = dit_cache_fx.apply(
        make(TwoTimesDiT), "deepcache", timestep="x_time", no_cache_steps={0}
    )
    for step in range(3):
        times = {"x_time": time(step), "sound_time": time(step) / 2}
        cached(x=sample(0, step), text=TEXT, **times)
    actions = [r.action for r in cached.cache_report().timeline]
    assert actions == ["computed", "reused", "reused"]


def test_what_a_generation_before_has_left_is_not_compared_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that ends at the timestep of the run before: on a GPU, comparing waits."""
    cached = cache(computed=(0, 2))
    for step in range(STEPS):
        call(cached, sample(0, step), time(step))
    compared: list[bool] = []
    judge = Trajectory.judge

    def judging(self: Trajectory, *args: Any, wait: bool, **options: Any) -> Any:
        compared.append(wait)
        return judge(self, *args, wait=wait, **options)

    monkeypatch.setattr(Trajectory, "judge", judging)
    for step in range(1, STEPS):  # starts lower, ends at the same timestep
        call(cached, sample(1, step), time(step))
    assert compared
    assert not any(compared[1:])


class JointDiT(ToyDiT):
    """Takes several samples of one shape as arguments of their own, and gives as many back."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor, timestep: Tensor, text: Tensor) -> Any:  # type: ignore[override]
        joined = super().forward(torch.cat([x, y, z], dim=1), timestep, text)
        return joined.chunk(3, dim=1)


def test_several_samples_of_one_shape_are_no_conditioning() -> None:
    model = make(JointDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(0, STEPS, 4))
    for step in range(STEPS):
        cached(*(sample(seed, step) for seed in range(3)), timestep=time(step), text=TEXT)
    taken = "".join(record.action[0] for record in cached.cache_report().timeline)
    assert taken == "crrrcrrr"
