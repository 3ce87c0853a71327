"""The scenarios that were tried: where each was reported, what went wrong there, its test here.

`python -m tests.scenarios.page` runs their tests and writes `docs/scenarios.md`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = "own"


@dataclass(frozen=True)
class Scenario:
    """One way of using a step cache that went wrong somewhere.

    `source`: a thread as `owner/repository#number`, or "own" where it was found by trying.
    `elsewhere`: what happened there, `here`: what happens with this library if `test` passes.
    `test`: a pytest node id below `tests/`.
    """

    title: str
    source: str
    elsewhere: str
    here: str
    test: str

    @property
    def node(self) -> str:
        """The node id from the repository's root."""
        return f"tests/{self.test}"

    @property
    def link(self) -> str:
        """The source, as Markdown."""
        if self.source == OWN:
            return OWN
        repository, number = self.source.split("#")
        return f"[{self.source}](https://github.com/{repository}/issues/{number})"

    @property
    def exists(self) -> bool:
        """Whether its test is there. Reads the file; nothing is imported."""
        path, _, name = self.node.partition("::")
        file = ROOT / path
        return file.is_file() and name.partition("[")[0] in _functions(file)


def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


CALLERS = (
    Scenario(
        "Requests take turns on one model, step by step",
        "vllm-project/vllm-omni#3775",
        "step execution and continuous batching run without a cache only",
        "with a session each, every request gets what it gets alone",
        "runtime/test_sessions.py::test_requests_in_turn_get_what_they_get_alone",
    ),
    Scenario(
        "Requests with one prompt take turns, without sessions",
        OWN,
        "each gets the other's picture",
        "told apart by their samples",
        "runtime/test_evidence.py::test_requests_with_one_prompt_in_turn_are_told_apart_by_their_samples",
    ),
    Scenario(
        "A server warms up with one step and never says how many steps follow",
        "vllm-project/vllm-omni#7335",
        "the cache believes the run to be over: as slow as none",
        "computes and reuses the same steps as without the warm-up",
        "scenarios/test_callers.py::test_runs_behind_a_warm_up_of_one_step_are_cached_as_ever",
    ),
    Scenario(
        "The number of steps changes from request to request",
        "vipshop/cache-dit#540",
        "the number has to be given beforehand, and counters are wrong where it differs",
        "one `apply` serves runs of any length",
        "strategies/test_schedule.py::test_one_apply_serves_runs_of_any_length",
    ),
    Scenario(
        "The number of steps is only known when the pipeline runs",
        "sgl-project/sglang#17140",
        "the first request's number stays in force",
        "a function is asked once a generation",
        "strategies/test_schedule.py::test_the_number_of_steps_from_a_function_once_a_generation",
    ),
    Scenario(
        "The same graph is queued again with another seed or prompt",
        "Icyoung/ComfyUI-MiniMaxH3-TeaCache#1",
        "the step counter is spent: the second run is not cached, and nothing says so",
        "the second run computes as many blocks as the first",
        "runtime/test_counts.py::test_a_second_generation_runs_as_many_blocks_as_the_first",
    ),
    Scenario(
        "Another prompt or picture after the first run",
        "kijai/ComfyUI-KJNodes#344",
        "noise, in which the first run's picture is seen",
        "bit by bit what a fresh cache gives",
        "capture/test_edges.py::test_two_generations_with_two_prompts[FluxTransformer2DModel]",
    ),
    Scenario(
        "An editing model looks at its source picture once before the steps",
        "vllm-project/vllm-omni#1858",
        "stale states unless a refresh is hinted at for this model",
        "the first step computes, and the schedule counts from there",
        "scenarios/test_callers.py::test_a_call_on_a_given_picture_before_the_steps",
    ),
    Scenario(
        "Text alone after text and image, and back",
        "vllm-project/vllm-omni#2240",
        "the first request behind the warm-up fails: another length",
        "each has a graph and a state",
        "capture/test_edges.py::test_image_to_video_and_text_to_video_generations_alternate",
    ),
    Scenario(
        "A run is cancelled, then the next one starts",
        "lldacing/ComfyUI_Patches_ll#7",
        "does not work again before a restart",
        "the next run starts by computing",
        "pipelines/test_broken_off.py::test_an_interrupted_generation_leaves_nothing_stale",
    ),
    Scenario(
        "A run is broken off, then one with the same prompt starts lower",
        OWN,
        "goes on from the other run's state",
        "its sample does not go on from the one before: it starts by computing",
        "runtime/test_evidence.py::test_a_run_broken_off_then_one_that_starts_lower",
    ),
    Scenario(
        "An exception in the middle of a step",
        OWN,
        "counters are ahead of the sampler",
        "the failed call leaves no trace, and may be made again",
        "capture/test_edges.py::test_a_failed_call_can_be_made_again",
    ),
    Scenario(
        "Steps with gradients on in the middle of a run",
        OWN,
        "they are not counted, and older state is used behind them",
        "they count; where a computed step was missed, the next call computes",
        "runtime/test_evidence.py::test_steps_that_ran_uncached_count",
    ),
    Scenario(
        "Switched off and on within a run",
        OWN,
        "goes on from state of before",
        "starts by computing",
        "test_lifecycle.py::test_enabled_again_in_the_middle_of_a_generation_starts_by_computing",
    ),
    Scenario(
        "Contexts are entered while the cache is off, then it is switched on",
        "huggingface/diffusers#14037",
        "`ValueError: No context is set`",
        "caches as ever",
        "scenarios/test_callers.py::test_contexts_that_were_entered_while_it_was_disabled",
    ),
    Scenario(
        "A pipeline that enters no cache context",
        "huggingface/diffusers#12012",
        "`ValueError: No context is set`",
        "branches are told by their conditioning",
        "runtime/test_branches.py::test_interleaved_branches_have_states_of_their_own"
        "[WanTransformer3DModel]",
    ),
    Scenario(
        "Threads share one pipeline's transformer",
        "QwenLM/Qwen-Image#236",
        "steps of both are counted together",
        "each thread gets what it gets alone",
        "runtime/test_threads.py::test_each_thread_gets_what_it_gets_alone",
    ),
    Scenario(
        "Another thread compiles while one is served",
        OWN,
        "a flag of the whole process sends the call to another state",
        "the thread is served as ever",
        "runtime/test_threads.py::test_a_thread_is_served_while_another_one_compiles",
    ),
)

BRANCHES = (
    Scenario(
        "Positive and negative branch in two calls of a step",
        "sgl-project/sglang#35054",
        "reset twice in the first step, so that the schedule is shifted",
        "both share the step; they may change places",
        "runtime/test_branches.py::test_branches_change_places_between_steps_and_keep_their_state",
    ),
    Scenario(
        "Both branches in one call or in two, as memory allows",
        "chengzeyi/Comfy-WaveSpeed#57",
        "the branches' residuals are compared with each other, and pictures are a mess",
        "a state for each form of the call; what missed a computed step is not used",
        "scenarios/test_callers.py::test_both_branches_in_one_call_or_in_two_as_memory_allows",
    ),
    Scenario(
        "The first step has no guidance",
        "kijai/ComfyUI-KJNodes#262",
        "the reset does not trigger, and the run uses the last one's state",
        "guidance may start, skip steps and stop",
        "runtime/test_branches.py::test_guidance_that_starts_late_skips_steps_or_stops",
    ),
    Scenario(
        "Guidance ends within the run, embeddings made anew in each call",
        OWN,
        "the branch that goes on is answered from the one that ended",
        "the branch is told by its values",
        "runtime/test_evidence.py::test_guidance_that_ends_with_conditioning_made_anew_in_each_call",
    ),
    Scenario(
        "A callback of the pipeline switches guidance off",
        OWN,
        "batch and branches change within the run",
        "computes where nothing is held",
        "pipelines/test_extra_inputs.py::test_guidance_that_a_callback_switches_off",
    ),
    Scenario(
        "Three branches of which one is left out",
        "MeiGen-AI/InfiniteTalk#87",
        "branches are counted by threes, so calls meet another branch's state",
        "each branch is known by its conditioning",
        "scenarios/test_callers.py::test_three_branches_of_which_one_is_left_out_later",
    ),
    Scenario(
        "The model joins its branches itself",
        "vllm-project/vllm-omni#4660",
        "the cached path leaves guidance out: washed-out pictures without a warning",
        "the code around the blocks stays in the graph",
        "scenarios/test_callers.py::test_guidance_inside_of_the_models_own_forward",
    ),
    Scenario(
        "Guidance that skips layers of one branch",
        "kijai/ComfyUI-WanVideoWrapper#640",
        "asked for",
        "bit by bit what is done by hand",
        "pipelines/test_extra_inputs.py::test_sd3_guidance_that_skips_layers",
    ),
    Scenario(
        "Windows of a long video in each step",
        "kijai/ComfyUI-WanVideoWrapper#134",
        "the cache takes windows for steps and skips everything",
        "windows are known again by their samples",
        "runtime/test_evidence.py::test_windows_of_one_picture_are_known_again_by_their_samples",
    ),
    Scenario(
        "Tiles that nothing tells apart",
        OWN,
        "each is answered from another one",
        "computed, and one warning says why",
        "runtime/test_evidence.py::test_windows_that_nothing_tells_apart_compute_with_one_warning",
    ),
)

SAMPLERS = (
    Scenario(
        "A second sampler starts lower on the enlarged picture",
        "welltop-cn/ComfyUI-TeaCache#17",
        "`The size of tensor a (15808) must match the size of tensor b (3952)`",
        "starts by computing, and the next run too",
        "scenarios/test_callers.py::test_a_second_sampler_that_starts_lower_at_twice_the_size",
    ),
    Scenario(
        "Image to image with the same transformer",
        OWN,
        "starts within the steps of the run before",
        "starts by computing",
        "pipelines/test_extra_inputs.py"
        "::test_text_to_image_and_image_to_image_with_one_transformer",
    ),
    Scenario(
        "Inpainting puts the given picture back after each step",
        OWN,
        "only a part of the sample goes on from the step before",
        "cached as ever",
        "scenarios/test_callers.py::test_inpainting_puts_the_given_picture_back_after_each_step",
    ),
    Scenario(
        "Another resolution, and back",
        "welltop-cn/ComfyUI-TeaCache#8",
        "`The size of tensor a must match the size of tensor b` until a restart",
        "a state for each size",
        "capture/test_edges.py::test_a_generation_at_another_resolution_and_back",
    ),
    Scenario(
        "A batch of several pictures that changes within the run",
        "Comfy-Org/ComfyUI#10344",
        "sizes of the batch do not match",
        "the other batch starts by computing",
        "scenarios/test_callers.py::test_a_batch_from_which_a_picture_is_dropped_in_the_middle",
    ),
    Scenario(
        "Video in chunks, with a timestep for each frame",
        OWN,
        "the next chunk goes on from the last one's state",
        "any element that moves back begins a generation",
        "runtime/test_evidence.py::test_any_element_of_a_timestep_that_moves_back_is_another_generation",
    ),
    Scenario(
        "Timesteps in bfloat16: neighbours are one number",
        "modelscope/DiffSynth-Studio#562",
        "988.49 and 987.17 are both 988",
        "a timestep again from the same branch is the next step",
        "runtime/test_evidence.py::test_timesteps_that_round_to_one_value_are_steps",
    ),
    Scenario(
        "A scheduler cuts its timesteps to whole numbers",
        "huggingface/diffusers#14718",
        "998 nine times in a row",
        "every call is counted",
        "scenarios/test_callers.py::test_timesteps_that_a_scheduler_has_cut_to_whole_numbers",
    ),
    Scenario(
        "A sampler that evaluates each timestep twice (Heun, PNDM's start)",
        OWN,
        "the second evaluation is taken for the other branch",
        "it is the next step",
        "runtime/test_evidence.py::test_a_sampler_that_evaluates_timesteps_twice",
    ),
    Scenario(
        "Distilled models of four steps",
        "welltop-cn/ComfyUI-TeaCache#79",
        "no effect",
        "presets compute the first and the last step",
        "scenarios/test_callers.py::test_runs_of_four_steps",
    ),
    Scenario(
        "Two transformers for one run (Wan2.2)",
        "kijai/ComfyUI-KJNodes#371",
        "never resets: behind the first run every step is skipped",
        "each expert computes where the run reaches it",
        "scenarios/test_two_experts.py"
        "::test_each_expert_starts_with_nothing_where_the_run_reaches_it",
    ),
    Scenario(
        "The first step behind the warm-up",
        "huggingface/diffusers#13806",
        "off by one: predicted where it should be computed",
        "computed steps are those listed",
        "runtime/test_counts.py::test_each_cached_block_runs_once_for_each_computed_step",
    ),
)

MODELS = (
    Scenario(
        "ControlNet residuals",
        "vipshop/cache-dit#482",
        "ControlNet has no effect any more",
        "bit by bit what is done by hand",
        "pipelines/test_extra_inputs.py::test_flux_controlnet",
    ),
    Scenario(
        "Hints that are added between the blocks and change with the step",
        "vllm-project/vllm-omni#5079",
        "residuals with stale hints: the video deviates from its source",
        "other values are other conditioning; in a context they compute first",
        "capture/test_edges.py::test_residuals_between_blocks_that_change_every_step",
    ),
    Scenario(
        "LoRA strength given with each call",
        OWN,
        "lost behind the first call",
        "the strength is that of the call",
        "capture/test_surroundings.py::test_the_strength_of_lora_is_that_of_the_call",
    ),
    Scenario(
        "LoRA loaded, switched and removed between runs",
        "Haoming02/sd-webui-forge-classic#795",
        "the compiled graph keeps the first one's effect",
        "takes effect at once",
        "pipelines/test_combinations.py::test_lora_loaded_switched_fused_and_unloaded",
    ),
    Scenario(
        "Blocks that overwrite their input",
        "sgl-project/sglang#33827",
        "the first block's residual is 0/0: never a hit, silently",
        "decides as for blocks that do not",
        "scenarios/test_callers.py::test_a_rule_on_blocks_that_overwrite_their_input",
    ),
    Scenario(
        "A signal that is no number once",
        "ddalcu/mlx-serve#170",
        "the comparison with NaN is false for ever: no step is skipped any more",
        "computes, and the rule recovers",
        "capture/test_no_number.py::test_eagerly",
    ),
    Scenario(
        "Autocast within the model's forward",
        OWN,
        "blocks run in float32 on computed steps",
        "is part of the graph",
        "capture/test_surroundings.py::test_autocast_that_forward_enters",
    ),
    Scenario(
        "Autocast on and off",
        "pytorch/pytorch#181564",
        "a graph of one autocast dtype serves another one",
        "a graph for each",
        "capture/test_edges.py::test_autocast_on_and_off",
    ),
    Scenario(
        "Quantised weights",
        "vipshop/cache-dit#109",
        "asked for",
        "blocks stay the user's modules",
        "pipelines/test_combinations.py::test_a_change_of_the_model_takes_effect"
        "[int8 weights-before]",
    ),
    Scenario(
        "Offloading to the CPU",
        "vllm-project/vllm-omni#1710",
        "cannot be used together",
        "before `apply` or behind it",
        "pipelines/test_offload.py::test_offloading[model-before-SD3]",
    ),
    Scenario(
        "`pipe.from_pipe()` with a cached transformer",
        OWN,
        "refused for the transformer's type",
        "both pipelines are cached",
        "pipelines/test_from_pipe.py::test_back_again_and_another_family",
    ),
    Scenario(
        "A forward that another tool has put on the model",
        OWN,
        "fails, or is bypassed",
        "captured as it is",
        "capture/test_patched_forward.py::test_each_way_to_put_a_forward_on_a_model",
    ),
    Scenario(
        "A forward that counts its own calls (a TeaCache patch)",
        OWN,
        "two caches on one model: the count of the first call stays",
        "refused by name",
        "capture/test_side_effects.py::test_a_forward_with_a_cache_of_its_own_is_refused",
    ),
    Scenario(
        "The caller changes a result in place",
        OWN,
        "what is held changes too",
        "is held apart",
        "capture/test_edges.py::test_the_caller_may_change_the_result",
    ),
    Scenario(
        "Copies of a cached model",
        OWN,
        "the copy runs the original's blocks",
        "works by itself: deep copy, shallow copy, pickle",
        "test_cached_model.py::test_a_copy_keeps_what_was_set",
    ),
    Scenario(
        "What is held behind a run",
        "huggingface/diffusers#13467",
        "a hidden state for each hooked layer stays on the device until the next run",
        "freed with the session",
        "runtime/test_sessions.py::test_what_a_session_holds_is_freed_when_it_is_closed_or_dropped",
    ),
)

COMPILING = (
    Scenario(
        "`torch.compile` of the cached model",
        "vipshop/cache-dit#76",
        "graph breaks, slower than without",
        "one graph, no break",
        "compile/test_models.py::test_one_graph_of_several_blocks[deepcache-eager]",
    ),
    Scenario(
        "Compiled before its first call",
        "kijai/ComfyUI-KJNodes#282",
        "`'OptimizedModule' object has no attribute 'teacache_state'`",
        "with and without an eager call before",
        "compile/test_calls.py::test_with_and_without_an_eager_call_before",
    ),
    Scenario(
        "Other weights in a compiled model",
        "kijai/ComfyUI-KJNodes#131",
        "recompiles with each LoRA until the limit, then runs uncompiled",
        "other weights need no other graph",
        "compile/test_changes.py::test_other_weights_need_no_other_graph",
    ),
    Scenario(
        "Each kind of step compiled",
        OWN,
        "held tensors of other strides compile the graph again",
        "compiled once",
        "compile/test_strides.py::test_compiled_steps_are_compiled_once",
    ),
)

SEVERAL = (
    Scenario(
        "Requests at different steps in one batch",
        "vllm-project/vllm-omni#3775",
        "step execution and continuous batching run without a cache only",
        "each row gets what it gets alone",
        "runtime/batch/test_backend.py::test_rows_get_what_they_get_alone",
    ),
    Scenario(
        "Ranks that decide by their own part of the data",
        "vllm-project/vllm-omni#6180",
        "one rank computes, the other reuses: a deadlock in the next collective",
        "where one computes, all do",
        "distributed/test_apart.py::test_where_one_computes_all_do",
    ),
    Scenario(
        "A sequence split over devices (context parallelism)",
        "vipshop/cache-dit#457",
        "errors, or each rank with a cache of its own",
        "equal to one process; each rank holds its part",
        "distributed/test_diffusers.py::test_context_parallelism",
    ),
    Scenario(
        "A guidance pass that perturbs the model by hooks, with the arguments of another pass",
        OWN,
        "both passes share one state",
        "a branch of its own",
        "pipelines/test_modular.py::test_each_pass_of_a_guider_has_a_state_of_its_own",
    ),
    Scenario(
        "Wan2.2: two experts, the second from the middle of the run on",
        OWN,
        "each counts its own steps, and a preset is laid out for the wrong number",
        "one plan for the run",
        "pipelines/test_experts.py::test_the_plan_is_the_runs",
    ),
)

SECTIONS = {
    "Who calls, and when": CALLERS,
    "Branches, windows, tiles": BRANCHES,
    "Samplers, sizes, runs of several stages": SAMPLERS,
    "Models and what surrounds their blocks": MODELS,
    "Compiling": COMPILING,
    "Batches, devices, several models": SEVERAL,
}
SCENARIOS = tuple(scenario for section in SECTIONS.values() for scenario in section)
