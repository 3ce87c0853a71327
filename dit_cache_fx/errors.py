"""The exceptions and the warning that this package raises."""

from __future__ import annotations


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


class DitCacheWarning(UserWarning):
    """Something is not cached although caching was asked for; the text says why."""
