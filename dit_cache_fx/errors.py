"""The exceptions and the warning that this package raises."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


class DitCacheError(Exception):
    """Base of every error of this package."""


class OptionError(DitCacheError, ValueError):
    """An argument has a value that cannot work; the text names it and what would be right."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}={value!r}: {expected}")
        self.name = name
        self.value = value
        self.expected = expected

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.expected)


class DiscoveryError(DitCacheError):
    """The block lists or the timestep argument cannot be told from the model."""


class CaptureError(DitCacheError):
    """The model cannot be captured, or its captured graph disagrees with it."""


class VerifyError(DitCacheError):
    """A pass left a program that breaks an invariant (a bug in a pass or in a strategy)."""


class MissingPackageError(DitCacheError, ImportError):
    """Something that is only needed for this one thing is not installed; the text says what."""


class DitCacheWarning(UserWarning):
    """Something is not cached although caching was asked for; the text says why."""


_PLUMBING = (str(Path(__file__).parent), "torch", "contextlib")


def warn(message: str) -> None:
    """Warn at the line that called into this package."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _is_plumbing(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DitCacheWarning, stacklevel=level)


def _is_plumbing(filename: str) -> bool:
    path = Path(filename)
    return filename.startswith(_PLUMBING[0]) or "torch" in path.parts or path.stem == "contextlib"
