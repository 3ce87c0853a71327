"""Compare the results of runs: tensors, arrays, pictures, and containers of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_cache_fx.errors import OptionError
from dit_cache_fx.values.pytree import flatten

#: the PSNR of equal results, and the largest that is returned
MOST_DB = 120.0

_EXPECTED = (
    "a function without arguments that generates once through the cached model and returns its "
    "result: a tensor, several, or pictures"
)


@dataclass(frozen=True)
class Result:
    """The result of a run. `tensors`: on the CPU, unchanged.

    `peak`: the range of 8-bit pictures, else 0. `batch`: the number of samples in a call of the
    model; if the first dimension of a tensor fits it, it counts the samples, else each tensor is
    one.
    """

    tensors: tuple[Tensor, ...]
    peak: float
    batch: int = 1


def peak_of(results: Sequence[Result]) -> float:
    """Return the range of the numbers in results: 255 for 8-bit pictures, else max - min."""
    tensors = [tensor for result in results for tensor in result.tensors]
    wide = max(float(t.max()) for t in tensors) - min(float(t.min()) for t in tensors)
    return max(result.peak for result in results) or wide


def result_of(value: Any, name: str, batch: int = 1, expected: str = _EXPECTED) -> Result:
    """Return the result of the run called `name`. `batch`: samples in a call of the model.

    Raises `OptionError` if it is None or contains no numbers.
    """
    found = list(_arrays(value))
    if not found:
        raise OptionError(name, _short(value), expected)
    bytes_alone = all(t.dtype == torch.uint8 for t in found)
    tensors = tuple(_real(t) for t in found)
    if not all(t.numel() for t in tensors):
        raise OptionError(name, _short(value), expected)
    return Result(tensors, 255.0 if bytes_alone else 0.0, batch)


def psnr(result: Result, reference: Result, peak: float, name: str) -> list[float]:
    """Return the PSNR in dB of each sample to a reference, from -inf to `MOST_DB`.

    `peak`: the range of the numbers. Raises `OptionError` if the shapes differ.
    """
    shapes, right = ([tuple(t.shape) for t in r.tensors] for r in (result, reference))
    if shapes != right:
        told = f"the same shapes each time; they were {right} before. Set a seed and fixed sizes"
        raise OptionError(name, shapes, told)
    return [
        _db(error, peak)
        for a, b in zip(result.tensors, reference.tensors, strict=True)
        for error in _mean_squares(a.double() - b.double(), reference.batch)
    ]


def _mean_squares(difference: Tensor, batch: int) -> list[float]:
    """Return one for each sample: the first dimension counts them if it fits the batch."""
    first = difference.shape[0] if difference.ndim > 1 else 1
    rows = difference.reshape(first if first > 1 and batch % first == 0 else 1, -1)
    return rows.square().mean(1).tolist()  # type: ignore[no-any-return]


def _db(error: float, peak: float) -> float:
    if math.isnan(error):
        return -math.inf
    if error == 0 or peak == 0:
        return MOST_DB if error == 0 else -math.inf
    return min(MOST_DB, 10 * math.log10(peak * peak / error))


def _real(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().to("cpu", copy=True)


def _arrays(value: Any) -> Iterator[Tensor]:
    """Yield the numbers in a result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "getbands") and hasattr(value, "tobytes"):
        yield _picture(value)
    elif hasattr(value, "__array_interface__"):
        yield torch.as_tensor(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _arrays(item)
    elif value is not None and not isinstance(value, (str, bytes, int, float, bool)):
        yield from flatten(value)[0]


def _picture(picture: Any) -> Tensor:
    """Return a PIL picture as bytes, by rows."""
    bands = picture if picture.mode in ("L", "RGB", "RGBA") else picture.convert("RGB")
    width, height = bands.size
    values = torch.frombuffer(bytearray(bands.tobytes()), dtype=torch.uint8)
    return values.reshape(height, width, -1)


def _short(value: Any) -> Any:
    return value if value is None else repr(value)[:60]
