"""The processes that run one model together, and how they come to the same decisions.

Each holds a part of the model, of its sequence or of its data, and their blocks talk to each other.
So a step that one of them computes, all must compute. What goes by numbers that each has of its own
part is made one number here, inside the graphs too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_cache_fx import _torch
from dit_cache_fx.errors import CaptureError, OptionError
from dit_cache_fx.values.containers import attributes
from dit_cache_fx.values.wrapped import is_distributed

#: where models note how they are run in parallel, and how deep a mesh may be in there
_CONFIG, _DEPTH = "_parallel_config", 3


@dataclass(frozen=True)
class Ranks:
    """Processes, by their `groups`: what is reduced over one after another is reduced over all."""

    groups: tuple[str, ...]

    # --- as part of a graph ----------------------------------------------------------------------

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of each element over the processes."""
        return self._reduced(tensor, "sum")

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of each element over the processes."""
        return self._reduced(tensor, "max")

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """Whether each flag is set in any process."""
        return self.largest(flags.to(torch.int32)).to(torch.bool)

    def first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the first process."""
        for group in self.groups:
            tensor = _torch.broadcast(tensor, group)
        return tensor

    def _reduced(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        for group in self.groups:
            tensor = _torch.all_reduced(tensor, how, group)
        return tensor

    # --- on the host -----------------------------------------------------------------------------

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one behind the other. They are of one size."""
        for group in self.groups:
            tensor = _torch.all_gathered(tensor, group)
        return tensor

    def differ(self, tensor: torch.Tensor) -> bool:
        """Whether the processes have other values. The tensors are of one size."""
        ends = self.largest(torch.stack([tensor, -tensor]))
        return not torch.equal(ends[0], -ends[1])

    def every(self, value: bool) -> bool:
        """Whether it holds in every process."""
        return not bool(self.any(torch.tensor([not value], device="cpu")))

    def signed(self, checksum: torch.Tensor) -> torch.Tensor:
        """A checksum of what all processes have, from those of what each has."""
        return self.total(checksum * (2 * torch.distributed.get_rank() + 3))


#: what differs, where it is not in this process
ANOTHER = "in another process"


@contextmanager
def together(ranks: Ranks | None, what: str = "capture the model") -> Iterator[None]:
    """Where one process raises within it, all of them do. None of them may wait for others there.

    So none is left waiting for one that has gone. `what`: what they do, for the error.
    """
    try:
        yield
    except Exception:
        if ranks is not None:
            ranks.every(False)
        raise
    if ranks is not None and not ranks.every(True):
        raise CaptureError(
            f"another process could not {what}, and all of them must: the error of that process "
            "says why"
        )


def every(ranks: Ranks | None, value: bool) -> bool:
    """Whether it holds, in every process where there are several."""
    return value if ranks is None else ranks.every(value)


# --- which processes -----------------------------------------------------------------------------


def ranks_of(option: Any) -> Ranks | None:
    """The processes of `process_group=`. Raises `OptionError` for what is no group."""
    if option is None or isinstance(option, Ranks):
        return option
    if hasattr(option, "get_all_groups"):  # a mesh
        return _ranks(option.get_all_groups())
    if not hasattr(option, "group_name"):
        expected = "a torch.distributed process group, or a DeviceMesh"
        raise OptionError("process_group", option, expected)
    return _ranks([option])


def found(model: nn.Module | None, tensors: Iterable[torch.Tensor] = ()) -> Ranks | None:
    """The processes that a model is spread over, as far as it tells; None where it does not.

    Its weights and the tensors of a call tell by their meshes, diffusers' models by their parallel
    configuration.
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
    return _ranks(groups)


def _groups_of(tensor: torch.Tensor) -> Iterator[Any]:
    """The groups that have other parts of a tensor."""
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


def _ranks(groups: Sequence[Any]) -> Ranks | None:
    """Without groups of one process, and those whose processes another one has."""
    named = {group.group_name: frozenset(_torch.members(group)) for group in groups}
    once = {members: name for name, members in reversed([*named.items()])}
    kept = [
        name
        for members, name in reversed([*once.items()])
        if len(members) > 1 and not any(members < other for other in once)
    ]
    return Ranks(tuple(kept)) if kept else None
