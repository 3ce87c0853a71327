"""Phase one of a capture: run the model once as it is, and note what each kept module returned.

The blocks run exactly once, outside of any tracer. Tracing (phase two) and the first computed step
then replay what was recorded, so a capture costs no second forward pass. Where forward has changed
something around its blocks that they may read, they run once more, in the graph (`rerun`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit_cache_fx.capture.ambient import Ambient, flags, refuse_flags
from dit_cache_fx.capture.attributes import Attributes
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.capture.settings import Setting, Watch
from dit_cache_fx.capture.world import World
from dit_cache_fx.ir.within import Within
from dit_cache_fx.values.digest import digest
from dit_cache_fx.values.identity import memory, version
from dit_cache_fx.values.pytree import Skeleton, flatten
from dit_cache_fx.values.random_state import RandomState
from dit_cache_fx.values.tensor_spec import TensorSpec


@dataclass
class Inside:
    """What a block did inside: the call that it got, and the calls of its parts."""

    block: nn.Module
    parts: Mapping[nn.Module, str]
    tensors: list[torch.Tensor]
    skeleton: Skeleton
    recording: Recording


@dataclass
class ModuleCall:
    """One call of a kept module."""

    name: str
    specs: list[TensorSpec]
    skeleton: Skeleton
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    mutated: tuple[int, ...] = ()  # which of its tensor arguments it changed in place
    like: tuple[int | None, ...] = ()  # for each output a tensor argument of the same shape
    inside: Inside | None = None
    rewrites: bool = False  # whether it put something else into a container among its arguments
    changed: frozenset[int] = frozenset()  # addresses of memory that it changed
    writes: frozenset[int] = frozenset()  # the same, where it did not return it
    within: Within = field(default_factory=Within)  # the contexts that it was called in
    digests: list[torch.Tensor | None] = field(default_factory=list)  # of what it returned
    random: RandomState | None = None  # what it drew its random numbers from

    def outputs(self) -> list[torch.Tensor]:
        """What it returned, as new tensor objects; placeholders where no value was kept."""
        return [
            self.values[i].detach() if i in self.values else spec.placeholder()
            for i, spec in enumerate(self.specs)
        ]


@dataclass
class Recording:
    """The calls of the kept modules in order, and what the model returned."""

    calls: list[ModuleCall]
    output: Any
    settings: tuple[Setting, ...] = ()  # what forward sets on its modules
    suspect: bool = False  # whether blocks may depend on more than their arguments
    before: Attributes = field(default_factory=dict)  # of the modules, before the recorded run
    world: World | None = None  # what blocks may read beside them, before the recorded run


def record(
    run: Callable[[], Any],
    kept: Mapping[nn.Module, str],
    blocks: Collection[nn.Module],
    always_run: Collection[nn.Module] = (),
    opened: Mapping[nn.Module, Mapping[nn.Module, str]] | None = None,
    watch: Watch | None = None,
) -> Recording:
    """Run the model and record its kept modules' calls.

    A block's output is held only when something other than a cached block reads it: holding every
    block's output would be what the cache is here to avoid. `always_run` are the blocks that are
    never cached; what they read and give is held too. `opened`: blocks -> their parts, whose calls
    are recorded as well. `watch` sees what the model sets around its modules; with it, digests of
    what blocks give are noted.
    """
    recorder = _Recorder(blocks, {b for b in blocks if b not in always_run}, opened or {}, watch)
    with intercepted(kept, recorder.handle), recorder.reader:
        output = run()
        recorder.reader.reads(flatten(output)[0])
    if watch is None:
        return Recording(recorder.calls, output)
    watch.looks()
    settings = tuple(watch.settings.values())
    return Recording(recorder.calls, output, settings, watch.suspect, world=watch.world)


class _Recorder:
    """Runs kept modules, and notes each call."""

    def __init__(
        self,
        blocks: Collection[nn.Module],
        cached: Collection[nn.Module],
        opened: Mapping[nn.Module, Mapping[nn.Module, str]],
        watch: Watch | None,
    ) -> None:
        self.calls: list[ModuleCall] = []
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
        with self.reader.paused():
            within = self._within(name)
            drawn = self._before(module, inputs)
            if module in self._opened:
                parts = self._opened[module]
                recorded = record(lambda: call(module, *args, **kwargs), parts, ())
                inside = Inside(module, parts, inputs, given, recorded)
                output = recorded.output
            else:
                output = call(module, *args, **kwargs)
            outputs, skeleton = flatten(output)
            made = ModuleCall(name, [TensorSpec.of(t) for t in outputs], skeleton)
            made.inside, made.within = inside, within
            self._after(module, made, outputs, drawn)
        made.mutated = tuple(i for i, t in enumerate(inputs) if version(t) != versions[i])
        _note_changes(made, inputs, outputs, given, (args, kwargs))
        self.reader.changed(made.changed)
        self.reader.produced(made, outputs, hold=module not in self._cached)
        self.calls.append(made)
        return output

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
        made: ModuleCall,
        outputs: list[torch.Tensor],
        drawn: RandomState | None,
    ) -> None:
        if self._watch is not None:
            self._watch.returned(module)
        if drawn is not None:
            made.random = drawn if drawn.used() else None
            made.digests = [digest(t) for t in outputs]


def _note_changes(
    made: ModuleCall,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    given: Skeleton,
    arguments: Any,
) -> None:
    """Note what the call has changed of its arguments."""
    after, form = flatten(arguments)
    made.rewrites = given != form or any(a is not b for a, b in zip(inputs, after, strict=True))
    shapes = [t.shape for t in inputs]
    made.like = tuple(shapes.index(t.shape) if t.shape in shapes else None for t in outputs)
    made.changed = frozenset(memory(inputs[i]) for i in made.mutated)
    made.writes = made.changed - {memory(t) for t in outputs} if made.changed else made.changed


class _Reader(TorchDispatchMode):
    """Watches which recorded outputs are read by the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        #: by id of a tensor that a module gave: of which call, which of its tensors
        self._origin: dict[int, tuple[ref[torch.Tensor], ModuleCall, int]] = {}
        self._held: list[tuple[torch.Tensor, ModuleCall, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = flatten((args, kwargs or {}))[0]
        if self._held and getattr(getattr(func, "_schema", None), "is_mutable", False):
            self._keep_copies({memory(t) for t in tensors})
        self.reads(tensors)
        return func(*args, **(kwargs or {}))

    def produced(self, call: ModuleCall, outputs: list[torch.Tensor], hold: bool) -> None:
        for index, tensor in enumerate(outputs):
            self._origin[id(tensor)] = (ref(tensor), call, index)
            if hold:
                call.values[index] = tensor
                self._held.append((tensor, call, index))

    def _keep_copies(self, changing: set[int]) -> None:
        """Memory is about to be changed in place: of what is held there a copy is."""
        for tensor, call, index in self._held:
            if memory(tensor) in changing and call.values.get(index) is tensor:
                call.values[index] = tensor.clone()

    def changed(self, places: Collection[int]) -> None:
        """A module has changed this memory: what was held there is not known any more."""
        for tensor, call, index in self._held:
            if memory(tensor) in places and call.values.get(index) is tensor:
                del call.values[index]

    def reads(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            origin = self._origin.get(id(tensor))
            if origin is None or origin[0]() is not tensor:  # an id may come back
                continue
            _, call, index = origin
            if index not in call.values:  # a copy: the model may change it in place afterwards
                call.values[index] = tensor.clone()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the mode off: what runs inside must not see it (compiled blocks refuse modes)."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
