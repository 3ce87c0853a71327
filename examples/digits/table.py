"""The demo's table: one row a system."""

from dataclasses import dataclass

from torch import Tensor

from examples.digits.classifier import DigitClassifier
from examples.digits.running import Run

PIXEL_RANGE = 2.0  # pixels are in [-1, 1]


def psnr(pictures: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of two equally shaped tensors."""
    error = (pictures.double() - target.double()).square().mean()
    return float(10 * (PIXEL_RANGE**2 / error).log10())


@dataclass(frozen=True)
class Row:
    """A measured system; the fields are the table's columns."""

    name: str
    computed: int
    seconds: float
    speedup: float
    cache_bytes: int
    psnr_uncached: float
    psnr_reference: float
    accuracy: float


class Judge:
    """Turns runs into rows by comparing them with the uncached and the reference run."""

    def __init__(self, uncached: Run, reference: Run, labels: Tensor) -> None:
        self.uncached = uncached
        self.reference = reference
        self.labels = labels
        self.classifier = DigitClassifier()

    def row(self, run: Run) -> Row:
        return Row(
            name=run.system.name,
            computed=run.computed,
            seconds=run.seconds,
            speedup=self.uncached.seconds / run.seconds,
            cache_bytes=run.cache_bytes,
            psnr_uncached=psnr(run.pictures, self.uncached.pictures),
            psnr_reference=psnr(run.pictures, self.reference.pictures),
            accuracy=self.classifier.accuracy(run.pictures, self.labels),
        )


def header(steps: int, reference_steps: int) -> str:
    """Two lines of column titles and a rule."""
    above = (
        f"{'':38}{'steps':>9}{'CPU':>9}{'':>9}{'cache':>10}{'dB to':>10}{'dB to':>10}{'right':>9}"
    )
    below = (
        f"{'system':38}{'computed':>9}{'seconds':>9}{'speedup':>9}{'KiB':>10}"
        f"{f'{steps} steps':>10}{f'{reference_steps} steps':>10}{'digits':>9}"
    )
    return "\n".join([above, below, "-" * len(below)])


def line(row: Row) -> str:
    """The row as text under the header."""
    return (
        f"{row.name:38}{row.computed:>9}{row.seconds:>9.2f}{f'{row.speedup:.2f}x':>9}"
        f"{row.cache_bytes / 1024:>10.0f}{row.psnr_uncached:>10.1f}{row.psnr_reference:>10.1f}"
        f"{f'{row.accuracy:.0%}':>9}"
    )
