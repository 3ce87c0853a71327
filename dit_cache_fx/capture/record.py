"""Phase one of a capture: run the model once, unchanged, and record its leaf modules' results.

The blocks run exactly once, outside of any tracer. Tracing (phase two) and the first computed step
then replay the recording, so a capture costs no second forward pass. If forward changed something
around its blocks that they may read, they run a second time, in the graph (`rerun`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_cache_fx._torch import without_dispatch_modes, without_mode
from dit_cache_fx.capture.ambient import Ambient, flags, refuse_flags
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.recording import Inside, RecordedCall, Recording
from dit_cache_fx.capture.scalar_timestep import NumberFactories
from dit_cache_fx.capture.settings import Watch
from dit_cache_fx.capture.splits import split_of
from dit_cache_fx.ir.within import Within
from dit_cache_fx.values.checksum import checksum
from dit_cache_fx.values.identity import storage_key, version
from dit_cache_fx.values.pytree import Skeleton, flatten, unflatten
from dit_cache_fx.values.random_state import RandomState
from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import Layout, settled


def record(
    run: Callable[[], Any],
    leaves: Mapping[nn.Module, str],
    blocks: Collection[nn.Module],
    always_run: Collection[nn.Module] = (),
    opened: Mapping[nn.Module, Mapping[nn.Module, str]] | None = None,
    watch: Watch | None = None,
) -> Recording:
    """Run the model, and record its leaf modules' calls.

    A block's output is held only if something other than a cached block reads it; holding every
    output would defeat the purpose of the cache. `always_run` are the blocks that are never cached;
    their inputs and outputs are held too. `opened`: blocks -> their parts, whose calls are recorded
    as well. `watch` observes the attributes that the model sets on its modules; with it, checksums
    of block outputs are recorded.
    """
    recorder = _Recorder(blocks, {b for b in blocks if b not in always_run}, opened or {}, watch)
    with intercepted(leaves, recorder.handle), recorder.reader:
        output = run()
        recorder.reader.reads(flatten(output)[0])
    if watch is None:
        return Recording(recorder.calls, output)
    watch.looks()
    settings = tuple(watch.settings.values())
    return Recording(recorder.calls, output, settings, watch.suspect, world=watch.world)


class _Recorder:
    """Runs leaf modules, and notes each call."""

    def __init__(
        self,
        blocks: Collection[nn.Module],
        cached: Collection[nn.Module],
        opened: Mapping[nn.Module, Mapping[nn.Module, str]],
        watch: Watch | None,
    ) -> None:
        self.calls: list[RecordedCall] = []
        self.reader = _Reader()
        self._blocks = blocks
        self._cached = cached
        self._opened = opened
        self._watch = watch
        self._entry, self._flags = Ambient.now(), flags()

    def handle(
        self, module: nn.Module, name: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        inputs, given = flatten((args, kwargs))
        if module not in self._cached:
            self.reader.reads(inputs)
        versions = [version(t) for t in inputs]
        inside: Inside | None = None
        with self.reader.paused(), without_mode(NumberFactories):
            within = self._within(name)
            drawn = self._before(module, inputs)
            if module in self._opened:
                parts = self._opened[module]
                recorded = record(lambda: call(module, *args, **kwargs), parts, ())
                inside = Inside(module, parts, inputs, given, recorded)
                output = recorded.output
            else:
                output = call(module, *args, **kwargs)
            given_back, skeleton = flatten(output)
            outputs = list(map(settled, given_back))
            if any(a is not b for a, b in zip(outputs, given_back, strict=True)):
                output = unflatten(skeleton, outputs)
            layouts = [Layout.of(t) for t in outputs]
            made = RecordedCall(name, [TensorSpec.of(t) for t in outputs], skeleton, layouts)
            made.inside, made.within, made.split = inside, within, split_of(module)
            self._after(module, made, outputs, drawn)
        made.mutated = tuple(i for i, t in enumerate(inputs) if version(t) != versions[i])
        _note_changes(made, inputs, outputs, given, (args, kwargs))
        self._hold(module, made, outputs)
        self.calls.append(made)
        return output

    def _hold(self, module: nn.Module, made: RecordedCall, outputs: list[torch.Tensor]) -> None:
        self.reader.changed(made.changed)
        self.reader.produced(made, outputs)
        if module not in self._blocks:
            self.reader.hold(made, outputs)
        elif module not in self._cached:  # a copy: the reader may change it in place
            made.values.update((i, t.clone()) for i, t in enumerate(outputs))

    def _within(self, name: str) -> Within:
        refuse_flags(self._flags, flags(), name)
        return Ambient.now().within(self._entry)

    def _before(self, module: nn.Module, inputs: list[torch.Tensor]) -> RandomState | None:
        if self._watch is None:
            return None
        self._watch.calls(module)
        return RandomState.now(inputs) if module in self._blocks else None

    def _after(
        self,
        module: nn.Module,
        made: RecordedCall,
        outputs: list[torch.Tensor],
        drawn: RandomState | None,
    ) -> None:
        if self._watch is not None:
            self._watch.returned(module)
        if drawn is not None:
            made.random = drawn if drawn.used() else None
            with without_dispatch_modes():
                made.digests = [checksum(t) for t in outputs]


def _note_changes(
    made: RecordedCall,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    given: Skeleton,
    arguments: Any,
) -> None:
    """Note the arguments that the call changed."""
    after, form = flatten(arguments)
    made.rewrites = given != form or any(a is not b for a, b in zip(inputs, after, strict=True))
    shapes = [t.shape for t in inputs]
    made.like = tuple(shapes.index(t.shape) if t.shape in shapes else None for t in outputs)
    made.changed = frozenset(storage_key(inputs[i]) for i in made.mutated)
    made.writes = made.changed - {storage_key(t) for t in outputs} if made.changed else made.changed


class _Reader(TorchDispatchMode):
    """Watches which recorded outputs the model's own code reads."""

    def __init__(self) -> None:
        super().__init__()
        #: by id of an output tensor: its call, and its index there
        self._origin: dict[int, tuple[ref[torch.Tensor], RecordedCall, int]] = {}
        #: outputs that are held without a copy, by their memory
        self._held: dict[int, list[tuple[RecordedCall, int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = flatten((args, kwargs or {}))[0]
        self.reads(tensors)
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            self._set_apart(tensors)
        return func(*args, **(kwargs or {}))

    def produced(self, call: RecordedCall, outputs: list[torch.Tensor]) -> None:
        for index, tensor in enumerate(outputs):
            self._origin[id(tensor)] = (ref(tensor), call, index)

    def hold(self, call: RecordedCall, outputs: list[torch.Tensor]) -> None:
        """Hold outputs themselves, until the model's own code changes them in place."""
        for index, tensor in enumerate(outputs):
            call.values[index] = tensor
            self._held.setdefault(storage_key(tensor), []).append((call, index))

    def _set_apart(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors if self._held else ():
            for call, index in self._held.pop(storage_key(tensor), ()):
                call.values[index] = call.values[index].clone()

    def changed(self, places: Collection[int]) -> None:
        """A module has changed this memory: forget the outputs that were held there."""
        for place in places:
            for call, index in self._held.pop(place, ()):
                del call.values[index]

    def reads(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            origin = self._origin.get(id(tensor))
            if origin is None or origin[0]() is not tensor:  # ids are reused
                continue
            _, call, index = origin
            if index not in call.values:  # a copy: the model may change it in place afterwards
                call.values[index] = tensor.clone()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Disable the mode: code inside must not see it (compiled blocks refuse modes)."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
