"""The exceptions and the warning that this package raises."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


class DitCacheError(Exception):
    """Base class of every error that this package raises."""


class OptionError(DitCacheError, ValueError):
    """An argument has a value that cannot work. The text names it and says what would be right.

    Args:
        name (`str`):
            The name of the argument.
        value (`object`):
            Its value.
        expected (`str`):
            The values that would be right, in words.

    Example:
        >>> try:
        ...     dit_cache_fx.apply(model, "deepcache", compute_ratio=2)
        ... except dit_cache_fx.OptionError as error:
        ...     print(error)
        compute_ratio=2: a share of the steps above 0 and at most 1, such as 0.5
    """

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}={value!r}: {expected}")
        self.name = name
        self.value = value
        self.expected = expected

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.expected)


class DiscoveryError(DitCacheError):
    """The block lists or the timestep argument cannot be determined from the model. Name them."""


class CaptureError(DitCacheError):
    """The model cannot be captured, or its captured graph disagrees with it."""


class VerifyError(DitCacheError):
    """A program breaks an invariant: a bug in a pass, or in a user's strategy."""


class MissingPackageError(DitCacheError, ImportError):
    """A package that only this feature needs is not installed. The text names the package."""


class DitCacheWarning(UserWarning):
    """Something is not cached although caching was requested. The text gives the reason."""


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
