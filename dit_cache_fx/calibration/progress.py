"""What a calibration says while it runs."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """A bar (of tqdm, where that is installed) that counts generations. `shown`: write anything."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def tell(self, message: str) -> None:
        """Say something, on standard error."""
        log.info("%s", message)
        if self._shown:
            print(f"dit_cache_fx: {message}", file=sys.stderr, flush=True)

    def begin(self, generations: int) -> None:
        """There will be so many generations."""
        if not self._shown:
            return
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            return
        self._bar = tqdm(total=generations, unit="generation", leave=False, disable=None)

    def advance(self, what: str = "") -> None:
        """One more generation has ended."""
        if self._bar is not None:
            self._bar.set_description(what)
            self._bar.update()

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
