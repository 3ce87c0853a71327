"""Save and restore the state of torch's random number generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RandomState:
    """The generator state on the CPU and on the devices of some tensors."""

    host: torch.Tensor
    devices: tuple[tuple[torch.device, torch.Tensor], ...]

    @staticmethod
    def now(tensors: Sequence[torch.Tensor]) -> RandomState:
        """Return the current state."""
        devices = {t.device for t in tensors if t.is_cuda}
        states = tuple((d, torch.cuda.get_rng_state(d)) for d in sorted(devices, key=str))
        return RandomState(torch.get_rng_state(), states)

    def used(self) -> bool:
        """Return whether random numbers have been drawn since."""
        if not torch.equal(self.host, torch.get_rng_state()):
            return True
        return any(not torch.equal(s, torch.cuda.get_rng_state(d)) for d, s in self.devices)

    def _set(self) -> None:
        torch.set_rng_state(self.host)
        for device, state in self.devices:
            torch.cuda.set_rng_state(state, device)

    def _seed(self) -> None:
        torch.default_generator.manual_seed(0)
        for device, _ in self.devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(0)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same random numbers again in this context; restore the state afterwards."""
        devices = tuple((d, torch.cuda.get_rng_state(d)) for d, _ in self.devices)
        now = RandomState(torch.get_rng_state(), devices)
        self._set()
        try:
            yield
        finally:
            now._set()


@contextmanager
def fixed_random_state(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Draw the same random numbers in every run of this context, on the CPU and the devices."""
    now = RandomState.now(tensors)
    now._seed()
    try:
        yield
    finally:
        now._set()
