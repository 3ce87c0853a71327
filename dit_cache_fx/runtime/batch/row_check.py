"""Check with the model itself whether a call can be split into rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dit_cache_fx.capture import Subject
from dit_cache_fx.capture.outer_hook import own_forward
from dit_cache_fx.capture.side_effects import unnoticed
from dit_cache_fx.errors import CaptureError, OptionError
from dit_cache_fx.ranks import found, together
from dit_cache_fx.strategies import spread_over
from dit_cache_fx.values.pytree import Skeleton, flatten, key_paths
from dit_cache_fx.values.rows import CallRows

#: what the processes do together, for an error
SPLIT = "split the call into sessions"


def check_rows(subject: Subject, rows: CallRows) -> None:
    """Raise if a row by itself gives another result than in the call.

    That happens if the model mixes rows, or if an argument is split that has no rows. The first row
    and the last one are tried.
    """
    whole, skeleton = flatten(_answer(subject, rows.arguments))
    given = flatten(rows.arguments)[0]
    near = tolerance([*whole, *given, *subject.model.parameters()])
    alone = {row: flatten(_alone(subject, rows, row)) for row in sorted({0, rows.count - 1})}
    ranks = spread_over(subject.strategy, found(subject.model, given)).ranks
    with together(ranks, SPLIT):
        for row, (one, kind) in alone.items():
            if kind != skeleton:
                raise CaptureError(f"{_split(rows)} The model's output has other parts for one row")
            compare_rows(rows, output_names(skeleton), (whole, row), (one, 0), near)


#: outputs of a call, and the index of the row
Outputs = tuple[Sequence[torch.Tensor], int]


def compare_rows(
    rows: CallRows, names: Sequence[str], whole: Outputs, part: Outputs, tolerance: float
) -> None:
    """Raise `CaptureError` if a row differs between the call and a part of it."""
    (all_rows, row), (some, place) = whole, part
    for name, many, few in zip(names, all_rows, some, strict=True):
        if not few.ndim or many.shape != (rows.count, *few.shape[1:]):
            raise CaptureError(
                f"{name} is {list(many.shape)} for {rows.count} rows and {list(few.shape)} for "
                "fewer: it has no row for each session. Call each session by itself"
            )
        if not _near(few[place], many[row], tolerance):
            raise CaptureError(
                f"{_split(rows)} Row {row} has another result in the call than by itself "
                f"({name}): the model mixes rows, or one of these has none (name it: "
                "shared=('...',)), or its computation is random. Otherwise call each session by "
                "itself"
            )


def output_names(skeleton: Skeleton) -> list[str]:
    """Return names for the model's outputs."""
    paths = [".".join(str(key) for _, key in path) for path in key_paths(skeleton)]
    return [f"output {path}" if path else "the output" for path in paths]


def _alone(subject: Subject, rows: CallRows, row: int) -> Any:
    try:
        return _answer(subject, rows.taken([row]))
    except Exception as error:
        raise OptionError(
            "shared",
            sorted(rows.shared),
            f"the arguments without rows, and with {rows.names} split by rows the model does not "
            f"take row {row} ({type(error).__name__}: {error})",
        ) from error


def _answer(subject: Subject, arguments: dict[str, Any]) -> Any:
    model = subject.model
    with torch.no_grad(), subject.turns.of_model(), unnoticed(model):
        return subject.signature.call(own_forward(model), arguments)


def _split(rows: CallRows) -> str:
    return f"the call cannot be split into {rows.count} sessions. Split are {rows.names}."


def _near(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    kind = torch.promote_types(one.dtype, torch.float32)
    a, b = one.to(kind).nan_to_num(), other.to(kind).nan_to_num()
    apart = a - b
    largest = b.abs().max() if b.numel() else torch.zeros((), device=b.device)
    everywhere = (apart.abs() <= tolerance * largest).all()
    return bool(everywhere & (apart.norm() <= tolerance / 2 * b.norm()))


def tolerance(tensors: Iterable[torch.Tensor]) -> float:
    """Return the tolerance for another batch size: half of the digits of the coarsest dtype."""
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    return math.sqrt(max((torch.finfo(kind).eps for kind in kinds), default=0.0))
