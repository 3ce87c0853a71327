"""Mutants of `values`, `dynamo`, `calibration`, `export` and what stands at the package's top."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    # --- values ---
    Mutant(
        "checksum-of-any-order",
        "values/checksum.py",
        "mixed = (words ^ places).mul_(_FIRST)",
        "mixed = (words ^ 0).mul_(_FIRST)",
        "a prompt of the same words in another order is taken for the first one",
        ("tests/values/test_checksum.py::test_an_order_counts",),
    ),
    Mutant(
        "changed-conditioning-is-the-same",
        "values/identity.py",
        "return a[1] == b[1] == version(tensor)",
        "return True",
        "a prompt that is written into the tensor of the last one gets its state",
        (
            "tests/runtime/test_evidence.py::"
            "test_conditioning_that_is_changed_in_place_is_other_conditioning",
        ),
    ),
    Mutant(
        "inference-tensors-trusted",
        "values/identity.py",
        "or tensor is not b[0]() or tensor.is_inference():",
        "or tensor is not b[0]():",
        "in inference mode a prompt that was changed in place is taken for the last one",
        (
            "tests/capture/test_capture.py::test_a_guard_sees_an_inference_tensor_that_was_changed_in_place",
        ),
    ),
    Mutant(
        "one-is-true",
        "values/pytree.py",
        "return Constant(type(value), value)",
        "return Constant(object, value)",
        "a call with True runs the graph of a call with 1",
        ("tests/capture/test_edges.py",),
    ),
    Mutant(
        "stale-timesteps-of-the-host",
        "values/host_copies.py",
        "return copy if copy.version == tensor._version else None",
        "return copy",
        "timesteps that a sampler has written anew are those of the run before",
        ("tests/runtime/test_host_copies.py::test_what_was_changed_in_place_is_read_again",),
    ),
    Mutant(
        "rows-in-the-callers-order",
        "values/rows.py",
        "if list(rows) == list(range(first, first + count)):",
        "if True:",
        "requests of a batch get each other's arguments",
        ("tests/runtime/batch/test_rows.py::test_requests_join_and_leave_in_any_order",),
    ),
    # --- dynamo ---
    Mutant(
        "strides-of-a-backend-not-made-alike",
        "dynamo/graph.py",
        "[t.contiguous() for t in results[variants.outputs :]]",
        "[*results[variants.outputs :]]",
        "a compiled graph reads held tensors in strides that it is not for",
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
        "what a graph has held for another constant is reused",
        ("tests/dynamo/test_numbers.py::test_numbers_that_must_stay_constants_are_named",),
    ),
    Mutant(
        "read-before-it-is-changed",
        "dynamo/reads.py",
        'if other.op == "call_function" and other.target in _IN_PLACE:',
        "if False:",
        "a value is read that the model changes before it reads it",
        ("tests/dynamo/test_reads.py::test_what_cannot_be_read_before_is_not_cached",),
    ),
    Mutant(
        "changes-not-given-back",
        "dynamo/graph.py",
        "                    tensors[place].copy_(tensor)\n",
        "                    pass\n",
        "a buffer that the model counts in stands still",
        (
            "tests/dynamo/test_reads.py::"
            "test_what_the_model_changes_in_place_is_changed_on_every_step",
        ),
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
    # --- calibration ---
    Mutant(
        "chance-wins",
        "calibration/judge.py",
        "return best if fmean(gains) > _chance(gains) else preset",
        "return best",
        "a plan that was lucky takes the preset's place",
        ("tests/calibration/test_calibrate.py",),
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
            "tests/calibration/test_calibrate.py::test_the_model_is_left_as_it_was_by_a_run_that_raises",
        ),
    ),
    # --- export ---
    Mutant(
        "contexts-of-a-runner-shared",
        "export.py",
        "self._states[self._context] = state",
        "self._states[None] = self._states[self._context] = state",
        "the branches of guidance share a state in an exported program",
        ("tests/test_export.py::test_a_runner_keeps_a_state_for_each_context",),
    ),
    Mutant(
        "other-constants-taken",
        "export.py",
        "if call.skeleton != self.skeleton:",
        "if False:",
        "an exported program ignores an argument that is another one than at its export",
        ("tests/test_export.py::test_a_runner_refuses_a_call_of_another_form",),
    ),
    Mutant(
        "conditioning-not-in-the-state",
        "runtime/graphs.py",
        "if check_conditioning else []",
        "if False else []",
        "an exported program answers another prompt with the tensors of the first",
        ("tests/test_export.py::test_without_contexts_another_conditioning_computes",),
    ),
    # --- the top ---
    Mutant(
        "disabled-keeps-its-state",
        "life_cycle.py",
        "        self._enabled = False\n        self.clear_states()\n",
        "        self._enabled = False\n",
        "enabled again, it goes on with what is older than the steps between",
        (
            "tests/test_lifecycle.py::"
            "test_enabled_again_in_the_middle_of_a_generation_starts_by_computing",
        ),
    ),
    Mutant(
        "training-is-cached",
        "cached_model.py",
        "if self._model.training:",
        "if False:",
        "a model that is set to training reuses steps of evaluation",
        ("tests/test_cached_model.py::test_train_and_eval_after_apply",),
    ),
    Mutant(
        "gradients-are-cached",
        "cached_model.py",
        "if requires_grad(self._model, args, kwargs):",
        "if False:",
        "gradients that are wanted are not there",
        ("tests/capture/test_edges.py::test_wanted_gradients_flow_and_one_warning_says_so",),
    ),
)
