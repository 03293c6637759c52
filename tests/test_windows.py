"""Windows of layers: their number and size for a memory, and what is said if nothing fits."""

import pytest
from bad_models import TINY, plan_error, said_by, write_recipe

from nemo_vlm_ptq.planning.describe import describe_plan
from nemo_vlm_ptq.planning.forecast import layer_weight_bytes, sample_tokens
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.planning.windows import (
    MEMORY_FRACTION,
    WindowPlan,
    fitting_window,
    layers_in_memory,
    plan_windows,
    stage_windows,
    window_bytes,
)
from nemo_vlm_ptq.recipe import load_recipe

LAYERS, HIDDEN, WIDTH = 4, 256, 2  # of the tiny model; WIDTH: bytes of a bfloat16
SAMPLES = 10
PLENTY = 10**12


@pytest.fixture
def plan_of(tmp_path):
    """Return a function that plans the tiny model with second moments."""

    def plan_of(*overrides):
        recipe = write_recipe(
            tmp_path,
            TINY,
            parallel={"tensor": 1},
            quantize={"format": "int4_awq"},
            calibration={"samples": SAMPLES, "micro_batch": 2},
        )
        return make_plan(load_recipe(str(recipe), overrides))

    return plan_of


def memory_for(plan, size, tensor=1, pipeline=1):
    """Return the least memory of a rank that takes `size` layers at a time."""
    return -(-window_bytes(plan, tensor, pipeline, size) * 1000 // int(1000 * MEMORY_FRACTION))


@pytest.mark.parametrize("layers", [1, 4, 24, 60])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 60])
def test_windows_are_few_and_evenly_filled_and_cover_the_stages_in_order(layers, pipeline, size):
    if layers % pipeline:
        pytest.skip("stages have as many layers each")
    own, covered = layers // pipeline, []
    for stage in range(pipeline):
        windows = stage_windows(layers, pipeline, stage, size)
        lengths = {len(window) for window in windows}
        assert len(windows) == -(-own // size)
        assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
        covered += [layer for window in windows for layer in window]
    assert covered == list(range(layers))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)])
def test_the_window_is_the_largest_that_fits(plan_of, tensor, pipeline):
    plan, own = plan_of(), LAYERS // pipeline
    needs = {size: window_bytes(plan, tensor, pipeline, size) for size in range(1, own + 1)}
    for size in needs:
        memory = memory_for(plan, size, tensor, pipeline)
        found = fitting_window(plan, tensor, pipeline, memory)
        assert found >= size and needs[found] <= MEMORY_FRACTION * memory
        larger = [need for other, need in needs.items() if other > found]
        assert all(need > MEMORY_FRACTION * memory for need in larger)
    assert fitting_window(plan, tensor, pipeline, min(needs.values()) // 2) == 0


def test_weights_of_the_next_window_are_held_unless_there_is_none(plan_of):
    plan = plan_of()
    weights = layer_weight_bytes(plan, 1)
    one, two, three, four = (window_bytes(plan, 1, 1, size) for size in range(1, LAYERS + 1))
    assert two - one == three - two > 2 * weights
    assert four - three == (two - one) - LAYERS * weights


def test_all_layers_at_once_keep_no_hidden_states(plan_of):
    plan = plan_of()
    assert plan_windows(plan, 1, 1, 1, PLENTY) == WindowPlan(
        size=LAYERS,
        count=1,
        device_bytes=window_bytes(plan, 1, 1, LAYERS),
        states_bytes=0,
        states_on_device=0,
    )


@pytest.mark.parametrize("data", [1, 3])
def test_hidden_states_of_the_samples_of_a_rank_stand_on_the_device_as_far_as_they_fit(
    plan_of, data
):
    plan = plan_of("calibration.window=1")
    states = -(-SAMPLES // data) * sample_tokens(plan) * HIDDEN * WIDTH
    assert plan_windows(plan, 1, 1, data, PLENTY) == WindowPlan(
        size=1,
        count=LAYERS,
        device_bytes=window_bytes(plan, 1, 1, 1),
        states_bytes=states,
        states_on_device=states,
        exports_early=True,
    )
    tight = plan_windows(plan, 1, 1, data, memory_for(plan, 1))
    assert tight.states_bytes == states and 0 <= tight.states_on_device < states / 10


def test_a_requested_window_is_filled_evenly(plan_of):
    windows = plan_windows(plan_of("calibration.window=3"), 1, 1, 1, PLENTY)
    assert (windows.size, windows.count) == (2, 2)


def test_too_little_memory_for_a_layer_names_what_would_do(plan_of):
    plan = plan_of()
    need, usable = window_bytes(plan, 1, 1, 1) / 1e9, MEMORY_FRACTION * 10**6 / 1e9
    said = (
        f"a window of one layer needs {need:,.1f} GB, but 90% of a rank's memory is "
        f"{usable:,.1f} GB; use calibration.micro_batch below 2, a larger parallel.tensor or GPUs "
        "with more memory"
    )
    assert said_by(plan_windows, plan, 1, 1, 1, 10**6) == said
    said = said.replace("calibration.micro_batch below 2, ", "")
    plan = plan_of("calibration.micro_batch=1")
    assert said_by(plan_windows, plan, 1, 1, 1, 10**6).endswith(said.partition("GB; ")[2])


def test_too_little_memory_for_the_requested_window_names_the_largest_that_fits(plan_of):
    plan = plan_of("calibration.window=4")
    said = said_by(plan_windows, plan, 1, 1, 1, memory_for(plan, 1))
    assert said.startswith("calibration.window=4 needs ") and said.endswith("; use at most 1")


def test_a_plan_says_where_hidden_states_stand_and_what_is_written(plan_of):
    def lines_of(*overrides, memory=PLENTY):
        text = describe_plan(plan_of(*overrides), memory, 1)
        return dict(line.split(maxsplit=1) for line in text.splitlines())

    assert lines_of()["windows"].startswith("all layers at once: up to ")
    windows = lines_of("calibration.window=1")["windows"]
    assert windows.startswith("4 of 1 layers: up to ") and "; hidden states " in windows
    assert "on the host or in a file" not in windows
    without_gpu = lines_of(memory=None)["windows"]
    assert without_gpu.startswith("from ") and without_gpu.endswith(" GB for all at once")
    written = lines_of()["written"]
    assert "exports" in written and written.partition("; ")[2].startswith(
        "calibration.keep_statistics would write "
    )
    written = lines_of("calibration.keep_statistics=true", "stages=[import, observe]")["written"]
    assert "statistics" in written and "16 bit Megatron checkpoint" in written
    assert "would write" not in written


def test_as_many_layers_as_fit_into_a_memory_are_at_least_one(plan_of):
    plan = plan_of()
    weights = layer_weight_bytes(plan, 1)
    counts = [layers_in_memory(plan, 1, 1, memory) for memory in (0, 2 * weights + 1, 99 * weights)]
    assert counts == [1, 2, LAYERS]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0"], "recipe key 'calibration.window': Input should be a positive number of layers or "
         "'auto' (got 0)"),
        (["some"], "recipe key 'calibration.window': Input should be a positive number of layers "
         "or 'auto' (got 'some')"),
        (["5"], "calibration.window=5, but a pipeline stage has 4 layers; supported: auto, 1 to 4"),
        (["3", "parallel.pipeline=2"],
         "calibration.window=3, but a pipeline stage has 2 layers; supported: auto, 1 to 2"),
    ],
)  # fmt: skip
def test_a_window_is_a_number_of_layers_of_a_stage(tmp_path, words, said):
    window, *others = words
    assert plan_error(tmp_path, TINY, f"calibration.window={window}", *others) == said
