"""Detect side effects of the model's own code: attributes, and changes of its arguments.

A graph has no side effects. If a call leaves something that the next one reads, answers depend on
earlier calls: that is refused. Side effects that only other code reads are dropped with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dit_cache_fx.capture.attributes import Attributes, Change, attributes, changes, restore
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.recording import RecordedCall, Recording
from dit_cache_fx.capture.settings import Watch, refuse_other_values
from dit_cache_fx.errors import CaptureError
from dit_cache_fx.values.identity import storage_key, version
from dit_cache_fx.values.pytree import Container, Skeleton, flatten, key_paths, unflatten

_APART = (
    "a cached call could not do the same. Turn off the option that causes it, or let the model "
    "return the value instead; or make such calls between disable() and enable()"
)


@contextmanager
def unnoticed(model: nn.Module, then: Attributes | None = None) -> Iterator[None]:
    """Restore the model's attributes after running it in this context.

    `then`: their values before.
    """
    now = attributes(model.named_modules())
    try:
        if then is not None:
            restore(model.named_modules(), then)
        yield
    finally:
        restore(model.named_modules(), now)


# --- arguments -----------------------------------------------------------------------------------


class Arguments:
    """The named arguments of a call, as they are before it."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self._before = {name: _look(value) for name, value in given.items()}

    def noted(self) -> bool:
        """Return whether forward put items into dicts among them, as notes to its blocks."""
        return any(before[2] != _look(self.given[n])[2] for n, before in self._before.items())

    def refuse_changed(self, made: Sequence[RecordedCall], notes: bool) -> None:
        """Refuse a forward that has changed its arguments; its modules (`made`) may change them.

        `notes`: dicts may have new items that contain no tensor.
        """
        theirs = {place for call in made for place in call.changed}
        for name, (tensors, versions, skeleton) in self._before.items():
            after, versions_after, skeleton_after = _look(self.given[name])
            same = skeleton == skeleton_after or (notes and _notes_only(skeleton, skeleton_after))
            if not same or any(a is not b for a, b in zip(tensors, after, strict=True)):
                raise CaptureError(
                    f"the model's forward changes its argument {name!r} (a "
                    f"{type(self.given[name]).__name__}): it puts a value into it, takes one out, "
                    f"or counts there; {_APART}"
                )
            for tensor, was, now in zip(tensors, versions, versions_after, strict=True):
                if was != now and storage_key(tensor) not in theirs:
                    raise CaptureError(
                        f"the model's forward changes its argument {name!r} in place: {_APART}"
                    )


def _notes_only(before: Skeleton, after: Skeleton) -> bool:
    """Return whether the only changes are new items of dicts without tensors."""
    if before == after:
        return True
    if not isinstance(before, Container) or not isinstance(after, Container):
        return False
    if before.kind is not after.kind or not issubclass(before.kind, dict):
        return False
    was, now = (dict(zip(c.keys, c.children, strict=True)) for c in (before, after))
    same = all(key in now and _notes_only(child, now[key]) for key, child in was.items())
    return same and not any(key_paths(now[key]) for key in now.keys() - was.keys())


def _look(value: Any) -> tuple[list[torch.Tensor], list[int], Skeleton]:
    tensors, skeleton = flatten(value)
    return tensors, [version(t) for t in tensors], skeleton


# --- attributes ----------------------------------------------------------------------------------


def refuse_state(
    model: nn.Module,
    run: Callable[[], Any],
    leaves: Mapping[nn.Module, str],
    recording: Recording,
    left: Sequence[Change],
    noted: bool = False,
) -> list[str]:
    """Run the model's own code again if it had side effects, and refuse those that it reads.

    `left`: the attributes that the recorded run has changed; `noted`: it changed arguments. Returns
    the attributes that each run sets and never reads, in words.
    """
    for change in left:
        if change.in_place:
            raise CaptureError(f"the model's forward changes {change} in place: {_APART}")
    if not left and not recording.settings and not noted:
        return []
    before = attributes(model.named_modules())
    read: set[tuple[nn.Module, str]] = set()
    with unnoticed(model):
        with _observed({(c.owner.module, c.attribute) for c in left}, read):
            went_on = _rerun(run, leaves, recording)
        again = changes(before, attributes(model.named_modules()))
    inside = {m for module in leaves for m in module.modules()}
    for change in again if went_on else left:
        module = change.owner.module
        if change.in_place or module in inside or (module, change.attribute) in read:
            raise CaptureError(
                f"the model's forward sets {change} and reads it in the next call, so the result "
                f"of a call depends on the calls before it: {_APART}"
            )
    if not went_on and left:
        raise CaptureError(
            f"the model's forward sets {left[0]}, and behaves differently when it runs again: "
            f"{_APART}"
        )
    return sorted({str(change) for change in again})


def _rerun(run: Callable[[], Any], leaves: Mapping[nn.Module, str], recording: Recording) -> bool:
    """Run the model's own code on recorded results; return whether it makes the same calls."""
    calls: Iterator[RecordedCall] = iter(recording.calls)

    def handle(
        module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        made = next(calls, None)
        if made is None or made.name != name:
            raise _AnotherWay
        refuse_other_values(recording.settings, name)
        return unflatten(made.skeleton, [t.clone() for t in made.outputs()])

    with intercepted(leaves, handle):
        try:
            run()
        except _AnotherWay:
            return False
    return next(calls, None) is None


class _AnotherWay(Exception):
    """The model calls other modules than before."""


@contextmanager
def _observed(
    wanted: set[tuple[nn.Module, str]], read: set[tuple[nn.Module, str]]
) -> Iterator[None]:
    """Collect in `read` the attributes that are read before they are set."""
    kinds = {module: type(module) for module, _ in wanted}
    try:
        for module, kind in kinds.items():
            names = {name for m, name in wanted if m is module}
            _become(module, _observing(kind, module, names, read))
        yield
    finally:
        for module, kind in kinds.items():
            _become(module, kind)


def _become(module: nn.Module, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)


def _observing(
    kind: type, module: nn.Module, names: set[str], read: set[tuple[nn.Module, str]]
) -> type:
    """Return a subclass of `kind` that notes reads of attributes of `module`."""
    unset = set(names)
    original: Any = kind

    def get(self: Any, name: str) -> Any:
        if name in unset and self is module:
            read.add((module, name))
        return original.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        if self is module:
            unset.discard(name)
        original.__setattr__(self, name, value)

    own = {"__getattribute__": get, "__setattr__": put, "__module__": kind.__module__}
    return type(kind)(kind.__name__, (kind,), own)


def left_behind(before: Attributes, now: Attributes, watch: Watch) -> list[Change]:
    """Return the changes by the model's own code, without those by its modules in their calls."""
    since = {change.place for change in changes(watch.known, now)}
    return [
        change
        for change in changes(before, now)
        if change.place[0] not in watch.known or change.place in since
    ]
