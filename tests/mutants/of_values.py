"""Mutants of values, and what stands at the top of the package."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "checksum-of-any-order",
        "values/checksum.py",
        "device=words.device) * _PLACE",
        "device=words.device) * 0",
        "a prompt of the same words in another order is taken for the first one",
        ("tests/values/test_checksum.py::test_an_order_counts",),
    ),
    Mutant(
        "changed-conditioning-is-the-same",
        "values/identity.py",
        "a is not b or v != w or v == UNCOUNTED",
        "a is not b or v == UNCOUNTED",
        "a prompt that is written into the tensor of the last one gets its state",
        (
            "tests/runtime/test_evidence.py::"
            "test_conditioning_that_is_changed_in_place_is_other_conditioning",
        ),
    ),
    Mutant(
        "inference-tensors-trusted",
        "values/identity.py",
        "a is not b or v != w or v == UNCOUNTED",
        "a is not b or v != w",
        "in inference mode a prompt that was changed in place is taken for the last one",
        (
            "tests/capture/test_capture.py::"
            "test_a_guard_sees_an_inference_tensor_that_was_changed_in_place",
        ),
    ),
    Mutant(
        "one-is-true",
        "values/pytree.py",
        "return Constant(type(value), value)",
        "return Constant(object, value)",
        "a call with True runs the graph of a call with 1",
        ("tests/values/test_pytree.py::test_equal_numbers_of_two_types_are_two_values",),
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
    Mutant(
        "disabled-keeps-its-state",
        "life_cycle.py",
        "        self._enabled = False\n        self.clear_states()\n",
        "        self._enabled = False\n",
        "a model that is disabled keeps its tensors, and goes on with them when it is enabled",
        ("tests/runtime/test_memory.py::test_nothing_is_held_any_more_after",),
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
    Mutant(
        "one-equal-digest-is-enough",
        "values/checksum.py",
        "all(map(torch.equal, a, b))",
        "any(map(torch.equal, a, b))",
        "a block that reads such a variable passes where one of its results is the same",
        ("tests/values/test_checksum.py::test_all_of_several_tensors_have_to_be_equal",),
    ),
    Mutant(
        "pieces-of-a-tensor-in-any-order",
        "values/checksum.py",
        "            start += words.numel()\n",
        "",
        "two pictures of a batch that change places are taken for the same",
        ("tests/values/test_checksum.py::test_large_tensors_are_read_in_pieces",),
    ),
)
