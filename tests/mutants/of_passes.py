"""Mutants of passes and ir: what is cached, what runs, and on which side."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = (
    Mutant(
        "blocks-that-always-run-are-cached",
        "passes/select_runs.py",
        "if named or strategy.always_runs(position, len(calls)):",
        "if named:",
        "the blocks that a rule looks at are the ones of an old step",
        ("tests/strategies/test_rules.py::test_the_first_and_the_last_blocks_run_on_every_step",),
    ),
    Mutant(
        "named-blocks-are-cached",
        "passes/select_runs.py",
        "if named or strategy.always_runs(position, len(calls)):",
        "if strategy.always_runs(position, len(calls)):",
        "blocks that the user has excluded are reused",
        ("tests/passes/test_golden.py::Golden::test_select_runs",),
    ),
    Mutant(
        "live-out-dropped",
        "passes/find_values.py",
        "new = [v for v in self.values if v in reached and v not in run_inputs]",
        "new = [v for v in self.values if v in reached and not run_inputs][:1]",
        "of two values that leave a run only one is cached",
        ("tests/runtime/test_memory.py::test_what_leaves_each_of_several_runs_is_held",),
    ),
    Mutant(
        "parts-of-a-stream-start-nowhere",
        "passes/find_values.py",
        "if len(found) == len(parts) and all(found.values()):",
        "if False:",
        "the residual of the picture's part of a joined stream is cached as a whole value",
        ("tests/passes/test_golden.py::test_a_slice_of_a_joined_stream_starts_from_its_part",),
    ),
    Mutant(
        "part-of-a-part-taken-whole",
        "passes/forward_slices.py",
        "begin + size == min(end, sum(sizes)) and",
        "True and",
        "a slice of the first rows of a stream gets all of them",
        ("tests/passes/test_golden.py::test_forward_slices_takes_whole_parts_only",),
    ),
    Mutant(
        "steps-of-a-slice-ignored",
        "passes/forward_slices.py",
        "or source.target is not _CAT or step != 1:",
        "or source.target is not _CAT:",
        "every other row of a stream becomes all rows",
        ("tests/passes/test_golden.py::test_forward_slices_leaves_every_other_row",),
    ),
    Mutant(
        "random-values-folded",
        "passes/fold_constants.py",
        "if spec is None or torch.Tag.nondeterministic_seeded in operator.tags:",
        "if spec is None:",
        "the same random numbers are used on every step",
        ("tests/passes/test_fold_constants.py::test_random_values_are_not_folded",),
    ),
    Mutant(
        "returned-constants-folded",
        "ir/nodes.py",
        "if is_view(user) and is_exposed(user):",
        "if False:",
        "who changes a result in place changes all later steps",
        ("tests/passes/test_fold_constants.py::test_what_the_caller_gets_is_its_own",),
    ),
    Mutant(
        "places-that-depend-on-data-taken",
        "passes/forward_slices.py",
        "and _fixed(parts[:i]):",
        "and True:",
        "behind a prompt of another length the wrong rows are the picture",
        (
            "tests/passes/test_golden.py::"
            "test_forward_slices_leaves_a_part_whose_place_depends_on_data",
        ),
    ),
    Mutant(
        "shared-prologue-sunk",
        "passes/sink.py",
        "if all(user in moved or _only_operand(node, user) for user in node.users):",
        "if any(user in moved or _only_operand(node, user) for user in node.users):",
        "what the output layer reads is made on computed steps only",
        (
            "tests/runtime/test_counts.py::"
            "test_a_computed_step_runs_each_layer_as_often_as_the_model",
        ),
    ),
    Mutant(
        "signals-are-dead-code",
        "passes/dead_code.py",
        "graph.eliminate_dead_code(is_kept)",
        "graph.eliminate_dead_code(lambda node: node.op in ('placeholder', 'output'))",
        "a rule decides by nothing",
        ("tests/strategies/test_protocol.py::test_the_residual_of_the_first_blocks",),
    ),
    Mutant(
        "passes-not-verified",
        "passes/manager.py",
        "        verify(program)\n",
        "",
        "a pass of one's own that breaks the graph gives a broken picture instead of an error",
        ("tests/ir/test_verify.py::test_an_error_in_a_pass_says_which",),
    ),
    Mutant(
        "in-place-operators-pass",
        "ir/verify.py",
        "if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:",
        "if False:",
        "a graph changes what is cached, or the caller's tensors",
        ("tests/ir/test_verify.py::test_an_in_place_operator_is_refused",),
    ),
    Mutant(
        "reserved-names-collide",
        "ir/names.py",
        'return f"model_{name}" if is_reserved(name) else name',
        "return name",
        "an argument that is called `distance` gets the number of steps",
        ("tests/capture/test_argument_names.py::test_any_name_eagerly",),
    ),
    Mutant(
        "constants-shared-by-name",
        "ir/graph_module.py",
        "while name in attributes and attributes[name] is not value:",
        "while False:",
        "a graph made of two reads the constant of the one in both",
        (
            "tests/strategies/test_own_strategies.py::"
            "test_constants_of_each_function_and_run_are_its_own",
        ),
    ),
    Mutant(
        "text-taken-for-the-image",
        "ir/streams.py",
        "if wired is not None and tracked is not None and wired != tracked:",
        "if False:",
        "the text of a reused step is the image's stream and a residual",
        (
            "tests/test_parity.py::"
            "test_teacache_does_not_take_text_of_the_images_shape_for_the_image",
        ),
    ),
    Mutant(
        "stream-padded-at-the-wrong-end",
        "ir/streams.py",
        "+ [begin, after]",
        "+ [after, begin]",
        "the residual of image and text is set against the image's rows in the text's places",
        (
            "tests/ir/test_streams.py::"
            "test_a_residual_of_joined_rows_has_the_stream_in_its_own_rows",
        ),
    ),
    Mutant(
        "not-held-for-another-run",
        "passes/find_values.py",
        "[*_always(program, cached), *_handed_over(program)]",
        "_always(program, cached)",
        "a block that another run reads of runs twice, and on reused steps too",
        ("tests/passes/test_handed_over.py::test_each_block_runs_on_computed_steps_alone",),
    ),
)
