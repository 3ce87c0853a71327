"""Mutants of capture: a graph that is not what the model does, or not for this call."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "guard-not-compared",
        "capture/captured.py",
        "read is not None and guards.hold(read)",
        "read is not None",
        "a model that branches on data takes the branch of another prompt",
        ("tests/capture/test_capture.py::test_a_value_that_is_read_becomes_a_guard",),
    ),
    Mutant(
        "guard-of-changed-tensor-not-read-again",
        "capture/captured.py",
        "known = newest is not None and not tensors.other_objects(newest[0])",
        "known = newest is not None",
        "a mask that was changed in place is taken for the mask before",
        ("tests/capture/test_capture.py::test_a_guard_sees_a_tensor_that_was_changed_in_place",),
    ),
    Mutant(
        "unseen-mask-length-not-checked",
        "capture/captured.py",
        "if not every(captured.ranks, shapes in captured.accepted):",
        "if False:",
        "a graph made for one prompt length answers another one that it is wrong for",
        ("tests/capture/test_capture.py::test_a_shape_that_depends_on_data_is_used_as_a_number",),
    ),
    Mutant(
        "other-views-of-changed-memory-not-seen",
        "capture/overlap.py",
        "return bool(_viewed(touched, others).any())",
        "return False",
        "a block that changes its conditioning in place leaves it as it was for the next block",
        (
            "tests/capture/test_overlap.py::"
            "test_memory_that_is_read_after_a_block_changed_it_is_refused",
        ),
    ),
    Mutant(
        "returned-numbers-shared",
        "capture/normal_form.py",
        "(node.target is _COPY and not is_exposed(node))",
        "node.target is _COPY",
        "who changes a returned constant in place changes all later steps",
        (
            "tests/passes/test_fold_constants.py::"
            "test_a_caller_that_changes_returned_numbers_changes_no_later_step",
        ),
    ),
    Mutant(
        "no-check-on-second-inputs",
        "capture/eager.py",
        "if not every(captured.ranks, _guards_hold(captured, inputs)):",
        "if True:",
        "a value of the first call is a constant in all others",
        ("tests/capture/test_arguments.py::test_a_function_that_hides_a_tensor_is_refused",),
    ),
    Mutant(
        "no-check-on-another-sample",
        "capture/check.py",
        "for only in (range(len(tensors)), sample):",
        "for only in (range(len(tensors)),):",
        "a model whose guards read the prompt is never checked on another sample",
        (
            "tests/capture/test_first_answer.py::"
            "test_where_other_conditioning_is_another_graph_another_sample_is_checked",
        ),
    ),
    Mutant(
        "block-arguments-not-compared",
        "capture/check.py",
        "if not alike(a, b):",
        "if False:",
        "a block gets the number or function of the first call on every step",
        ("tests/capture/test_arguments.py::test_a_function_that_hides_a_tensor_is_refused",),
    ),
    Mutant(
        "stand-ins-of-blocks-alike",
        "capture/check.py",
        "manual_seed(1000 * index + place)",
        "manual_seed(place)",
        "a graph that confuses the results of two blocks passes the check",
        ("tests/capture/test_check.py::test_results_of_two_blocks_are_told_apart",),
    ),
    Mutant(
        "first-answer-not-compared",
        "runtime/engine.py",
        "if check and not every(captured.ranks, _gives(recording.output, results)):",
        "if False:",
        "a layer that is random gives another picture than the model, without a word",
        (
            "tests/capture/test_first_answer.py::"
            "test_the_first_answer_is_checked_where_no_other_check_can_be",
        ),
    ),
    Mutant(
        "options-of-modules-not-watched",
        "capture/fingerprint.py",
        "if name not in TORCHS and (plain := _plain(value)) is not _OTHER:",
        "if False:",
        "an option that is set after the first call has no effect",
        ("tests/test_cached_model.py::test_change_between_two_generations",),
    ),
    Mutant(
        "hooks-not-watched",
        "capture/fingerprint.py",
        "bool(module._forward_hooks or module._forward_pre_hooks)",
        "False",
        "a hook that is put on the model's layers after the first call does nothing",
        ("tests/test_cached_model.py::test_change_between_two_generations",),
    ),
    Mutant(
        "weights-baked-in",
        "capture/normal_form.py",
        "if id(value) in live:",
        "if False:",
        "weights that are loaded after the first call have no effect",
        ("tests/test_cached_model.py::test_change_between_two_generations",),
    ),
    Mutant(
        "settings-not-put-back",
        "capture/settings.py",
        "for holder, key, value in reversed(before):",
        "for holder, key, value in ():",
        "the strength of LoRA of one call stays on the model",
        (
            "tests/capture/test_surroundings.py::"
            "test_the_strength_is_given_back_when_a_block_raises",
        ),
    ),
    Mutant(
        "settings-side-by-side",
        "capture/captured.py",
        "turn = self.turns.alone() if settings else self.turns.beside()",
        "turn = self.turns.beside()",
        "a thread sees the strength of LoRA of another one",
        ("tests/capture/test_turns.py::test_a_graph_that_sets_a_scale_runs_alone",),
    ),
    Mutant(
        "calls-of-other-threads-captured",
        "capture/intercept.py",
        "here = self._waiting.get(threading.get_ident())",
        "here = next(iter(self._waiting.values()), None)",
        "a thread gets what a block gave in another thread's capture",
        ("tests/runtime/test_threads.py::test_another_thread_calls_the_modules_that_are_captured",),
    ),
    Mutant(
        "recorded-results-not-copied",
        "capture/record.py",
        "call.values[index] = tensor.clone()",
        "call.values[index] = tensor",
        "the first picture is made of what the model has changed in place since",
        ("tests/capture/test_side_effects.py::test_a_blocks_result_that_is_changed_in_place",),
    ),
    Mutant(
        "results-of-uncached-blocks-not-copied",
        "capture/record.py",
        "(i, t.clone()) for i, t in enumerate(outputs)",
        "(i, t) for i, t in enumerate(outputs)",
        "the first picture is made of what a later block has changed in place",
        (
            "tests/capture/test_first_answer.py::"
            "test_never_cached_blocks_answer_with_what_they_gave",
        ),
    ),
    Mutant(
        "state-of-the-model-not-refused",
        "capture/side_effects.py",
        "if change.in_place or module in inside or (module, change.attribute) in read:",
        "if change.in_place:",
        "a model that goes on from its call before never moves on",
        ("tests/capture/test_side_effects.py::test_state_from_call_to_call_is_refused_by_name",),
    ),
    Mutant(
        "number-timestep-rounded",
        "capture/signature.py",
        "dtype = torch.int64 if isinstance(number, int) else torch.float64",
        "dtype = torch.float32",
        "a timestep given as a number is another one in the graph",
        ("tests/capture/test_number_timesteps.py::test_a_number_keeps_its_digits",),
    ),
    Mutant(
        "dtypes-share-a-graph",
        "capture/signature.py",
        "(t.shape, t.dtype, t.device, None if",
        "(t.shape, t.device, None if",
        "a call in another dtype is answered by the graph, and with the state, of the first",
        ("tests/capture/test_edges.py::test_samples_of_two_dtypes_are_two_signatures",),
    ),
    Mutant(
        "attention-kernels-not-told-apart",
        "capture/ambient.py",
        "            attention_backends(),\n",
        "            (),\n",
        "the attention kernels that a caller chooses are those of the first call",
        ("tests/capture/test_surroundings.py::test_attention_kernels_that_forward_chooses",),
    ),
    Mutant(
        "second-timestep-is-conditioning",
        "capture/timestep.py",
        "return argument in NAMES or alike or bool(_WORDS.intersection(words))",
        "return argument in NAMES",
        "a model with two timesteps computes every step",
        ("tests/runtime/test_evidence.py::test_a_second_timestep_is_no_conditioning",),
    ),
    Mutant(
        "digests-of-blocks-not-compared",
        "capture/rerun.py",
        "for name, want, got in self.pairs if not equal(want, got)",
        "for name, want, got in self.pairs if False",
        "blocks that read a variable of the model's module run with that of the last call",
        ("tests/capture/test_surroundings.py::test_blocks_that_read_a_variable_are_refused",),
    ),
    Mutant(
        "settings-stay",
        "capture/eager.py",
        "put_back(recording.settings, recording.before)",
        "pass",
        "a strength that a call leaves is not set for the calls behind it",
        ("tests/capture/test_kept_settings.py::test_each_call_has_its_own_value",),
    ),
    Mutant(
        "unchanged-settings-not-checked",
        "capture/eager.py",
        "whole = set() if recording.settings or subject.turns.needed else",
        "whole = set() if recording.settings else",
        "a strength that an uncached call leaves is in force for cached ones",
        ("tests/capture/test_kept_settings.py::test_after_a_call_that_the_model_itself_answers",),
    ),
)
