"""How often the host waits for the device, by what the profiler has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

#: what the CUDA runtime is called for where the host waits
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
#: what reads a value of a tensor, on whichever device that is
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero")


class Counted(NamedTuple):
    """`waits`: for the device. `reads`: of values, which wait where the tensor is on one."""

    waits: int
    reads: int


def counted(names: Iterable[str]) -> Counted:
    """By the names of a profile's events."""
    listed = list(names)
    return Counted(sum(name in WAITS for name in listed), sum(name in READS for name in listed))


def profiled(call: Callable[[], Any]) -> Counted:
    """Of one call. What the device still has to do is waited for before and after, uncounted."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    names: list[str] = []
    with profile(activities=activities) as recorded, torch.profiler.record_function("the call"):
        call()
    events = recorded.events()
    inside = next(event for event in events if event.name == "the call").time_range
    for event in events:
        if inside.start <= event.time_range.start and event.time_range.end <= inside.end:
            names.append(event.name)
    return counted(names)
