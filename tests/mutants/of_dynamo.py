"""Mutants of dynamo and calibration."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "strides-of-a-backend-not-made-alike",
        "dynamo/graph.py",
        "[t.contiguous() for t in results[variants.outputs :]]",
        "[*results[variants.outputs :]]",
        "a compiled graph reads cached tensors in strides that it is not for",
        (
            "tests/compile/test_strides.py::"
            "test_the_graphs_of_a_backend_get_the_strides_that_they_were_compiled_for",
        ),
    ),
    Mutant(
        "each-constant-is-a-step",
        "dynamo/shared.py",
        "return value if value == self.first_constant else None",
        "return value",
        "what a graph has cached for another constant is reused",
        ("tests/dynamo/test_numbers.py::test_numbers_that_must_stay_constants_are_named",),
    ),
    Mutant(
        "read-before-it-is-changed",
        "dynamo/reads.py",
        "if _is_before_blocks(n, members) and not _is_after_change(n)]",
        "if _is_before_blocks(n, members)]",
        "a value is read that the model changes before it reads it",
        ("tests/dynamo/test_reads.py::test_what_cannot_be_read_before_is_not_cached",),
    ),
    Mutant(
        "changes-not-given-back",
        "dynamo/graph.py",
        "                    tensors[place].copy_(tensor)\n",
        "                    pass\n",
        "an argument that the model counts in stands still",
        ("tests/dynamo/test_reads.py::test_an_argument_that_the_model_changes",),
    ),
    Mutant(
        "changed-memory-of-another-tensor",
        "dynamo/graph.py",
        "return any(keys.count(keys[place]) > 1 for place in entry.changed)",
        "return False",
        "an argument that lies in a changed one is read as it was before",
        (
            "tests/dynamo/test_reads.py::"
            "test_a_changed_tensor_in_the_memory_of_another_one_is_left_to_the_model",
        ),
    ),
    Mutant(
        "constants-of-dynamos-graphs-shared",
        "dynamo/parts.py",
        'n.startswith("_kept_") and getattr(owner, n) is value',
        'n.startswith("_kept_")',
        "every constant of a graph is the first one",
        ("tests/dynamo/test_numbers.py::test_tensors_that_the_graph_holds",),
    ),
    Mutant(
        "uncached-calls-are-no-steps",
        "dynamo/beside.py",
        "                self._pass(inputs)\n",
        "                pass\n",
        "after calls with gradients the schedule lags behind",
        ("tests/dynamo/test_reads.py::test_calls_with_gradients_count_as_steps",),
    ),
    Mutant(
        "chance-wins",
        "calibration/judge.py",
        "return best if fmean(gains) > _chance(gains) else preset",
        "return best",
        "a plan that was lucky takes the preset's place",
        ("tests/calibration/test_judge.py::test_a_gain_within_chance_is_none",),
    ),
    Mutant(
        "simulated-reach-wrong",
        "calibration/simulate.py",
        "self._reach = torch.where(computes, distance, self._reach)",
        "self._reach = distance",
        "the search goes by other predictions than the model gets",
        ("tests/calibration/test_search.py::test_factors_are_what_the_runtime_predicts_with",),
    ),
    Mutant(
        "programme-off-by-one",
        "calibration/programme.py",
        "inside[current + 2 :] = weights[current + 1 :].cumsum(0)",
        "inside[current + 2 :] = weights[current:-1].cumsum(0)",
        "the best schedule of the programme is not the best one",
        ("tests/calibration/test_search.py::test_the_programme_finds_the_best_of_all_schedules",),
    ),
    Mutant(
        "errors-behind-not-scaled",
        "calibration/record.py",
        "weights = torch.cat([total * behind, last[None]])",
        "weights = torch.cat([total, last[None]])",
        "the search takes late errors for as bad as early ones",
        ("tests/calibration/test_search.py::test_the_weights_of_a_sampler_that_scales_its_sample",),
    ),
    Mutant(
        "candidate-stays",
        "calibration/engines.py",
        "        cached._engine, cached._enabled = before\n",
        "        pass\n",
        "after a calibration the model answers with the last candidate",
        (
            "tests/calibration/test_calibrate.py::"
            "test_the_model_is_left_as_it_was_by_a_run_that_raises",
        ),
    ),
    Mutant(
        "random-numbers-read-apart",
        "dynamo/reads.py",
        "self.random = drawn.used()",
        "self.random = False",
        "a compiled model reads another random number than it computes with",
        ("tests/dynamo/test_reads.py::test_what_cannot_be_read_before_is_not_cached",),
    ),
)
