"""All mutants."""

from __future__ import annotations

from tests.mutants import (
    of_calls,
    of_capture,
    of_dynamo,
    of_lowering,
    of_passes,
    of_steps,
    of_strategies,
    of_values,
)

MUTANTS = (
    *of_capture.MUTANTS,
    *of_passes.MUTANTS,
    *of_lowering.MUTANTS,
    *of_steps.MUTANTS,
    *of_calls.MUTANTS,
    *of_strategies.MUTANTS,
    *of_values.MUTANTS,
    *of_dynamo.MUTANTS,
)
