"""Mutants of runtime: what a step caches, and which step of which generation a call is."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "callers-inputs-cached",
        "runtime/step.py",
        "return tensor.copy() if tensor.key in foreign else tensor",
        "return tensor",
        "a sampler that changes its sample in place changes what is cached",
        ("tests/capture/test_edges.py::test_the_caller_may_change_its_inputs_afterwards",),
    ),
    Mutant(
        "cached-tensors-given-away",
        "runtime/step.py",
        "return [t.clone() if storage_key(t) in own else t for t in outputs]",
        "return list(outputs)",
        "a caller that changes the result in place changes what is cached",
        ("tests/capture/test_edges.py::test_the_caller_may_change_the_result",),
    ),
    Mutant(
        "changed-tensors-used",
        "runtime/step.py",
        " and all(map(CachedTensor.untouched, branch.cached))",
        "",
        "a cached tensor that a model has changed in place is reused",
        ("tests/runtime/test_step.py::test_a_held_tensor_that_was_changed_in_place_is_not_used",),
    ),
    Mutant(
        "missed-computed-step-ignored",
        "runtime/step.py",
        "missing = not whole or bool(unseen)",
        "missing = not whole",
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
        "NewtonCache follows a wrong parabola where a sampler evaluates a step twice",
        ("tests/runtime/test_step.py::test_a_second_evaluation_of_a_step_counts_once",),
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
        "rule-goes-on-when-asked-again",
        "runtime/step.py",
        "        self._state = self._branch.rule_state\n        if self._state is None:\n",
        "        if self._state is None:\n",
        "a step whose first graph does not compile is reused against the rule",
        (
            "tests/runtime/test_step.py::"
            "test_a_rule_that_is_asked_twice_for_one_step_gives_one_answer",
        ),
    ),
    Mutant(
        "masked-sizes-not-told-apart",
        "runtime/call_log.py",
        "if placed.branch.shapes != shapes:",
        "if False:",
        "a prompt of another length gets the state of the one before",
        (
            "tests/capture/test_edges.py::"
            "test_in_a_cache_context_too_a_mask_of_another_length_computes",
        ),
    ),
    Mutant(
        "backwards-is-onwards",
        "runtime/tracking/timestep_value.py",
        "return way if way in allowed else None",
        "return way",
        "the next picture goes on with the state of the one before",
        (
            "tests/runtime/test_evidence.py::"
            "test_a_timestep_that_moves_back_begins_anew_whatever_the_sample_says",
            "tests/test_lifecycle.py::test_cur_timestep_that_goes_back_starts_a_generation",
        ),
    ),
    Mutant(
        "same-timestep-is-same-step",
        "runtime/tracking/generation.py",
        "if way == 0 and (explicit or branch not in self.called):",
        "if way == 0:",
        "a sampler that evaluates a timestep twice falls behind its schedule",
        (
            "tests/runtime/test_branches.py::"
            "test_a_second_evaluation_of_a_timestep_is_the_next_step",
        ),
    ),
    Mutant(
        "state-not-dropped-at-the-last-step",
        "runtime/tracking/placement.py",
        "return None if generation.over(position) else (position, generation)",
        "return position, generation",
        "a run that starts lower than the last one ended goes on with its state",
        ("tests/runtime/test_evidence.py::test_an_eleventh_step_of_ten_is_another_generation",),
    ),
    Mutant(
        "jumps-are-steps",
        "runtime/tracking/generation.py",
        "if self.move == 0 or move <= DOUBTFUL_MOVE * self.move:",
        "if True:",
        "a run of its own that starts lower goes on with the state of another one",
        ("tests/runtime/test_evidence.py::test_a_timestep_that_jumps_computes",),
    ),
    Mutant(
        "rounded-moves-are-jumps",
        "runtime/tracking/generation.py",
        "slack = 2 * rounding(as_number(value))",
        "slack = 0.0",
        "timesteps in bfloat16 compute where they round up",
        (
            "tests/runtime/test_evidence.py::"
            "test_rounded_timesteps_do_not_jump_where_samples_tell_nothing",
        ),
    ),
    Mutant(
        "image-to-image-starts-at-the-first-timestep",
        "runtime/tracking/step_count.py",
        "at = place_of(told, value) or 0",
        "at = 0",
        "a run that leaves out the first timesteps computes the wrong steps",
        ("tests/capture/test_timesteps.py::test_a_run_that_leaves_out_the_first_ones",),
    ),
    Mutant(
        "samples-not-compared",
        "runtime/tracking/trajectory.py",
        "        if change is not None:\n            verdicts",
        "        if False:\n            verdicts",
        "two requests with one prompt are answered from each other",
        (
            "tests/runtime/test_evidence.py::"
            "test_requests_with_one_prompt_in_turn_are_told_apart_by_their_samples",
        ),
    ),
    Mutant(
        "unlike-samples-not-noticed",
        "runtime/tracking/trajectory.py",
        "if change <= far and not unlike:",
        "if change <= far:",
        "a request is answered from another one whose last steps were long",
        ("tests/runtime/test_evidence.py::test_a_sample_unlike_the_one_before_is_of_elsewhere",),
    ),
    Mutant(
        "alike-samples-continue",
        "runtime/tracking/trajectory.py",
        "return Verdict.DOUBTFUL if sample.grown_from",
        "return Verdict.CONTINUES if sample.grown_from",
        "a variation of a picture is answered from another one",
        ("tests/runtime/test_evidence.py::test_another_sample_of_the_same_picture_computes",),
    ),
    Mutant(
        "late-branch-is-of-the-newest-generation",
        "runtime/tracking/placement.py",
        "own = [b for b in session.branches if b.context[:-1] == call.context[:-1]]",
        "own = session.branches",
        "guidance that starts late counts the steps of another request",
        (
            "tests/runtime/test_late_branches.py::"
            "test_guidance_behind_the_first_step_of_requests_told_by_contexts",
        ),
    ),
    Mutant(
        "another-run-not-noticed",
        "runtime/tracking/step_count.py",
        "if course.learnt and course.timesteps[:2] != values:",
        "if False:",
        "a run of other timesteps is placed by those of the run before",
        (
            "tests/capture/test_timesteps.py::"
            "test_those_of_a_longer_run_are_not_taken_for_a_shorter_one",
        ),
    ),
)
