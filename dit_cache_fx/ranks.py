"""The processes that run one model together, and their common decisions.

Each process holds a part of the model, of its sequence or of its data, and their blocks
communicate. So if one of them computes a step, all must. Decisions based on numbers of each
process's own part use one reduced number, inside the graphs too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import torch
from torch import nn

from dit_cache_fx import _torch
from dit_cache_fx.errors import CaptureError, OptionError
from dit_cache_fx.values.containers import attributes
from dit_cache_fx.values.wrapped import is_distributed

_T = TypeVar("_T")

#: the largest number of signatures and shapes that have numbers
MAX_NUMBERS = 4096
#: the attribute with a model's parallel configuration, and the depth to search it for meshes
_CONFIG, _DEPTH = "_parallel_config", 3


@dataclass(frozen=True)
class Ranks:
    """Processes, by their `groups`: reductions over one group after another cover all processes.

    `own_calls`: each process may get data of its own, of other shapes than the others'.
    """

    groups: tuple[str, ...]
    own_calls: bool = False

    # --- as part of a graph ----------------------------------------------------------------------

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of each element over the processes."""
        return self._reduced(tensor, "sum")

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the maximum of each element over the processes."""
        return self._reduced(tensor, "max")

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """Return whether each flag is set in any process."""
        return self.largest(flags.to(torch.int32)).to(torch.bool)

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of the first process."""
        for group in self.groups:
            tensor = _torch.broadcast(tensor, group)
        return tensor

    def _reduced(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        for group in self.groups:
            tensor = _torch.all_reduced(tensor, how, group)
        return tensor

    # --- on the host -----------------------------------------------------------------------------

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the concatenated tensors of all processes, which have equal sizes."""
        for group in self.groups:
            tensor = _torch.all_gathered(tensor, group)
        return tensor

    def differ(self, tensor: torch.Tensor) -> bool:
        """Return whether the values differ between the processes. The tensors have equal sizes."""
        ends = self.largest(torch.stack([tensor, -tensor]))
        return not torch.equal(ends[0], -ends[1])

    def every(self, value: bool) -> bool:
        """Return whether the value is true in every process."""
        return not bool(self.any(torch.tensor([not value], device="cpu")))

    def of_all(self, value: _T) -> list[_T]:
        """Return the values of all processes, which are pickled, in the same order in each."""
        values = [value]
        for group in self.groups:
            values = [v for held in _torch.gathered_objects(values, group) for v in held]
        return values

    def signed(self, checksum: torch.Tensor) -> torch.Tensor:
        """Combine the checksums of all processes' parts."""
        return self.total(checksum * (2 * torch.distributed.get_rank() + 3))


@dataclass
class Numbers:
    """Numbers for what each process has of its own, so that all can tell one call from another.

    A process never gives a number twice; what is forgotten gets a new one.
    """

    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _count: Iterator[int] = field(default_factory=count)

    def everywhere(self, ranks: Ranks, values: Sequence[Hashable]) -> list[tuple[int, ...]]:
        """Return, for each value, the numbers that it has in all processes.

        They are equal in all processes, and so is whether they were seen before.
        """
        own = [self._numbers.setdefault(value, next(self._count)) for value in values]
        while len(self._numbers) > MAX_NUMBERS:
            del self._numbers[next(iter(self._numbers))]
        rows = ranks.gathered(torch.tensor(own, device="cpu")).reshape(-1, len(own)).T
        return [tuple(row) for row in rows.tolist()]


#: the difference that is reported if it is in another process
ANOTHER = "in another process"


@contextmanager
def together(ranks: Ranks | None, what: str = "capture the model") -> Iterator[None]:
    """Raise in all processes if one of them raises inside, where none may wait for others.

    Otherwise the others would wait for a process that has left. `what` they do is for the
    error.
    """
    try:
        yield
    except Exception:
        if ranks is not None:
            ranks.every(False)
        raise
    if ranks is not None and not ranks.every(True):
        raise CaptureError(
            f"another process could not {what}, and all of them must: see the error of that process"
        )


def every(ranks: Ranks | None, value: bool) -> bool:
    """Return whether the value is true, in every process if there are several."""
    return value if ranks is None else ranks.every(value)


# --- which processes -----------------------------------------------------------------------------


def ranks_of(option: Any) -> Ranks | None:
    """Return the processes of `process_group=`. Raises `OptionError` for other objects."""
    if option is None or isinstance(option, Ranks):
        return option
    if hasattr(option, "get_all_groups"):  # a mesh
        return _ranks(option.get_all_groups(), own_calls=True)
    if not hasattr(option, "group_name"):
        expected = "a torch.distributed process group, or a DeviceMesh"
        raise OptionError("process_group", option, expected)
    return _ranks([option], own_calls=True)


def found(model: nn.Module | None, tensors: Iterable[torch.Tensor] = ()) -> Ranks | None:
    """Return the processes that run a model, as far as is known; otherwise None.

    They follow from the meshes of its weights and of the tensors of a call, and from the parallel
    configuration of diffusers.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    modules = [] if model is None else list(model.modules())
    own = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    known = [t for t in (*own, *tensors) if t is not None]
    groups = [group for tensor in known for group in _groups_of(tensor)]
    for module in modules:
        for mesh in _meshes(vars(module).get(_CONFIG), _DEPTH):
            groups += mesh.get_all_groups()
    return _ranks(groups, own_calls=any(hasattr(module, "unshard") for module in modules))


def _groups_of(tensor: torch.Tensor) -> Iterator[Any]:
    """Yield the groups whose processes have other parts of a tensor."""
    if is_distributed(tensor):
        spread: Any = tensor
        for dim, placement in enumerate(spread.placements):
            if not placement.is_replicate():
                yield spread.device_mesh.get_group(dim)


def _meshes(value: Any, depth: int) -> Iterator[Any]:
    if hasattr(value, "get_all_groups"):
        yield value
    elif depth and value is not None:
        for _, child in attributes(value):
            yield from _meshes(child, depth - 1)


def _ranks(groups: Sequence[Any], own_calls: bool) -> Ranks | None:
    """Drop groups of one process, and those contained in another one."""
    named = {group.group_name: frozenset(_torch.members(group)) for group in groups}
    once = {members: name for name, members in reversed([*named.items()])}
    kept = [
        name
        for members, name in reversed([*once.items()])
        if len(members) > 1 and not any(members < other for other in once)
    ]
    return Ranks(tuple(kept), own_calls) if kept else None
