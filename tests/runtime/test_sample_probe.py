"""A few elements of a sample, and what they tell without reading them all again."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dit_cache_fx.runtime.tracking.trajectory import PROBED, SampleProbe

SAMPLES = {
    "small": torch.arange(12.0).reshape(3, 4),
    "large": torch.arange(40_000.0).reshape(2, 4, 5000),
    "a view": torch.arange(40_000.0)[100:30_100].reshape(1, 30_000),
    "transposed": torch.arange(40_000.0).reshape(200, 200).t(),
    "a column": torch.arange(40_000.0).reshape(400, 100)[:, 3],
    "half": torch.arange(2000.0).to(torch.bfloat16),
    "complex": torch.complex(torch.arange(5000.0), -torch.arange(5000.0)),
    "conjugate": torch.complex(torch.arange(5000.0), torch.arange(5000.0)).conj(),
    "imaginary": torch.complex(torch.arange(5000.0), torch.arange(5000.0)).conj().imag,
    "one number": torch.tensor(3.0),
    "nothing": torch.empty(0, 4),
}


def picked(sample: Tensor) -> list[float]:
    real = torch.view_as_real(sample.resolve_conj()) if sample.is_complex() else sample
    values = real.flatten().tolist()
    return values[:: max(1, len(values) // PROBED) | 1]


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_its_elements_are_spread_over_the_sample(sample: Tensor) -> None:
    probe = SampleProbe(sample)
    assert probe.values.tolist() == picked(sample)
    assert probe.values.dtype == torch.float32
    assert probe.values.numel() <= 2 * PROBED


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())
def test_it_does_not_change_with_the_sample(sample: Tensor) -> None:
    sample = sample.clone()
    before, probe = picked(sample), SampleProbe(sample)
    sample.add_(1)
    assert probe.values.tolist() == before


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0, 3.0])
def test_a_known_distance_changes_no_answer(share: float) -> None:
    """Along walks with steps of this share of the sample's length."""
    generator = torch.Generator().manual_seed(0)
    now = torch.randn(600, generator=generator)
    known = plain = SampleProbe(now)
    answers = []
    for _ in range(15):
        now = now + share * now.norm() / 600**0.5 * torch.randn(600, generator=generator)
        probe, again = SampleProbe(now), SampleProbe(now)
        answers.append(probe.similar(known, probe.distance(known)))
        assert answers[-1] == again.similar(plain)
        assert probe.shortest <= probe.values.norm().item() * (1 + 1e-6)
        known, plain = probe, again
    assert all(answers) == (share <= 1)


def test_samples_without_a_length_are_not_similar() -> None:
    for value in (float("inf"), float("nan"), 1e30):
        before, now = SampleProbe(torch.full((600,), value)), SampleProbe(torch.ones(600))
        assert not now.similar(before, now.distance(before))


def test_most_short_steps_need_no_scalar_product() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.lerp(*torch.randn(2, 600, generator=generator), torch.arange(50)[:, None] / 400)
    probes = [SampleProbe(sample) for sample in samples]
    for before, now in itertools.pairwise(probes):
        assert now.similar(before, now.distance(before))
    assert sum("square" in vars(probe) for probe in probes) < 10
