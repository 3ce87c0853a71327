"""Conditioning is known again by its values after its tensors are gone, and only then."""

from __future__ import annotations

import torch

import dit_cache_fx
from dit_cache_fx.values.identity import TensorIdentity
from tests.toys import ByHand, ToyDiT, make, toy_inputs


def test_what_was_not_remembered_is_unknown_once_it_is_gone() -> None:
    gone, there = TensorIdentity([torch.ones(2)]), torch.ones(2)
    given = TensorIdentity([there])
    assert given.other_values(gone, {0}) == gone.other_values(given, {0}) == {0}


def test_what_was_remembered_is_known_by_its_values() -> None:
    tensor, there = torch.ones(2), torch.ones(2)
    gone, later = TensorIdentity([tensor]), TensorIdentity([there])
    gone.remember()
    del tensor
    assert not later.other_values(gone, {0})
    assert TensorIdentity([there + 1]).other_values(gone, {0}) == {0}


@torch.no_grad()
def test_conditioning_that_was_the_same_object_for_some_steps_and_then_made_anew() -> None:
    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps={0})
    by_hand = ByHand(cached._model, ["blocks"])
    text = toy_inputs(0.0)["text"]
    for step in range(5):
        if step == 3:
            text = text.clone()
        given = {**toy_inputs(1000.0 - 100 * step, seed=step), "text": text}
        assert torch.equal(cached(**given), by_hand(step == 0, **given)), step
