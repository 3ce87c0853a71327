"""The progress report of a calibration."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """A bar that counts generations (of tqdm, if it is installed). `shown`: write anything."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def tell(self, message: str) -> None:
        """Write a message on standard error."""
        log.info("%s", message)
        if self._shown:
            print(f"dit_cache_fx: {message}", file=sys.stderr, flush=True)

    def begin(self, generations: int) -> None:
        """Announce the number of generations."""
        if not self._shown:
            return
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            return
        self._bar = tqdm(total=generations, unit="generation", leave=False, disable=None)

    def advance(self, what: str = "") -> None:
        """Count a generation that has ended."""
        if self._bar is not None:
            self._bar.set_description(what)
            self._bar.update()

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
