"""Each row of a batch gets what it gets alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import (
    DeepCache,
    EasyCache,
    Exponential,
    FirstBlockCache,
    FoCa,
    HiCache,
    MagCache,
    NewtonCache,
    Strategy,
    TaylorCache,
    TeaCache,
)
from tests.runtime.batch.serving import Serving, joined, near, row_of
from tests.toys import JoinedDiT, NestedDiT, ToyDiT, UShapeDiT, make, runs_of, toy_inputs
from tests.zoo.case import Case
from tests.zoo.diffusers_models import CASES
from tests.zoo.representatives import marks_of

STEPS = {0, 2, 3}


def compiled_steps(cached: Any) -> Any:
    cached.compile_steps(backend="eager")
    return cached


MODES = {
    "eager": lambda cached: cached,
    "compile_steps": compiled_steps,
    "compiled": partial(torch.compile, backend="eager"),
    "fullgraph": partial(torch.compile, backend="eager", fullgraph=True),
}
SCHEDULED: list[Strategy] = [
    DeepCache(no_cache_steps=STEPS),
    TeaCache(no_cache_steps=STEPS),
    TaylorCache(no_cache_steps=STEPS, corrector=0.5),
    TaylorCache(no_cache_steps=STEPS, low_freqs_order=1, high_freqs_order=0),
    HiCache(no_cache_steps=STEPS),
    FoCa(no_cache_steps=STEPS),
    NewtonCache(no_cache_steps=STEPS),
    Exponential(no_cache_steps=STEPS),
    MagCache(mag_ratios=[1.0] * 6, threshold=0.5, max_skip_steps=1),
]
RULES: list[Strategy] = [
    TeaCache(rel_l1_thresh=0.3),
    TeaCache(rel_l1_thresh=1.0, signal="conditioning"),
    FirstBlockCache(threshold=0.3),
    EasyCache(threshold=1.0, warmup_steps=1),
]


@pytest.mark.parametrize("strategy", SCHEDULED, ids=lambda s: s.name)
def test_by_schedule(strategy: Strategy) -> None:
    serving = Serving(make(ToyDiT), strategy)
    serving.staggered(ticks=9)
    assert serving.same_counts() == (12, 12)


@pytest.mark.parametrize("strategy", RULES, ids=lambda s: s.name)
def test_a_rule_is_asked_for_each_row(strategy: Strategy) -> None:
    serving = Serving(make(ToyDiT), strategy, smooth=True, requests=3, steps=16)
    serving.staggered(ticks=18)
    computed, reused = serving.same_counts()
    assert computed > 4
    assert reused > 0


def test_what_is_measured_is_each_rows_own() -> None:
    strategy = TaylorCache(tolerance=0.01, max_order=1)
    serving = Serving(make(ToyDiT), strategy, smooth=True, requests=3, steps=16)
    serving.staggered(ticks=18)
    computed, reused = serving.same_counts()
    assert computed > 4
    assert reused > 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "strategy", [SCHEDULED[2], RULES[0]], ids=["taylorcache", "teacache's rule"]
)
def test_in_every_mode(mode: str, strategy: Strategy) -> None:
    serving = Serving(make(ToyDiT), strategy, ready=MODES[mode], smooth=True)
    serving.staggered(ticks=9)
    assert min(serving.same_counts()) > 0


@pytest.mark.parametrize("kind", [JoinedDiT, UShapeDiT])
def test_models_of_other_forms(kind: type) -> None:
    serving = Serving(make(kind), TaylorCache(no_cache_steps=STEPS))
    serving.staggered(ticks=9)
    assert serving.same_counts() == (12, 12)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=marks_of(c.name))
        for c in CASES
        if c.name.startswith(("Flux", "DiT", "QwenImage", "HunyuanVideo15"))
    ],
)
def test_diffusers_models(case: Case) -> None:
    """Flux has ids without rows, QwenImage lists with rows, HunyuanVideo15 masks and guards."""
    strategy = TaylorCache(no_cache_steps={0, 1}, max_order=1)
    serving = Serving(case.build(), strategy, case=case, requests=3, steps=3)
    serving.staggered(ticks=5)
    assert serving.same_counts() == (6, 3)


class LoopDiT(ToyDiT):
    """Goes through the rows one by one in front of its blocks: more nodes for more rows."""

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        time = self.time(timestep)
        rows = [time[i] + self.text_in(text[i]).mean(dim=0) for i in range(len(text))]
        return torch.stack(rows)

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        gate = c.sigmoid() * 2  # what the rule's graph carries has no name of its own either
        return super().trunk(torch.stack([row * 2 for row in h]), c) * gate[:, None]


@pytest.mark.parametrize("strategy", [SCHEDULED[2], RULES[0], RULES[3]], ids=lambda s: s.name)
def test_a_loop_over_rows_in_the_model(strategy: Strategy) -> None:
    """Its nodes have other names for another number of rows."""
    serving = Serving(make(LoopDiT), strategy, smooth=True, requests=5, steps=8)
    serving.staggered(ticks=12)
    computed, reused = serving.same_counts()
    assert computed > 5
    assert reused > 0


# --- what runs -------------------------------------------------------------------------------


def test_rows_that_compute_are_one_batch_and_the_others_run_no_block() -> None:
    model = make(ToyDiT)
    serving = Serving(model, DeepCache(no_cache_steps={0, 2, 4}), requests=8)
    seen: list[int] = []  # by a hook that is there from the first step on: a new one tells a branch
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    serving.step(0, 1, 2, 3)  # these are at step 1 now
    each = [serving.inputs(request) for request in range(8)]
    seen.clear()
    with serving.cached.batch(serving.sessions):  # four compute their first step, four reuse
        serving.cached(**joined(each))
    hook.remove()
    assert seen[-1] == 4
    assert 8 not in seen[1:]  # the first one is the check of the call
    newest = [serving.actions(request)[-1] for request in range(8)]
    assert newest == ["reused"] * 4 + ["computed"] * 4


def test_no_block_runs_where_all_rows_reuse() -> None:
    model = make(ToyDiT)
    serving = Serving(model, DeepCache(no_cache_steps={0}))
    with runs_of(model.blocks) as runs:
        serving.step(0, 1, 2, 3)
        before = list(runs)
        each = [serving.inputs(request) for request in range(4)]
        with serving.cached.batch(serving.sessions):
            serving.cached(**joined(each))
        assert runs == before


def test_a_session_holds_its_row_alone() -> None:
    serving = Serving(make(ToyDiT), TaylorCache(no_cache_steps=STEPS), requests=3)
    serving.step(0, 1, 2)
    for session, alone in zip(serving.sessions, serving.own, strict=True):
        (held, *_) = session.branches[0].cached
        assert session.bytes_held == alone.bytes_held
        assert held.tensor.untyped_storage().nbytes() == held.nbytes


# --- requests come and go ----------------------------------------------------------------------


def test_requests_join_and_leave_in_any_order() -> None:
    serving = Serving(make(ToyDiT), DeepCache(no_cache_steps=STEPS), requests=5)
    for requests in [(0,), (1, 0), (2, 0, 1), (1, 2), (3, 2, 1, 0), (4, 3), (0, 3, 4), (4, 0, 2)]:
        serving.step(*requests)
    assert min(serving.same_counts()) > 5


def test_a_request_goes_on_alone_and_comes_back() -> None:
    serving = Serving(make(ToyDiT), TaylorCache(no_cache_steps=STEPS), requests=2)
    serving.step(0, 1)
    for request in (0, 1):
        inputs = serving.inputs(request)
        with serving.sessions[request]:
            got = serving.cached(**inputs)
        with serving.own[request]:
            assert near(got, serving.alone(**inputs))
        serving.at[request] += 1
    for _ in range(4):
        serving.step(1, 0)
    assert serving.same_counts() == (6, 6)


def test_three_generations_of_one_session() -> None:
    serving = Serving(make(ToyDiT), TaylorCache(no_cache_steps=STEPS), requests=3)
    serving.step(0)
    serving.step(0, 1)
    for _ in range(16):
        serving.step(2, 0, 1)
    assert serving.same_counts() == (27, 24)


def test_branches_of_guidance_are_a_call_each_in_a_context() -> None:
    serving = Serving(make(ToyDiT), DeepCache(no_cache_steps=STEPS), requests=3)
    for requests in [(0,), (0, 1), (0, 1, 2), (1, 2), (2, 0, 1), (1, 0, 2)]:
        serving.tick(*requests, context="cond")
        serving.step(*requests, context="uncond")
    assert min(serving.same_counts()) > 5
    contexts = {branch.context for branch in serving.sessions[0].branches}
    assert contexts == {("cond",), ("uncond",)}


def test_the_step_of_a_session_is_set_in_it() -> None:
    """The timesteps of both rows go on by one; the steps are what each session says."""
    serving = Serving(make(ToyDiT), DeepCache(no_cache_steps={0, 4}), requests=2)
    for steps in ((0, 0), (1, 4), (2, 5)):
        for cached, sessions in ((serving.cached, serving.sessions), (serving.alone, serving.own)):
            for session, step in zip(sessions, steps, strict=True):
                with session:
                    cached.cur_timestep = step
        serving.step(0, 1)
        assert [session.newest.position.index for session in serving.sessions] == [*steps]  # type: ignore[union-attr]
    actions = [serving.actions(request) for request in range(2)]
    assert actions == [["computed", "reused", "reused"], ["computed", "computed", "reused"]]


# --- forms of a call -------------------------------------------------------------------------


def test_a_timestep_for_all_rows() -> None:
    serving = Serving(make(ToyDiT), DeepCache(no_cache_steps={0}), requests=3)
    for step, (seed, timestep) in enumerate([(0, 1000.0), (1, 900.0)]):
        each = [toy_inputs(timestep, seed=10 * r + seed, prompt=r) for r in range(3)]
        call = joined(each) | {"timestep": torch.tensor([timestep])}
        with serving.cached.batch(serving.sessions):
            got = serving.cached(**call)
        for row, inputs in enumerate(each):
            with serving.own[row]:
                assert near(row_of(got, row), serving.alone(**inputs).flatten()), step
    assert serving.same_counts() == (3, 3)


def test_arguments_by_position_and_in_containers() -> None:
    model = make(NestedDiT)
    cached, alone = (dit_cache_fx.apply(model, "deepcache", no_cache_steps={0}) for _ in range(2))
    sessions, own = ([c.new_session() for _ in range(3)] for c in (cached, alone))

    def call(request: int, timestep: float) -> tuple[Any, ...]:
        inputs = toy_inputs(timestep, seed=request, prompt=request)
        affine = [torch.full([1, 1, 1], 1.0 + request), torch.full([1, 8], 0.1 * request)]
        return inputs["x"], inputs["timestep"], {"texts": (inputs["text"],), "affine": affine}

    for timestep in (1000.0, 900.0):
        x, t, conditions = zip(*(call(r, timestep) for r in range(3)), strict=True)
        given = {
            "texts": (torch.cat([c["texts"][0] for c in conditions]),),
            "affine": [torch.cat([c["affine"][i] for c in conditions]) for i in range(2)],
        }
        with cached.batch(sessions):
            got = cached(torch.cat(x), torch.cat(t), given)
        for row in range(3):
            with own[row]:
                assert near(row_of(got, row), alone(*call(row, timestep)).flatten())
    assert cached.cache_report().calls_reused == 3


@dataclass
class Output:
    sample: Tensor
    norm: Tensor


class RichDiT(ToyDiT):
    """Gives what it is told to give."""

    kind = "tuple"

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        out = super().forward(x, timestep, text)
        norm = out.square().mean(dim=(1, 2))
        given = {"tuple": (out, norm), "dict": {"sample": out, "norm": norm}}
        return Output(out, norm) if self.kind == "dataclass" else given[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_outputs_of_every_kind(kind: str) -> None:
    model = make(RichDiT)
    model.kind = kind
    serving = Serving(model, DeepCache(no_cache_steps=STEPS), requests=3)
    cached, alone = serving.cached, serving.alone
    for _ in range(2):
        each = [serving.inputs(request) for request in range(3)]
        with cached.batch(serving.sessions):
            got = cached(**joined(each))
        for row, inputs in enumerate(each):
            with serving.own[row]:
                want = alone(**inputs)
            assert type(got) is type(want)
            parts = [(vars(o) if kind == "dataclass" else o) for o in (got, want)]
            keys = range(2) if kind == "tuple" else ("sample", "norm")
            for key in keys:
                assert near(parts[0][key][row], parts[1][key][0])
        serving.at = [at + 1 for at in serving.at]


def test_in_inference_mode_and_bfloat16() -> None:
    model = make(ToyDiT).to(torch.bfloat16)
    cached, alone = (
        dit_cache_fx.apply(model, "taylorcache", no_cache_steps=STEPS) for _ in range(2)
    )
    sessions, own = ([c.new_session() for _ in range(3)] for c in (cached, alone))
    with torch.inference_mode():
        for timestep in (1000.0, 900.0, 800.0, 700.0, 600.0):
            each = [toy_inputs(timestep, seed=r, prompt=r, dtype=torch.bfloat16) for r in range(3)]
            with cached.batch(sessions):
                got = cached(**joined(each))
            for row in range(3):
                with own[row]:
                    want = alone(**each[row])
                assert (got[row] - want[0]).abs().max() <= 0.02 * want.abs().max()
    assert cached.cache_report().calls_reused == alone.cache_report().calls_reused > 0


# --- beside a cache ------------------------------------------------------------------------------


def test_disabled_it_is_the_model() -> None:
    model = make(ToyDiT)
    serving = Serving(model, DeepCache(no_cache_steps={0}))
    serving.step(0, 1, 2, 3)
    serving.cached.disable()
    call = joined([serving.inputs(request) for request in range(4)])
    with serving.cached.batch(serving.sessions):
        assert torch.equal(serving.cached(**call), model(**call))


def test_uncached_calls_count_as_steps_of_each_row() -> None:
    serving = Serving(make(ToyDiT).requires_grad_(True), DeepCache(no_cache_steps={0, 2}))
    serving.step(0, 1, 2, 3)
    call = joined([serving.inputs(request) for request in range(4)])
    with (
        serving.cached.batch(serving.sessions),
        torch.enable_grad(),
        pytest.warns(dit_cache_fx.DitCacheWarning, match="gradients"),
    ):
        serving.cached(**call)
    assert [session.newest.position.index for session in serving.sessions] == [1] * 4  # type: ignore[union-attr]


def test_what_changes_in_the_model_is_in_the_next_computed_rows() -> None:
    model = make(ToyDiT)
    serving = Serving(model, DeepCache(no_cache_steps={0, 1}))
    serving.step(0, 1, 2, 3)
    model.gain = 2.0
    serving.step(0, 1, 2, 3)
    call = joined([serving.inputs(request) for request in range(4)])
    assert serving.same_counts() == (8, 0)
    assert model.gain == 2.0
    assert near(model(**call), 2 * model(**call) / model.gain)


def test_a_call_that_raises_leaves_nothing() -> None:
    model = make(ToyDiT)
    serving = Serving(model, TaylorCache(no_cache_steps=STEPS))
    serving.step(0, 1, 2, 3)
    serving.step(0, 1)
    counts = serving.cached.cache_report().calls_computed
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    call = joined([serving.inputs(request) for request in range(4)])
    with serving.cached.batch(serving.sessions), pytest.raises(ZeroDivisionError):
        serving.cached(**call)  # two rows compute, two reuse
    hook.remove()
    assert serving.cached.cache_report().calls_computed == counts
    for _ in range(3):
        serving.step(3, 2, 1, 0)
    assert min(serving.same_counts()) > 3


# --- threads -----------------------------------------------------------------------------------


def test_threads_with_batches_of_their_own() -> None:
    serving = Serving(make(ToyDiT), TaylorCache(no_cache_steps=STEPS), requests=6)
    failures: list[BaseException] = []

    def serve(*requests: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(6):
                    serving.step(*requests)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(2 * n, 2 * n + 1)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert serving.same_counts() == (18, 18)


def test_batches_with_the_same_sessions_in_another_order_do_not_wait_for_each_other() -> None:
    serving = Serving(make(ToyDiT), DeepCache(no_cache_steps={0}), requests=2)
    serving.step(0, 1)
    call = joined([serving.inputs(request) for request in range(2)])

    def serve(order: int) -> None:
        with torch.no_grad(), serving.cached.batch(serving.sessions[::order]):
            for _ in range(20):
                serving.cached(**call)

    threads = [threading.Thread(target=serve, args=(order,), daemon=True) for order in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
