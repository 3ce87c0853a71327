"""Asking a strategy's own rule: what it answers is checked, and what it cannot tell computes.

A signal of zeros, infinities or NaNs gives a measure that is no number, and a comparison with that
is false for ever. So such a step computes, and the rule's memory begins anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_cache_fx.strategies.base import Memory, Strategy
from dit_cache_fx.strategies.traced import agree, refused, unchanged
from dit_cache_fx.values.tensor_spec import TensorSpec

_MEMORY = "a tuple of tensors"


class Decision(NamedTuple):
    """What a rule has decided; the flags have no dimensions, on the signal's device.

    `doubted`: it had no number to go by; then it computes, and `memory` means nothing. `lost`: nor
    does a memory that begins with this signal.
    """

    computes: Tensor
    doubted: Tensor
    lost: Tensor
    memory: Memory


def begun(strategy: Strategy, signal: Tensor) -> Memory:
    """The rule's memory after a step with this signal. Raises `VerifyError` where it is none."""
    with unchanged(strategy, "begin", {"signal": signal}):
        memory: Any = strategy.begin(signal)
    if not isinstance(memory, (tuple, list)) or not all(isinstance(t, Tensor) for t in memory):
        raise refused(strategy, "begin", f"gave {memory!r}; right is {_MEMORY}"[:200])
    return tuple(memory)


def decided(strategy: Strategy, signal: Tensor, memory: Memory, forced: Tensor) -> Decision:
    """The rule's decision. Raises `VerifyError` where it is none."""
    given = {"signal": signal, **{f"memory[{i}]": t for i, t in enumerate(memory)}}
    with unchanged(strategy, "decide", given):
        answer: Any = strategy.decide(signal, memory, forced)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise refused(strategy, "decide", f"gave {answer!r}; right is (computes, memory)"[:200])
    computes, after = _flag(strategy, answer[0], signal), answer[1]
    agree(strategy, "decide", after, list(map(TensorSpec.of, memory)), "a memory as it was given")
    lost = lost_with(signal)
    doubted = lost | _no_number(strategy, signal, tuple(after))
    return Decision(computes | doubted, doubted, lost, tuple(after))


def lost_with(signal: Tensor) -> Tensor:
    """Whether a signal is no number: nothing can be set against it."""
    return ~_finite(signal)


def _no_number(strategy: Strategy, signal: Tensor, memory: Memory) -> Tensor:
    """Whether the measure is none, or something else that the rule will go by."""
    measured = strategy.measured(memory)
    found = torch.zeros((), dtype=torch.bool, device=signal.device)
    if measured is not None and measured.device == signal.device:
        found = found | ~_finite(measured)
    for tensor in memory:
        if tensor is not signal and tensor is not measured and _has_nans(tensor):
            found = found | tensor.sum().isnan()
    return found


def _finite(tensor: Tensor) -> Tensor:
    """Whether all of it is finite, as far as a sum tells: one that overflows is not."""
    if not _has_nans(tensor):
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.sum(dtype=torch.float32 if narrow else None).isfinite()


def _has_nans(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _flag(strategy: Strategy, computes: Any, signal: Tensor) -> Tensor:
    if isinstance(computes, bool):
        return torch.tensor(computes, device=signal.device)
    if isinstance(computes, Tensor) and computes.dtype == torch.bool and computes.numel() == 1:
        return computes.reshape([])
    what = TensorSpec.of(computes) if isinstance(computes, Tensor) else repr(computes)[:80]
    raise refused(
        strategy, "decide", f"gave {what} as its decision; right is a boolean of no dimensions"
    )
