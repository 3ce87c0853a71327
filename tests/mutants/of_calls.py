"""Mutants of runtime: which branch a call is of, and calls at one time."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "conditioning-not-compared",
        "runtime/tracking/matching.py",
        "values = [(b, given.other_values(b.conditioning, places)) for b, places in objects]",
        "values = [(b, frozenset()) for b, places in objects]",
        "a prompt is answered with the state of another one",
        (
            "tests/runtime/test_branches.py::"
            "test_branches_change_places_between_steps_and_keep_their_state",
        ),
    ),
    Mutant(
        "first-change-of-conditioning-trusted",
        "runtime/tracking/matching.py",
        "known = varying <= branch.varying",
        "known = True",
        "another prompt in the same cache context gets the state of the first",
        (
            "tests/runtime/test_evidence.py::"
            "test_what_varies_in_a_cache_context_is_known_from_its_second_change_on",
        ),
    ),
    Mutant(
        "contexts-not-told-apart",
        "runtime/tracking/session.py",
        "if b.key == key and b.context == context]",
        "if b.key == key]",
        "the branches of guidance share one state",
        ("tests/runtime/test_branches.py::test_cache_context_wins_over_order_and_conditioning",),
    ),
    Mutant(
        "state-of-another-graph-used",
        "runtime/tracking/placement.py",
        " or branch.serial != call.serial:",
        ":",
        "what a model has cached on one side of a guard is used on the other side",
        (
            "tests/capture/test_capture.py::"
            "test_another_answer_within_a_generation_begins_with_nothing_held",
        ),
    ),
    Mutant(
        "branch-not-forgotten",
        "runtime/tracking/placement.py",
        "            other.forget()\n",
        "            pass\n",
        "the tensors of the picture before are cached as long as the next one is made",
        (
            "tests/runtime/test_branches.py::"
            "test_the_next_generation_replaces_what_the_last_one_held",
        ),
    ),
    Mutant(
        "guidance-passes-not-told-apart",
        "runtime/tracking/hooks.py",
        "return hooked.wrapped, self._number(value, hooked)",
        "return ()",
        "the pass of guidance with skipped layers is taken for the plain one",
        (
            "tests/pipelines/test_modular.py::"
            "test_a_pass_with_a_hook_of_its_own_has_a_state_of_its_own",
        ),
    ),
    Mutant(
        "model-changes-not-seen",
        "runtime/engine.py",
        "return step.computes and self.graphs.stale(entry)",
        "return False",
        "a layer that is replaced between two pictures has no effect",
        (
            "tests/test_cached_model.py::"
            "test_change_within_a_generation_takes_effect_at_the_next_computed_step",
        ),
    ),
    Mutant(
        "first-runs-without-a-lock",
        "runtime/first_runs.py",
        "with self._lock:",
        "if True:",
        "two threads compile one graph twice",
        ("tests/runtime/test_threads.py::test_a_first_run_goes_alone_until_it_succeeds",),
    ),
    Mutant(
        "session-without-a-lock",
        "runtime/engine.py",
        "        with session.lock:\n            start = self.begin(session, call, found)",
        "        if True:\n            start = self.begin(session, call, found)",
        "two threads in one session mix up its steps",
        ("tests/runtime/test_sessions.py::test_threads_in_one_session_take_turns[True]",),
    ),
    Mutant(
        "threads-share-a-session",
        "runtime/tracking/tracker.py",
        "self._own = threading.local()",
        "self._own = type('Own', (), {})()",
        "two requests in two threads are answered from each other",
        ("tests/runtime/test_sessions.py::test_threads_share_a_model_and_nothing_else",),
    ),
    Mutant(
        "signatures-not-kept",
        "runtime/execution.py",
        "with signatures_kept():",
        "if True:",
        "a model of diffusers with two cached runs cannot be one compiled graph",
        ("tests/compile/test_signatures.py::test_two_runs_of_blocks_are_in_one_graph",),
    ),
    Mutant(
        "later-hooks-not-compiled",
        "runtime/step_compiler.py",
        "hooks = self._hooks.ids()",
        "hooks = ()",
        "a hook that is added to a block after compile_steps changes nothing",
        ("tests/compile/test_hooks.py::test_a_hook_acts_from_its_registration_to_its_removal",),
    ),
    Mutant(
        "strides-not-made-alike",
        "runtime/execution.py",
        "return [*outputs, *(t.contiguous() for t in recorded)]",
        "return [*outputs, *recorded]",
        "compiled steps are compiled again",
        ("tests/compile/test_strides.py::test_compiled_steps_are_compiled_once",),
    ),
    Mutant(
        "rows-of-both-kinds-together",
        "runtime/batch/row_groups.py",
        "alike.setdefault((row.graph, row.kind, kind(row)), []).append(row)",
        "alike.setdefault((row.graph, row.kind), []).append(row)",
        "rows that are to compute reuse, as the first row of the batch does",
        ("tests/runtime/batch/test_rows.py::test_by_schedule",),
    ),
    Mutant(
        "rule-asked-for-the-first-row",
        "runtime/batch/row_steps.py",
        "step.decide(value if rows is None else rows[i])",
        "step.decide(value if rows is None else rows[0])",
        "a request computes when another one of the batch has to",
        ("tests/runtime/batch/test_rows.py::test_a_rule_is_asked_for_each_row",),
    ),
    Mutant(
        "mixed-rows-not-seen",
        "runtime/batch/row_check.py",
        "if not _near(few[place], many[row], tolerance):",
        "if False:",
        "a model that mixes rows gives other pictures in a batch of requests",
        ("tests/runtime/batch/test_refusals.py::test_models_that_cannot_be_split",),
    ),
)
