"""Markdown tables of the figures, written into the pages.

A page marks the place with `<!-- few_steps: NAME -->`. Each run replaces the table after the mark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from examples.few_steps.measure import CACHED, COMPUTED, OTHERS, PLAIN, PUBLISHED, SHIFTS

Figures = Mapping[str, Any]  # of each model

_MARK = re.compile(r"(<!-- few_steps: (\w+) -->\n)(?:\|.*\n)*")
ROWS = (*PLAIN, PUBLISHED, *CACHED)
GOALS = (40, 45, 50)  # decibels
#: what a row is called where placement is compared too
LABELS = {
    **{name: name.replace("as many", "fewer") for name in PLAIN},
    PUBLISHED: PUBLISHED.replace("in index", "by index"),
    "TaylorCache": "TaylorCache, even by noise level",
    "NewtonCache": "**NewtonCache**",
}


def fill(text: str, figures: Figures) -> str:
    """The page with its tables written anew."""
    return _MARK.sub(lambda found: found[1] + TABLES[found[2]](figures), text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def scores(model: str) -> Callable[[Figures], str]:
    """All main rows of a model, a cell for each number of computed steps: shift 1 / 3 / 5."""

    def written(figures: Figures) -> str:
        of_shift = [figures[model]["scores"][str(shift)] for shift in SHIFTS]
        rows = [[label(name), *_side_by_side([s[name] for s in of_shift])] for name in ROWS]
        return table(["", *map(str, COMPUTED)], rows)

    return written


def headline(figures: Figures) -> str:
    """The main rows at a shift of 3: digits / shapes."""
    of_model = [f["scores"]["3"] for f in figures.values()]
    rows = [[label(name), *_side_by_side([s[name] for s in of_model])] for name in ROWS]
    return table(["computed of 50", *map(str, COMPUTED)], rows)


def others(figures: Figures) -> str:
    """Every cached row at a shift of 3: digits / shapes."""
    of_model = [f["scores"]["3"] for f in figures.values()]
    names = ("NewtonCache", *(name for name in (*CACHED, *OTHERS) if name != "NewtonCache"))
    rows = [[name, *_side_by_side([s[name] for s in of_model])] for name in names]
    return table(["", *map(str, COMPUTED)], rows)


def goals(figures: Figures) -> str:
    """How many computed steps a quality takes at a shift of 3: digits / shapes."""
    of_model = [f["scores"]["3"] for f in figures.values()]
    rows = [
        [label(name), *(" / ".join(needed(s[name], goal) for s in of_model) for goal in GOALS)]
        for name in ROWS
    ]
    return table(["computed steps for", *(f"{goal} dB" for goal in GOALS)], rows)


def needed(row: Sequence[float], goal: float) -> str:
    """The computed steps that reach a goal, on the line between those that were measured."""
    if row[0] >= goal:
        return f"up to {COMPUTED[0]}"
    for few, many, low, high in zip(COMPUTED, COMPUTED[1:], row, row[1:], strict=False):
        if high >= goal:
            return str(math.ceil(few + (many - few) * max(goal - low, 0) / (high - low)))
    return f"over {COMPUTED[-1]}"


def presets(model: str) -> Callable[[Figures], str]:
    """The presets of a model, shift by shift."""

    def written(figures: Figures) -> str:
        rows = []
        for shift in SHIFTS:
            for one in figures[model]["presets"][str(shift)]:
                cells = [f'`"{one["preset"]}"`', str(one["steps"]), str(one["computed"])]
                rows.append([*cells, str(shift), *_best_in_bold(one["decibels"])])
        header = ["preset", "steps", "computed", "shift", "Euler, fewer steps"]
        return table([*header, "AB 2, fewer steps", "by index", "by noise level"], rows)

    return written


def tolerances(figures: Figures) -> str:
    """What each tolerance computes, and its decibels, for each shift."""
    rows = []
    for model, of_model in figures.items():
        per_shift = [of_model["tolerances"][str(shift)] for shift in SHIFTS]
        for ones in zip(*per_shift, strict=True):
            cells = [f"{one['computed']}: {one['decibels']:.1f}" for one in ones]
            rows.append([model, f"{ones[0]['tolerance']:g}", *cells])
    return table(["model", "tolerance", *(f"shift {shift}" for shift in SHIFTS)], rows)


def label(name: str) -> str:
    """The name of a row in the tables."""
    return LABELS.get(name, name)


def _best_in_bold(row: Sequence[float]) -> list[str]:
    return [f"**{score:.1f}**" if score == max(row) else f"{score:.1f}" for score in row]


def _side_by_side(rows: Sequence[Sequence[float]]) -> list[str]:
    """A cell for each number of computed steps."""
    return [" / ".join(f"{score:.1f}" for score in cell) for cell in zip(*rows, strict=True)]


TABLES: Mapping[str, Callable[[Figures], str]] = {
    "digits": scores("digits"),
    "shapes": scores("shapes"),
    "headline": headline,
    "others": others,
    "goals": goals,
    "presets_digits": presets("digits"),
    "presets_shapes": presets("shapes"),
    "tolerances": tolerances,
}
