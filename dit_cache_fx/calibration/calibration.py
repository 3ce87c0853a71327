"""`Calibration`: the result of `calibrate`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_cache_fx.calibration.plot import Curve, draw
from dit_cache_fx.calibration.row import Row, cells, row_from_json, row_to_json
from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies import NumSteps, Strategy
from dit_cache_fx.strategies.checks import is_number
from dit_cache_fx.strategies.model_signature import ModelSignature
from dit_cache_fx.strategies.timesteps import Timesteps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT, _VERSION = "dit_cache_fx calibration", 1


@dataclass(frozen=True)
class Calibration:
    """The plans that a calibration found, by their number of computed steps. Print it.

    Attributes:
        model (`ModelSignature`):
            The signature of the calibrated model.
        timesteps (`tuple[float, ...]`):
            The timesteps of the calibrated calls, in the unit of the model's argument.
        runs (`int`):
            The number of runs that the plans were judged on.
        rows (`tuple[Row, ...]`):
            The results, one for each number of computed steps.

    Example:
        >>> calibration.save("model.json")
        >>> calibration = dit_cache_fx.Calibration.load("model.json")
        >>> [row.computed for row in calibration.rows]
        [4, 6]
    """

    model: ModelSignature
    timesteps: tuple[float, ...]
    runs: int
    rows: tuple[Row, ...]

    def plan(
        self,
        computed: int | None = None,
        *,
        psnr: float | None = None,
        timesteps: Timesteps | None = None,
        num_steps: NumSteps | None = None,
    ) -> Strategy:
        """Return a plan for `apply(model, plan)` or `backend(strategy=plan)`.

        For another number of steps, or other timesteps, it is carried over by noise level, with one
        warning.

        Args:
            computed (`int`, *optional*):
                The number of computed steps, one of the calibrated ones.
            psnr (`float`, *optional*):
                Instead of `computed`: the PSNR in dB to reach on the calibrated runs, with as few
                computed steps as possible.
            timesteps (`Iterable[float] | Callable[[], Iterable[float]]`, *optional*):
                The option of this name of every strategy. When None, a generation that begins like
                the calibrated ones is assumed to have their timesteps.
            num_steps (`int | Callable[[], int]`, *optional*):
                The option of this name of every strategy.

        Raises:
            OptionError: There is no such plan. The text lists the plans.

        Example:
            >>> cached = dit_cache_fx.apply(model, calibration.plan(psnr=10.0))
        """
        row = self._row(computed, psnr)
        return replace(row.plan, timesteps=timesteps, num_steps=num_steps)

    def _row(self, computed: int | None, psnr: float | None) -> Row:
        if (computed is None) == (psnr is None):
            raise OptionError("computed", computed, "one of computed= and psnr=")
        if psnr is not None:
            return self._reaching(psnr)
        for row in self.rows:
            if row.computed == computed:
                return row
        known = [row.computed for row in self.rows]
        raise OptionError("computed", computed, f"a calibrated number: one of {known}")

    def _reaching(self, psnr: Any) -> Row:
        if not is_number(psnr) or math.isnan(psnr):
            raise OptionError("psnr", psnr, "a PSNR in dB, such as 45.0")
        for row in sorted(self.rows, key=lambda row: row.computed):
            if row.psnr >= psnr:
                return row
        best = max(self.rows, key=lambda row: row.psnr)
        raise OptionError(
            "psnr",
            psnr,
            f"at most {best.psnr:.1f} dB, which {best.computed} computed steps reach; calibrate "
            "with more computed steps for a higher one",
        )

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the PSNR over the number of computed steps.

        One curve for the plans, one for the presets, and one for the plain sampler, if it is known.
        Requires matplotlib.

        Args:
            path (`str | PathLike[str]`, *optional*):
                The file to write; its ending (`.png`, `.pdf`, `.svg`) selects the format. When
                None, nothing is written.

        Raises:
            MissingPackageError: Matplotlib is not installed.

        Example:
            >>> figure = calibration.plot("calibration.png")
        """
        steps = [row.computed for row in self.rows]
        plain = [row.plain for row in self.rows if row.plain is not None]
        curves = [
            Curve("calibrated plans", steps, [row.psnr for row in self.rows]),
            Curve("presets", steps, [row.preset for row in self.rows]),
        ]
        if plain:
            known = [row.computed for row in self.rows if row.plain is not None]
            curves.append(Curve("plain sampler", known, plain))
        return draw(curves, self._title, path)

    @property
    def _title(self) -> str:
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        return f"{self.model.model}, {len(self.timesteps)} steps, {runs}"

    def __str__(self) -> str:
        header = ["computed", "dB", "lowest", "preset", "plain", "plan"]
        table = [header, *(cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == len(header) - 1 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        return "\n".join([f"{self._title}; PSNR to every step computed", *lines])

    # --- as a file -----------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the calibration as JSON.

        Args:
            path (`str | PathLike[str]`):
                The file to write.

        Example:
            >>> calibration.save("model.json")
        """
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.to_json(),
            "timesteps": list(self.timesteps),
            "runs": self.runs,
            "rows": [row_to_json(row) for row in self.rows],
        }
        Path(path).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")

    @staticmethod
    def load(path: str | PathLike[str]) -> Calibration:
        """Read a calibration that `save` has written.

        Its plans are for the calibrated model: `apply` and `backend` refuse others, and name the
        differences.

        Args:
            path (`str | PathLike[str]`):
                The file to read.

        Raises:
            OptionError: The file is no calibration.

        Example:
            >>> calibration.save("model.json")
            >>> calibration = dit_cache_fx.Calibration.load("model.json")
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:  # no JSON, or no text
            raise OptionError("path", str(path), f"{_EXPECTED} ({error})") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise OptionError("path", str(path), _EXPECTED)
        if data.get("version") != _VERSION:
            told = f"version {_VERSION} of the format; this file has {data.get('version')!r}"
            raise OptionError("path", str(path), told)
        try:
            return _from_json(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise OptionError("path", str(path), f"{_EXPECTED} ({error!r})") from None


_EXPECTED = "a file that Calibration.save has written"


def _from_json(data: Mapping[str, Any]) -> Calibration:
    model = ModelSignature.from_json(data["model"])
    timesteps = tuple(float(t) for t in data["timesteps"])
    rows = tuple(row_from_json(row, timesteps, model) for row in data["rows"])
    return Calibration(model, timesteps, int(data["runs"]), rows)
