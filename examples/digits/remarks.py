"""Sentences read off the measured rows: the best strategy, and who lost to fewer steps."""

from collections.abc import Callable

from examples.digits.systems import Section
from examples.digits.table import Row

Score = Callable[[Row], float]

TIE = 0.05  # dB: what the table does not show is no win


def listed(rows: list[Row], score: Score) -> str:
    """Names with their scores in dB."""
    return ", ".join(f"{row.name} ({score(row):.1f})" for row in rows)


def verdict(plain: list[Row], cached: list[Row], score: Score) -> list[str]:
    """The best strategy, then what each sampler with fewer steps beats."""
    sentences = [f"best strategy: {listed([max(cached, key=score)], score)}"]
    for rival in plain:
        losers = [row for row in cached if score(row) < score(rival) - TIE]
        who = "every strategy" if len(losers) == len(cached) else listed(losers, score)
        sentences.append(f"{listed([rival], score)} beats {who or 'no strategy'}")
    return sentences


def remark(section: Section, rows: list[Row]) -> str:
    """Lines on a section that has both few-step samplers and strategies, else ''."""
    pairs = list(zip(section.systems, rows, strict=True))
    plain = [row for system, row in pairs if system.strategy is None]
    cached = [row for system, row in pairs if system.strategy is not None]
    if not plain or not cached:
        return ""
    near = verdict(plain, cached, lambda row: row.psnr_uncached)
    true = verdict(plain, cached, lambda row: row.psnr_reference)
    lines = [f"[{section.title}]", " near the uncached run (dB)", *(f"  - {text}" for text in near)]
    lines += [" near the reference (dB)", *(f"  - {text}" for text in true)]
    return "\n".join(lines) + "\n"
