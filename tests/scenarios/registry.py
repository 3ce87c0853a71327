"""Scenarios in which step caches go wrong: the report, the fault there, and the test here.

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
    """A use of a step cache that went wrong in some project.

    `source`: the thread as `owner/repository#number`, or "own" if it was found in this project.
    `elsewhere`: the fault there. `here`: the behavior of this library if `test` passes.
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
        "step execution and continuous batching work only without a cache",
        "with one session each, every request gets the same result as alone",
        "runtime/test_sessions.py::test_requests_in_turn_get_what_they_get_alone",
    ),
    Scenario(
        "Requests with one prompt take turns, without sessions",
        OWN,
        "each gets the image of the other",
        "distinguished by their samples",
        "runtime/test_evidence.py::test_requests_with_one_prompt_in_turn_are_told_apart_by_their_samples",
    ),
    Scenario(
        "A server warms up with one step and does not announce the number of steps",
        "vllm-project/vllm-omni#7335",
        "the cache assumes that the generation is over: no speedup",
        "computes and reuses the same steps as without the warm-up",
        "scenarios/test_callers.py::test_runs_behind_a_warm_up_of_one_step_are_cached_as_ever",
    ),
    Scenario(
        "The number of steps changes from request to request",
        "vipshop/cache-dit#540",
        "the number must be set in advance; another number breaks the counters",
        "one `apply` serves generations of any length",
        "strategies/test_schedule.py::test_one_apply_serves_runs_of_any_length",
    ),
    Scenario(
        "The number of steps is only known when the pipeline runs",
        "sgl-project/sglang#17140",
        "the number of the first request is used for all",
        "a function is called once per generation",
        "strategies/test_schedule.py::test_the_number_of_steps_from_a_function_once_a_generation",
    ),
    Scenario(
        "The same workflow is queued again with another seed or prompt",
        "Icyoung/ComfyUI-MiniMaxH3-TeaCache#1",
        "the step counter is used up: the second run is not cached, without a warning",
        "the second run computes as many blocks as the first",
        "runtime/test_counts.py::test_a_second_generation_runs_as_many_blocks_as_the_first",
    ),
    Scenario(
        "Another prompt or image after the first run",
        "kijai/ComfyUI-KJNodes#344",
        "noise that shows the image of the first run",
        "bitwise the result of a new cache",
        "capture/test_edges.py::test_two_generations_with_two_prompts[FluxTransformer2DModel]",
    ),
    Scenario(
        "An editing model reads its source image once before the steps",
        "vllm-project/vllm-omni#1858",
        "stale state, unless a refresh is configured for this model",
        "the first step computes, and the schedule counts from there",
        "scenarios/test_callers.py::test_a_call_on_a_given_picture_before_the_steps",
    ),
    Scenario(
        "Text only after text and image, and back",
        "vllm-project/vllm-omni#2240",
        "the first request after the warm-up fails: another length",
        "each has its own graph and state",
        "capture/test_edges.py::test_image_to_video_and_text_to_video_generations_alternate",
    ),
    Scenario(
        "A run is cancelled, then the next one starts",
        "lldacing/ComfyUI_Patches_ll#7",
        "fails until a restart",
        "the next run starts by computing",
        "pipelines/test_broken_off.py::test_an_interrupted_generation_leaves_nothing_stale",
    ),
    Scenario(
        "A run is interrupted; the next one, with the same prompt, starts at a lower timestep",
        OWN,
        "continues from the state of the first run",
        "its sample does not continue the last one, so it starts by computing",
        "runtime/test_evidence.py::test_a_run_broken_off_then_one_that_starts_lower",
    ),
    Scenario(
        "An exception in the middle of a step",
        OWN,
        "the counters run ahead of the sampler",
        "the failed call changes no state and can be repeated",
        "capture/test_edges.py::test_a_failed_call_can_be_made_again",
    ),
    Scenario(
        "Steps with gradients enabled in the middle of a run",
        OWN,
        "they are not counted, and older state is used after them",
        "they count; if a computed step was missed, the next call computes",
        "runtime/test_evidence.py::test_steps_that_ran_uncached_count",
    ),
    Scenario(
        "The cache is disabled and enabled within a run",
        OWN,
        "continues from old state",
        "starts by computing",
        "test_lifecycle.py::test_enabled_again_in_the_middle_of_a_generation_starts_by_computing",
    ),
    Scenario(
        "Cache contexts are entered while the cache is off, then it is enabled",
        "huggingface/diffusers#14037",
        "`ValueError: No context is set`",
        "caches as usual",
        "scenarios/test_callers.py::test_contexts_that_were_entered_while_it_was_disabled",
    ),
    Scenario(
        "A pipeline that enters no cache context",
        "huggingface/diffusers#12012",
        "`ValueError: No context is set`",
        "branches are identified by their conditioning",
        "runtime/test_branches.py::test_interleaved_branches_have_states_of_their_own"
        "[WanTransformer3DModel]",
    ),
    Scenario(
        "Threads share one pipeline's transformer",
        "QwenLM/Qwen-Image#236",
        "the steps of both threads are counted together",
        "each thread gets the same result as alone",
        "runtime/test_threads.py::test_each_thread_gets_what_it_gets_alone",
    ),
    Scenario(
        "One thread compiles while another is served",
        OWN,
        "a process-wide flag sends the call to another state",
        "the other thread is served as usual",
        "runtime/test_threads.py::test_a_thread_is_served_while_another_one_compiles",
    ),
)

BRANCHES = (
    Scenario(
        "Positive and negative branch in two calls per step",
        "sgl-project/sglang#35054",
        "two resets in the first step shift the schedule",
        "both calls share the step, in any order",
        "runtime/test_branches.py::test_branches_change_places_between_steps_and_keep_their_state",
    ),
    Scenario(
        "Both branches in one call or in two, depending on free memory",
        "chengzeyi/Comfy-WaveSpeed#57",
        "the residuals of both branches are compared with each other: broken images",
        "each form of the call has its own state; a state that missed a computed step is not used",
        "scenarios/test_callers.py::test_both_branches_in_one_call_or_in_two_as_memory_allows",
    ),
    Scenario(
        "The first step has no guidance",
        "kijai/ComfyUI-KJNodes#262",
        "no reset: the run uses the state of the last one",
        "guidance may start late, skip steps or stop",
        "runtime/test_branches.py::test_guidance_that_starts_late_skips_steps_or_stops",
    ),
    Scenario(
        "Guidance ends within the run, and embeddings are new tensors in each call",
        OWN,
        "the remaining branch gets the state of the one that ended",
        "the branch is identified by the values of its tensors",
        "runtime/test_evidence.py::test_guidance_that_ends_with_conditioning_made_anew_in_each_call",
    ),
    Scenario(
        "A pipeline callback switches guidance off",
        OWN,
        "batch size and branches change within the run",
        "computes if nothing is stored",
        "pipelines/test_extra_inputs.py::test_guidance_that_a_callback_switches_off",
    ),
    Scenario(
        "Three branches, one of which is left out",
        "MeiGen-AI/InfiniteTalk#87",
        "calls are counted in threes, so they get the state of another branch",
        "each branch is identified by its conditioning",
        "scenarios/test_callers.py::test_three_branches_of_which_one_is_left_out_later",
    ),
    Scenario(
        "The model combines its guidance branches itself",
        "vllm-project/vllm-omni#4660",
        "the cached path skips guidance: washed-out images without a warning",
        "the code around the blocks stays in the graph",
        "scenarios/test_callers.py::test_guidance_inside_of_the_models_own_forward",
    ),
    Scenario(
        "Guidance that skips layers of one branch",
        "kijai/ComfyUI-WanVideoWrapper#640",
        "not supported",
        "bitwise the result of a reference written by hand",
        "pipelines/test_extra_inputs.py::test_sd3_guidance_that_skips_layers",
    ),
    Scenario(
        "Several windows of a long video in each step",
        "kijai/ComfyUI-WanVideoWrapper#134",
        "the cache counts windows as steps and skips everything",
        "windows are identified by their samples",
        "runtime/test_evidence.py::test_windows_of_one_picture_are_known_again_by_their_samples",
    ),
    Scenario(
        "Tiles that cannot be distinguished",
        OWN,
        "each gets the state of another tile",
        "computed, with one warning that gives the reason",
        "runtime/test_evidence.py::test_windows_that_nothing_tells_apart_compute_with_one_warning",
    ),
)

SAMPLERS = (
    Scenario(
        "A second sampler starts at a lower timestep on the enlarged image",
        "welltop-cn/ComfyUI-TeaCache#17",
        "`The size of tensor a (15808) must match the size of tensor b (3952)`",
        "it starts by computing, and so does the next run",
        "scenarios/test_callers.py::test_a_second_sampler_that_starts_lower_at_twice_the_size",
    ),
    Scenario(
        "Image to image with the same transformer",
        OWN,
        "continues the steps of the previous run",
        "starts by computing",
        "pipelines/test_extra_inputs.py"
        "::test_text_to_image_and_image_to_image_with_one_transformer",
    ),
    Scenario(
        "Inpainting restores a part of the given image after each step",
        OWN,
        "only a part of the sample continues the previous step",
        "cached as usual",
        "scenarios/test_callers.py::test_inpainting_puts_the_given_picture_back_after_each_step",
    ),
    Scenario(
        "Another resolution, and back",
        "welltop-cn/ComfyUI-TeaCache#8",
        "`The size of tensor a must match the size of tensor b` until a restart",
        "each size has its own state",
        "capture/test_edges.py::test_a_generation_at_another_resolution_and_back",
    ),
    Scenario(
        "A batch of several images that changes within the run",
        "Comfy-Org/ComfyUI#10344",
        "batch sizes do not match",
        "the new batch size starts by computing",
        "scenarios/test_callers.py::test_a_batch_from_which_a_picture_is_dropped_in_the_middle",
    ),
    Scenario(
        "Video in chunks, with a timestep for each frame",
        OWN,
        "the next chunk continues from the state of the last one",
        "any element that moves back starts a new generation",
        "runtime/test_evidence.py::test_any_element_of_a_timestep_that_moves_back_is_another_generation",
    ),
    Scenario(
        "Timesteps in bfloat16: neighbors round to one number",
        "modelscope/DiffSynth-Studio#562",
        "988.49 and 987.17 are both 988",
        "the same timestep from the same branch is the next step",
        "runtime/test_evidence.py::test_timesteps_that_round_to_one_value_are_steps",
    ),
    Scenario(
        "A scheduler truncates its timesteps to integers",
        "huggingface/diffusers#14718",
        "998 nine times in a row",
        "every call counts as a step",
        "scenarios/test_callers.py::test_timesteps_that_a_scheduler_has_cut_to_whole_numbers",
    ),
    Scenario(
        "A sampler that evaluates each timestep twice (Heun, the first steps of PNDM)",
        OWN,
        "the second evaluation is mistaken for the other branch",
        "the second evaluation is the next step",
        "runtime/test_evidence.py::test_a_sampler_that_evaluates_timesteps_twice",
    ),
    Scenario(
        "Distilled models with four steps",
        "welltop-cn/ComfyUI-TeaCache#79",
        "no effect",
        "presets compute the first and the last step",
        "scenarios/test_callers.py::test_runs_of_four_steps",
    ),
    Scenario(
        "Two transformers for one run (Wan2.2)",
        "kijai/ComfyUI-KJNodes#371",
        "no reset: after the first run every step is skipped",
        "each expert starts by computing when the run reaches it",
        "scenarios/test_two_experts.py"
        "::test_each_expert_starts_with_nothing_where_the_run_reaches_it",
    ),
    Scenario(
        "The first step after the warm-up",
        "huggingface/diffusers#13806",
        "off by one: predicted instead of computed",
        "the listed steps are computed",
        "runtime/test_counts.py::test_each_cached_block_runs_once_for_each_computed_step",
    ),
)

MODELS = (
    Scenario(
        "ControlNet residuals",
        "vipshop/cache-dit#482",
        "ControlNet has no effect",
        "bitwise the result of a reference written by hand",
        "pipelines/test_extra_inputs.py::test_flux_controlnet",
    ),
    Scenario(
        "Hints that are added between the blocks and change with the step",
        "vllm-project/vllm-omni#5079",
        "residuals contain stale hints: the video deviates from its source",
        "other values are other conditioning and compute; in a cache context they may vary",
        "capture/test_edges.py::test_residuals_between_blocks_that_change_every_step",
    ),
    Scenario(
        "LoRA strength as an argument of each call",
        OWN,
        "lost after the first call",
        "each call uses its own strength",
        "capture/test_surroundings.py::test_the_strength_of_lora_is_that_of_the_call",
    ),
    Scenario(
        "LoRA loaded, switched and removed between runs",
        "Haoming02/sd-webui-forge-classic#795",
        "the compiled graph keeps the effect of the first LoRA",
        "takes effect at once",
        "pipelines/test_combinations.py::test_lora_loaded_switched_fused_and_unloaded",
    ),
    Scenario(
        "Blocks that overwrite their input",
        "sgl-project/sglang#33827",
        "the residual of the first block is 0/0: nothing is reused, without a warning",
        "the same decisions as for blocks that do not",
        "scenarios/test_callers.py::test_a_rule_on_blocks_that_overwrite_their_input",
    ),
    Scenario(
        "A signal that is NaN once",
        "ddalcu/mlx-serve#170",
        "the comparison with NaN stays false: no further step is skipped",
        "the step computes, and the rule recovers",
        "capture/test_no_number.py::test_eagerly",
    ),
    Scenario(
        "Autocast within the model's forward",
        OWN,
        "blocks run in float32 on computed steps",
        "autocast is part of the graph",
        "capture/test_surroundings.py::test_autocast_that_forward_enters",
    ),
    Scenario(
        "Autocast switched on and off",
        "pytorch/pytorch#181564",
        "a graph for one autocast dtype is used for another",
        "each has its own graph",
        "capture/test_edges.py::test_autocast_on_and_off",
    ),
    Scenario(
        "Quantized weights",
        "vipshop/cache-dit#109",
        "not supported",
        "the blocks stay your own modules",
        "pipelines/test_combinations.py::test_a_change_of_the_model_takes_effect"
        "[int8 weights-before]",
    ),
    Scenario(
        "Offloading to the CPU",
        "vllm-project/vllm-omni#1710",
        "cannot be combined",
        "works before or after `apply`",
        "pipelines/test_offload.py::test_offloading[model-before-SD3]",
    ),
    Scenario(
        "`pipe.from_pipe()` with a cached transformer",
        OWN,
        "refused because of the transformer's type",
        "both pipelines are cached",
        "pipelines/test_from_pipe.py::test_back_again_and_another_family",
    ),
    Scenario(
        "A forward that another tool set on the model",
        OWN,
        "fails, or is bypassed",
        "captured like any forward",
        "capture/test_patched_forward.py::test_each_way_to_put_a_forward_on_a_model",
    ),
    Scenario(
        "A forward that counts its own calls (a TeaCache patch)",
        OWN,
        "two caches on one model: the counter keeps the value of the first call",
        "refused, with the name of the counter",
        "capture/test_side_effects.py::test_a_forward_with_a_cache_of_its_own_is_refused",
    ),
    Scenario(
        "The caller changes a result in place",
        OWN,
        "the stored tensor changes too",
        "the stored tensor has its own memory",
        "capture/test_edges.py::test_the_caller_may_change_the_result",
    ),
    Scenario(
        "Copies of a cached model",
        OWN,
        "the copy runs the blocks of the original",
        "each copy works on its own: deep copy, shallow copy, pickle",
        "test_cached_model.py::test_a_copy_keeps_what_was_set",
    ),
    Scenario(
        "Memory after a run",
        "huggingface/diffusers#13467",
        "one hidden state per hooked layer stays on the device until the next run",
        "freed with the session",
        "runtime/test_sessions.py::test_what_a_session_holds_is_freed_when_it_is_closed_or_dropped",
    ),
)

COMPILING = (
    Scenario(
        "`torch.compile` of the cached model",
        "vipshop/cache-dit#76",
        "graph breaks, slower than without a cache",
        "one graph without graph breaks",
        "compile/test_models.py::test_one_graph_of_several_blocks[deepcache-eager]",
    ),
    Scenario(
        "Compiled before its first call",
        "kijai/ComfyUI-KJNodes#282",
        "`'OptimizedModule' object has no attribute 'teacache_state'`",
        "works with and without an eager call before",
        "compile/test_calls.py::test_with_and_without_an_eager_call_before",
    ),
    Scenario(
        "New weights in a compiled model",
        "kijai/ComfyUI-KJNodes#131",
        "recompiles for each LoRA up to the limit, then runs uncompiled",
        "new weights need no new graph",
        "compile/test_changes.py::test_other_weights_need_no_other_graph",
    ),
    Scenario(
        "`compile_steps()`, with stored tensors of other strides",
        OWN,
        "the graph is compiled again",
        "compiled once",
        "compile/test_strides.py::test_compiled_steps_are_compiled_once",
    ),
)

SEVERAL = (
    Scenario(
        "Requests at different steps in one batch",
        "vllm-project/vllm-omni#3775",
        "step execution and continuous batching work only without a cache",
        "each row gets the same result as alone",
        "runtime/batch/test_backend.py::test_rows_get_what_they_get_alone",
    ),
    Scenario(
        "Ranks that decide from their own part of the data",
        "vllm-project/vllm-omni#6180",
        "one rank computes, another reuses: deadlock in the next collective",
        "if one rank computes, all do",
        "distributed/test_apart.py::test_where_one_computes_all_do",
    ),
    Scenario(
        "A sequence split over devices (context parallelism)",
        "vipshop/cache-dit#457",
        "errors, or separate caches per rank",
        "the same result as one process; each rank stores its part",
        "distributed/test_diffusers.py::test_context_parallelism",
    ),
    Scenario(
        "A guidance pass that perturbs the model with hooks and has the arguments of another pass",
        OWN,
        "both passes share one state",
        "each pass has its own branch",
        "pipelines/test_modular.py::test_each_pass_of_a_guider_has_a_state_of_its_own",
    ),
    Scenario(
        "Wan2.2: a schedule for both experts",
        OWN,
        "each expert counts its own steps, and a preset gets the wrong number",
        "one schedule for the generation",
        "pipelines/test_experts.py::test_the_plan_is_the_runs",
    ),
)

SECTIONS = {
    "Requests, runs and callers": CALLERS,
    "Guidance branches, windows and tiles": BRANCHES,
    "Samplers, sizes and multi-stage runs": SAMPLERS,
    "Models": MODELS,
    "Compilation": COMPILING,
    "Batches, devices and several models": SEVERAL,
}
SCENARIOS = tuple(scenario for section in SECTIONS.values() for scenario in section)
