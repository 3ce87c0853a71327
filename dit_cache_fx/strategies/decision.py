"""Call a strategy's rule and check its results; a step without a valid measure computes.

A signal of zeros, infinities or NaNs gives a measure that is not finite, and comparisons with it
stay false for ever. So such a step computes, and the rule's state starts again, unless the rule
handles this itself (`Strategy.bears_nans`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_cache_fx.ranks import Ranks
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.signals import value_of
from dit_cache_fx.strategies.traced import agree, refused, unchanged
from dit_cache_fx.values.tensor_spec import TensorSpec

_STATE = "a tuple of tensors"


class Decision(NamedTuple):
    """The decision of a rule; the flags have no dimensions, on the signal's device.

    `doubted`: it had no valid number; then it computes, and `state` is not valid. `lost`: a state
    that begins with this signal is not valid either.
    """

    computes: Tensor
    doubted: Tensor
    lost: Tensor
    state: RuleState


def begun(strategy: Strategy, signal: Any) -> RuleState:
    """Return the rule's state after a step with this signal. Raises `VerifyError` if it is none."""
    with unchanged(strategy, "init_state", _named("signal", signal)):
        state: Any = strategy.init_state(signal)
    if not isinstance(state, (tuple, list)) or not all(isinstance(t, Tensor) for t in state):
        raise refused(strategy, "init_state", f"gave {state!r}; expected {_STATE}"[:200])
    return tuple(state)


def decided(strategy: Strategy, signal: Any, state: RuleState, forced: Tensor) -> Decision:
    """Return the rule's decision. Raises `VerifyError` if it is none.

    Processes that run one model together compute if any of them does. A rule that reads no value of
    the model has the same numbers in each.
    """
    own, ranks = _decided(strategy, signal, state, forced), _asked_apart(strategy)
    if ranks is None:
        return own
    computes, doubted, lost = ranks.any(torch.stack(own[:3])).unbind()
    other = _decided(strategy, signal, state, forced | computes)
    same = computes == own.computes
    after = [torch.where(same, a, b) for a, b in zip(own.state, other.state, strict=True)]
    return Decision(computes, doubted, lost, tuple(after))


def lost_in_any(strategy: Strategy, signal: Any) -> bool:
    """Return whether a signal is not finite, in any of the processes."""
    lost, ranks = lost_with(strategy, signal), _asked_apart(strategy)
    return bool(lost if ranks is None else ranks.any(lost))


def _asked_apart(strategy: Strategy) -> Ranks | None:
    """Return the processes whose rules may differ: each reads its own part of a value."""
    return None if value_of(strategy) is None else strategy.ranks


def _decided(strategy: Strategy, signal: Any, state: RuleState, forced: Tensor) -> Decision:
    given = {**_named("signal", signal), **_named("state", state)}
    with unchanged(strategy, "should_compute", given):
        answer: Any = strategy.should_compute(signal, state, forced)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        what = f"gave {answer!r}; expected (computes, state)"[:200]
        raise refused(strategy, "should_compute", what)
    computes, after = _flag(strategy, answer[0], device_of(signal)), answer[1]
    right = list(map(TensorSpec.of, state))
    agree(strategy, "should_compute", after, right, "a state like the one it was called with")
    lost = lost_with(strategy, signal)
    doubted = lost | _no_number(strategy, signal, tuple(after))
    return Decision(computes | doubted, doubted, lost, tuple(after))


def lost_with(strategy: Strategy, signal: Any) -> Tensor:
    """Return whether a signal is not finite: nothing can be compared with it."""
    device = device_of(signal)
    tensors = [] if strategy.bears_nans else [t for t in _tensors(signal) if _has_nans(t)]
    if not tensors:
        return torch.zeros((), dtype=torch.bool, device=device)
    return reduce(torch.bitwise_or, [(~_finite(t)).to(device) for t in tensors])


def device_of(signal: Any) -> torch.device:
    """Return the device of a rule: that of its signal, if not all of that is on the CPU."""
    devices = [tensor.device for tensor in _tensors(signal)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _no_number(strategy: Strategy, signal: Any, state: RuleState) -> Tensor:
    """Return whether the measure, or another number that the rule uses, is not finite."""
    device = device_of(signal)
    found = torch.zeros((), dtype=torch.bool, device=device)
    if strategy.bears_nans:
        return found
    compared = strategy.metric(state)
    if compared is not None and compared.device == device:
        found = found | ~_finite(compared)
    looked_at = {id(tensor) for tensor in _tensors(signal)}
    for tensor in state:
        if tensor is not compared and id(tensor) not in looked_at and _has_nans(tensor):
            found = found | tensor.sum().isnan().to(device)
    return found


def _tensors(signal: Any) -> list[Tensor]:
    """Return the tensors of a signal: clock, values of the model, and measurements, if any."""
    items = signal if isinstance(signal, tuple) else (signal,)
    return [item for item in items if isinstance(item, Tensor)]


def _named(name: str, tensors: Any) -> Mapping[str, Tensor]:
    if isinstance(tensors, Tensor):
        return {name: tensors}
    items = tensors if isinstance(tensors, tuple) else ()
    return {f"{name}[{i}]": t for i, t in enumerate(items) if isinstance(t, Tensor)}


def _finite(tensor: Tensor) -> Tensor:
    """Return whether all of it is finite, as far as a sum shows: one that overflows is not."""
    if not _has_nans(tensor):
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.sum(dtype=torch.float32 if narrow else None).isfinite()


def _has_nans(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _flag(strategy: Strategy, computes: Any, device: torch.device) -> Tensor:
    if isinstance(computes, bool):
        return torch.tensor(computes, device=device)
    if isinstance(computes, Tensor) and computes.dtype == torch.bool and computes.numel() == 1:
        return computes.reshape([]).to(device)
    what = TensorSpec.of(computes) if isinstance(computes, Tensor) else repr(computes)[:80]
    right = "expected a boolean of no dimensions"
    raise refused(strategy, "should_compute", f"gave {what} as its decision; {right}")
