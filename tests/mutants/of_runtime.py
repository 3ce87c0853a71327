"""Mutants of `runtime`: a step, a branch or a generation is taken for another one."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    # --- what is held ---
    Mutant(
        "callers-inputs-held",
        "runtime/step.py",
        "return held.copy() if held.key in foreign else held",
        "return held",
        "a sampler that changes its sample in place changes what is held",
        ("tests/capture/test_edges.py::test_the_caller_may_change_its_inputs_afterwards",),
    ),
    Mutant(
        "what-is-held-given-away",
        "runtime/step.py",
        "return [t.clone() if storage_key(t) in own else t for t in outputs]",
        "return list(outputs)",
        "a caller that changes the result in place changes what is held",
        ("tests/capture/test_edges.py::test_the_caller_may_change_the_result",),
    ),
    Mutant(
        "changed-tensors-used",
        "runtime/step.py",
        "or not all(h.untouched() for h in branch.held)",
        "or False",
        "a held tensor that a model has changed in place is reused",
        ("tests/runtime/test_step.py::test_a_held_tensor_that_was_changed_in_place_is_not_used",),
    ),
    Mutant(
        "missed-computed-step-ignored",
        "runtime/step.py",
        "missing = missing or not seen",
        "pass",
        "a branch that was left out on a computed step reuses what is older than planned",
        (
            "tests/runtime/test_evidence.py::"
            "test_state_from_before_a_computed_step_that_was_missed_is_not_used",
        ),
    ),
    Mutant(
        "second-evaluation-counts-twice",
        "runtime/step.py",
        "again = self._computed > 0 and branch.last_computed == self.index",
        "again = False",
        "the slopes of TaylorCache go wrong where a step is evaluated twice",
        (
            "tests/strategies/test_corrector.py::"
            "test_a_second_evaluation_of_a_step_keeps_the_correction",
        ),
    ),
    Mutant(
        "distance-not-used",
        "runtime/step.py",
        '"distance": lambda: self._course.distance(self._last, self.index),',
        '"distance": lambda: 1.0 if self._computed else 0.0,',
        "every prediction is for the step behind the computed one",
        ("tests/test_parity.py::test_taylorcache_over_the_published_schedule",),
    ),
    Mutant(
        "reach-not-noted",
        "runtime/step.py",
        "            branch.reach = self._course.distance(self._last, self.index)\n",
        "            branch.reach = 1.0\n",
        "NewtonCache follows a wrong parabola where gaps differ",
        ("tests/strategies/test_predictors.py::test_newton_in_a_cached_model_and_in_a_program",),
    ),
    Mutant(
        "masked-sizes-not-told-apart",
        "runtime/call_log.py",
        "if placed.branch.shapes != shapes:",
        "if False:",
        "a prompt of another length gets the state of the one before",
        (
            "tests/capture/test_edges.py::"
            "test_mask_length_that_changes_within_a_generation_is_never_answered_with_the_old_state",
        ),
    ),
    # --- which generation and step ---
    Mutant(
        "backwards-is-onwards",
        "runtime/generation.py",
        "return way if way in allowed else None",
        "return way",
        "the next picture goes on with the state of the one before",
        ("tests/capture/test_edges.py::test_two_generations_with_two_prompts",),
    ),
    Mutant(
        "same-timestep-is-same-step",
        "runtime/generation.py",
        "if way == 0 and (explicit or branch not in self.called):",
        "if way == 0:",
        "a sampler that evaluates a timestep twice falls behind its schedule",
        (
            "tests/runtime/test_branches.py::test_a_second_evaluation_of_a_timestep_is_the_next_step",
        ),
    ),
    Mutant(
        "state-not-dropped-at-the-last-step",
        "runtime/placement.py",
        "return None if generation.over(position) else (position, generation)",
        "return position, generation",
        "a run that starts lower than the last one ended goes on with its state",
        ("tests/runtime/test_evidence.py::test_an_eleventh_step_of_ten_is_another_generation",),
    ),
    Mutant(
        "jumps-are-steps",
        "runtime/generation.py",
        "if self.move == 0 or move <= DOUBTFUL_MOVE * self.move:",
        "if True:",
        "a run of its own that starts lower goes on with the state of another one",
        ("tests/runtime/test_evidence.py::test_a_timestep_that_jumps_computes",),
    ),
    Mutant(
        "rounded-moves-are-jumps",
        "runtime/generation.py",
        "slack = 2 * _rounding(as_number(value))",
        "slack = 0.0",
        "timesteps in bfloat16 compute where they round up",
        ("tests/runtime/test_evidence.py",),
    ),
    Mutant(
        "timesteps-of-another-run-learnt",
        "runtime/step_count.py",
        "if known is not None and known[0] == value and number in (None, len(known)):",
        "if known is not None and number in (None, len(known)):",
        "a run with another start is placed by the timesteps of the run before",
        (
            "tests/capture/test_timesteps.py::"
            "test_those_of_a_longer_run_are_not_taken_for_a_shorter_one",
        ),
    ),
    Mutant(
        "image-to-image-starts-at-the-first-timestep",
        "runtime/step_count.py",
        "at = place_of(told, value) or 0",
        "at = 0",
        "a run that leaves out the first timesteps computes the wrong steps",
        ("tests/capture/test_timesteps.py::test_a_run_that_leaves_out_the_first_ones",),
    ),
    # --- which branch ---
    Mutant(
        "conditioning-not-compared",
        "runtime/matching.py",
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
        "runtime/matching.py",
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
        "runtime/session.py",
        "if b.key == key and b.context == context]",
        "if b.key == key]",
        "the branches of guidance share one state",
        ("tests/runtime/test_branches.py::test_cache_context_wins_over_order_and_conditioning",),
    ),
    Mutant(
        "samples-not-compared",
        "runtime/trajectory.py",
        "if change is not None and self._elsewhere(value, change, sample):",
        "if False:",
        "two requests with one prompt are answered from each other",
        (
            "tests/runtime/test_evidence.py::"
            "test_requests_with_one_prompt_in_turn_are_told_apart_by_their_samples",
        ),
    ),
    Mutant(
        "state-of-another-graph-used",
        "runtime/placement.py",
        " or branch.serial != call.serial:",
        ":",
        "what a model has held on one side of a guard is used on the other side",
        (
            "tests/capture/test_capture.py::"
            "test_branches_on_both_sides_of_a_guard_have_states_of_their_own",
        ),
    ),
    Mutant(
        "branch-not-forgotten",
        "runtime/placement.py",
        "            other.forget()\n",
        "            pass\n",
        "the tensors of the picture before are held as long as the next one is made",
        (
            "tests/runtime/test_branches.py::"
            "test_the_next_generation_replaces_what_the_last_one_held",
        ),
    ),
    Mutant(
        "guidance-passes-not-told-apart",
        "runtime/hooked.py",
        "return hooked.wrapped, self._number(value, hooked)",
        "return ()",
        "the pass of guidance with skipped layers is taken for the plain one",
        ("tests/scenarios/test_callers.py",),
    ),
    Mutant(
        "model-changes-not-seen",
        "runtime/engine.py",
        "return step.computes and self.graphs.stale(entry)",
        "return False",
        "a layer that is replaced between two pictures has no effect",
        (
            "tests/test_cached_model.py::test_change_within_a_generation_takes_effect_at_the_next_computed_step",
        ),
    ),
    # --- threads ---
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
        "runtime/tracker.py",
        "self._own = threading.local()",
        "self._own = type('Own', (), {})()",
        "two requests in two threads are answered from each other",
        ("tests/runtime/test_sessions.py::test_threads_share_a_model_and_nothing_else",),
    ),
    # --- compilers that look on ---
    Mutant(
        "signatures-not-kept",
        "runtime/execution.py",
        "with signatures_kept():",
        "if True:",
        "a model of diffusers with two cached runs cannot be one compiled graph",
        ("tests/compile/test_signatures.py::test_two_runs_of_blocks_are_in_one_graph",),
    ),
    Mutant(
        "strides-not-made-alike",
        "runtime/execution.py",
        "return [*outputs, *(t.contiguous() for t in recorded)]",
        "return [*outputs, *recorded]",
        "compiled steps are compiled again",
        ("tests/compile/test_strides.py::test_compiled_steps_are_compiled_once",),
    ),
    # --- rows of several requests ---
    Mutant(
        "rows-of-both-kinds-together",
        "runtime/row_groups.py",
        "alike.setdefault((row.graph, row.kind, kind(row)), []).append(row)",
        "alike.setdefault((row.graph, row.kind), []).append(row)",
        "rows that are to compute reuse, as the first row of the batch does",
        ("tests/runtime/batch/test_rows.py::test_by_schedule",),
    ),
    Mutant(
        "rule-asked-for-the-first-row",
        "runtime/together.py",
        "step.decide(value if rows is None else rows[i])",
        "step.decide(value if rows is None else rows[0])",
        "a request computes when another one of the batch has to",
        ("tests/runtime/batch/test_rows.py::test_a_rule_is_asked_for_each_row",),
    ),
    Mutant(
        "mixed-rows-not-seen",
        "runtime/row_check.py",
        "if not _near(few[place], many[row], tolerance):",
        "if False:",
        "a model that mixes rows gives other pictures in a batch of requests",
        ("tests/runtime/batch/test_refusals.py::test_models_that_cannot_be_split",),
    ),
)
