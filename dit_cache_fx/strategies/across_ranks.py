"""Sums, means and norms over the processes that run one model together."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_cache_fx.ranks import Ranks


class AcrossRanks:
    """Base of `Strategy`: numbers that are equal in all processes of `process_group`."""

    process_group: Any

    @property
    def ranks(self) -> Ranks | None:
        """The processes that must decide alike; None if there is one, or none is known."""
        return self.process_group  # type: ignore[no-any-return]

    def totals(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return sums over all processes.

        Args:
            tensors (`Tensor`):
                Tensors of one shape and dtype.
        """
        if self.ranks is None:
            return tensors
        sums = self.ranks.total(torch.stack([t.double() for t in tensors]))
        return tuple(s.to(t.dtype) for s, t in zip(sums, tensors, strict=True))

    def means(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the mean of each tensor, over all of its parts if each process has one.

        A rule that uses these numbers decides on several devices as it does on one.

        Args:
            tensors (`Tensor`):
                The tensors, or this process's parts of them.
        """
        if self.ranks is None:
            return tuple(t.mean() for t in tensors)
        sums = torch.stack([t.sum(dtype=torch.float64) for t in tensors])
        counts = torch.tensor([t.numel() for t in tensors], dtype=sums.dtype, device=sums.device)
        totals, sizes = self.totals(sums, counts)
        return tuple(m.to(t.dtype) for m, t in zip(totals / sizes, tensors, strict=True))

    def norms(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the norm of each tensor in float64, over all of its parts if each process has one.

        If each process has all of a tensor (tensor parallelism), it counts once for each of them:
        compare norms with norms only.

        Args:
            tensors (`Tensor`):
                The tensors, or this process's parts of them.
        """
        wide = [t.double() for t in tensors]
        if self.ranks is None:
            return tuple(t.norm() for t in wide)
        return tuple(t.sqrt() for t in self.totals(*((t * t).sum() for t in wide)))


_S = TypeVar("_S", bound=AcrossRanks)


def spread_over(strategy: _S, ranks: Ranks | None) -> _S:
    """Return the strategy for a model run by these processes; the user's group has priority."""
    return strategy if ranks is None or strategy.ranks is not None else _with(strategy, ranks)


def without_ranks(strategy: _S) -> _S:
    """Return the strategy for values that need no other process."""
    return strategy if strategy.ranks is None else _with(strategy, None)


def _with(strategy: _S, ranks: Ranks | None) -> _S:
    other = copy.copy(strategy)
    object.__setattr__(other, "process_group", ranks)
    return other
