"""Whole pipelines with a cached transformer: parity, counts, one generation after another."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pipelines.blocks import counted
from tests.pipelines.families import FAMILIES, FLUX, WAN, Family, each_family, marked
from tests.pipelines.families.dit import DIT
from tests.pipelines.family import STEPS, run
from tests.pipelines.session import Session, session_of


def clearly_other(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or bool((a - b).norm() > 0.01 * a.norm())


@each_family
def test_the_pipeline_depends_on_all_that_the_tests_vary(family: Family) -> None:
    pipe = family.build()
    first = run(family, pipe, steps=2)
    assert first.isfinite().all()
    assert torch.equal(run(family, pipe, steps=2), first)
    for other in ({"prompt": 1}, {"size": 1}, {"guided": False}, {"seed": 1}, {"steps": 3}):
        if family is not DIT or "size" not in other:
            assert clearly_other(first, run(family, pipe, **{"steps": 2, **other})), other


@each_family
def test_every_step_computed_is_bitwise_the_uncached_pipeline(family: Family) -> None:
    """Pictures and not latents, with a progress bar."""
    session, written = Session(family, "taylorcache", computed=range(STEPS)), io.StringIO()
    want = session.plain(decoded=True)
    session.pipe.set_progress_bar_config(file=written, disable=False, mininterval=0)
    with session.counts() as count:
        got = session.cache(decoded=True)
    assert torch.equal(got, want)
    assert count.calls == STEPS * family.passes * session.depth
    assert session.cached.cache_report().calls_reused == 0
    assert f"{STEPS}/{STEPS}" in written.getvalue()


@each_family
def test_one_generation_after_another(family: Family) -> None:
    """Each equals the same one with its blocks reused by hand, and computes what it should."""
    session = session_of(family)
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": 1, "seed": 1},
        {"steps": 8},
        {"steps": 3, "prompt": 2},
        {"size": 1},
        {"batch": 2, "seed": 2},
        {"guided": False},
        {"guided": False, "prompt": 1},
        {},
    ]
    if family.many is not None:
        changes.insert(6, {family.many: 2})
    for place, change in enumerate(changes):
        session.check((place, change), **change)
    assert clearly_other(session.plain(), session.cache())


@each_family
def test_a_later_generation_equals_that_of_a_fresh_cache(family: Family) -> None:
    used, fresh = Session(family, "taylorcache"), Session(family, "taylorcache")
    used.cache(prompt=1, seed=1)
    used.cache(steps=3)
    with used.counts() as count:
        got = used.cache(seed=2)
    assert torch.equal(got, fresh.cache(seed=2))
    assert count.calls == used.expected_calls()
    assert not torch.equal(used.by_hand(seed=2), got)  # it is no DeepCache


@pytest.mark.parametrize("family", [FLUX, WAN], ids=lambda family: family.name)
def test_teacaches_own_rule_starts_anew_with_each_generation(family: Family) -> None:
    session = Session(family, "teacache", computed=(), rel_l1_thresh=0.7)
    first = session.cache()
    session.cache(prompt=1, steps=3)
    before = session.cached.cache_report().calls_computed
    with session.counts() as count:
        assert torch.equal(session.cache(), first)
    computed = session.cached.cache_report().calls_computed - before
    assert count.calls == computed * session.depth
    assert family.passes <= computed < STEPS * family.passes


# --- callbacks ------------------------------------------------------------------------------------

with_callback = pytest.mark.parametrize(
    "family", marked(f for f in FAMILIES if f.callback == "callback_on_step_end")
)


@with_callback
def test_a_callback_sees_and_may_change_the_latents_of_every_step(family: Family) -> None:
    session = session_of(family)
    seen: list[tuple[int, float]] = []

    def change(pipe: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Any]:
        assert pipe is session.pipe
        seen.append((step, float(timestep)))
        return {"latents": given["latents"] * 1.1}

    session.check("callback", callback_on_step_end=change)
    cached, by_hand = seen[:STEPS], seen[STEPS:]
    assert cached == by_hand
    assert [step for step, _ in cached] == list(range(STEPS))


def test_an_older_callback_sees_every_step() -> None:
    family = next(family for family in FAMILIES if family.callback == "callback")
    session = session_of(family)
    seen: list[int] = []

    def note(step: int, timestep: Tensor, latents: Tensor) -> None:
        seen.append(step)

    session.check("callback", callback=note)
    assert seen == 2 * list(range(STEPS))


def test_counting_leaves_the_model_as_it_was() -> None:
    model = FLUX.build().transformer
    with counted(model, FLUX.blocks) as count:
        assert all("forward" in vars(block) for block in model.transformer_blocks)
    assert count.calls == 0
    assert not any("forward" in vars(module) for module in model.modules())
