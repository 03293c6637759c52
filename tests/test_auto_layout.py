"""`auto` in parallel: the layout of least work that fits, on fake machines."""

import pytest
from bad_models import LLAVA_7B, TINY, askable, error_message, hollow_model, write_recipe

from nemo_vlm_ptq import commands
from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning import forecast, windows
from nemo_vlm_ptq.planning.auto_layout import Machine, choose_layout, resolve_layout
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Parallel, load_recipe

H100 = 85_017_493_504  # torch's total_memory of an H100 80GB
GB = 10**9
DECODER_SIZES = {  # hidden, layers, heads, KV heads, MLP, vocabulary
    "7b": (4096, 32, 32, 32, 11008, 32064),
    "34b": (7168, 60, 56, 8, 20480, 64064),
    "70b": (8192, 80, 64, 8, 28672, 32064),
}
CONFIG_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip
CHANGED_VARIABLES = (
    launcher.PARENT_VARIABLE, "PYTHONWARNINGS", "OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY",
    "TORCH_CPP_LOG_LEVEL",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return name -> folder of a LLaVA of that decoder size, whose weights take no disk space."""
    root = tmp_path_factory.mktemp("models")
    text_config = LLAVA_7B["text_config"]

    def make(name, sizes):
        changed = text_config | dict(zip(CONFIG_KEYS, sizes, strict=True))
        return askable(hollow_model(root / name, LLAVA_7B | {"text_config": changed}))

    return {name: make(name, sizes) for name, sizes in DECODER_SIZES.items()}


@pytest.fixture
def plan_of(models, tmp_path):
    """Return a function that plans a model."""

    def plan_of(name, *overrides):
        recipe = write_recipe(tmp_path, models[name], quantize={"format": ["fp8", "int4_awq"]})
        return make_plan(load_recipe(str(recipe), overrides))

    return plan_of


def machine(ranks, gpu_memory, *, ranks_per_node=None, started=False):
    """Return a machine, of one node unless `ranks_per_node` is given."""
    return Machine(
        ranks=ranks,
        ranks_per_node=ranks_per_node or ranks,
        gpu_memory=gpu_memory,
        started=started,
    )


def sizes(parallel):
    return parallel.tensor, parallel.pipeline, parallel.data


@pytest.mark.parametrize(
    ("name", "fmt", "gpus", "memory", "expected", "window"),
    [
        ("7b", "int4_awq", 1, H100, (1, 1, 1), 32),
        ("7b", "int4_awq", 8, H100, (1, 1, 8), 32),
        ("7b", "fp8", 2, 24 * GB, (1, 1, 2), 32),
        ("7b", "int4_awq", 4, 11 * GB, (1, 1, 4), 7),
        ("7b", "fp8", 1, 8 * GB, (1, 1, 1), 6),
        ("34b", "int4_awq", 3, H100, (1, 1, 3), 27),
        ("70b", "int4_awq", 2, 1000 * GB, (1, 1, 2), 80),
        ("70b", "fp8", 8, 12 * GB, (1, 1, 8), 2),
    ],
)
def test_data_ranks_are_preferred_and_hold_as_many_layers_at_a_time_as_fit(
    plan_of, name, fmt, gpus, memory, expected, window
):
    plan = plan_of(name, f"quantize.format={fmt}")
    parallel, reason = choose_layout(plan, machine(gpus, memory))
    assert sizes(parallel) == expected
    assert windows.fitting_window(plan, 1, 1, memory) == window
    need = windows.window_bytes(plan, 1, 1, window)
    assert need <= 0.9 * memory
    assert reason == f"needs {need / GB:,.1f} of {memory / GB:,.1f} GB"


@pytest.mark.parametrize(
    ("name", "gpus", "memory", "expected"),
    [
        ("7b", 2, 3 * GB, (2, 1, 1)),  # groups of 128 limit 7b to two tensor ranks
        ("7b", 3, 3 * GB, (2, 1, 1)),  # one GPU stays unused
        ("70b", 8, 6 * GB, (4, 1, 2)),
    ],
)
def test_more_tensor_ranks_are_chosen_if_a_layer_does_not_fit(
    plan_of, name, gpus, memory, expected
):
    plan = plan_of(name)
    assert sizes(choose_layout(plan, machine(gpus, memory))[0]) == expected
    tensor = expected[0]
    assert windows.window_bytes(plan, tensor, 1, 1) <= 0.9 * memory
    assert windows.window_bytes(plan, tensor // 2, 1, 1) > 0.9 * memory


@pytest.mark.parametrize("pipeline", [1, "auto"])
@pytest.mark.parametrize(("samples", "expected"), [(17, (1, 1, 4)), (16, (2, 1, 2))])
def test_tensor_ranks_are_used_if_there_are_fewer_micro_batches_than_ranks(
    plan_of, pipeline, samples, expected
):
    """Micro-batches have 8 samples; four ranks have two of them, or three."""
    overrides = [f"calibration.samples={samples}", f"parallel.pipeline={pipeline}"]
    plan = plan_of("7b", *overrides, "calibration.micro_batch=8")
    assert sizes(choose_layout(plan, machine(4, H100))[0]) == expected


@pytest.mark.parametrize(("tensor", "measured"), [(1, 69.0), (2, 36.7)])
def test_the_forecast_of_all_layers_at_once_matches_the_measurement(plan_of, tensor, measured):
    """docs/dev/benchmarks.md: LLaVA-1.5-7B on H200s, whole second moments of all layers."""
    overrides = ["quantize.format=nvfp4_svdquant", "export.targets=[hf]"]
    plan = plan_of("7b", *overrides, "calibration.micro_batch=16")
    found = windows.window_bytes(plan, tensor, 1, 32) / GB
    assert found == pytest.approx(measured, rel=0.1)


def test_a_model_of_which_no_layer_fits_is_rejected_with_the_memory_it_needs(plan_of):
    plan = plan_of("7b")
    with pytest.raises(UserError) as caught:
        choose_layout(plan, machine(1, 2 * GB))
    assert str(caught.value).startswith(
        "no layout of 1 ranks fits: TP 1 x PP 1 needs "
        f"{windows.window_bytes(plan, 1, 1, 1) / GB:,.1f} GB per rank in observe, but 90% of a GPU "
        "is 1.8 GB; use "
    )
    assert str(caught.value).endswith(", or set parallel.tensor=1 to run anyway")


def test_a_window_of_the_recipe_counts_in_the_choice(plan_of):
    small = machine(4, 11 * GB)
    plan = plan_of("7b", "calibration.window=8")
    assert sizes(choose_layout(plan, small)[0]) == (2, 1, 2)
    need = windows.window_bytes(plan, 2, 1, 8)
    assert choose_layout(plan, small)[1] == f"needs {need / GB:,.1f} of 11.0 GB"
    with pytest.raises(UserError, match="no layout of 4 ranks fits: TP 2 x PP 1 needs"):
        choose_layout(plan_of("7b", "calibration.window=32"), small)


def test_pipeline_parallelism_is_chosen_only_if_it_is_auto(plan_of):
    large, small = machine(4, H100), machine(4, 24 * GB)
    assert sizes(choose_layout(plan_of("34b", "parallel.data=1"), large)[0]) == (4, 1, 1)
    auto = plan_of("34b", "parallel.data=1", "parallel.pipeline=auto")
    assert sizes(choose_layout(auto, large)[0]) == (1, 4, 1)  # a stage is a single window
    assert sizes(choose_layout(auto, small)[0]) == (4, 1, 1)  # stages would wait for each other
    auto = plan_of("34b", "parallel.pipeline=auto")
    assert sizes(choose_layout(auto, large)[0]) == (1, 1, 4)


def test_numbers_in_the_recipe_are_kept(plan_of):
    overrides = ["parallel.pipeline=2", "parallel.data=3"]
    assert sizes(choose_layout(plan_of("7b", *overrides), machine(8, H100))[0]) == (1, 2, 3)
    overrides = ["parallel.tensor=2", "parallel.pipeline=auto"]
    assert sizes(choose_layout(plan_of("7b", *overrides), machine(8, H100))[0]) == (2, 1, 4)


def test_without_a_gpu_auto_is_one_and_data_takes_the_ranks(plan_of):
    for without_gpu in (machine(1, None), machine(4, None, started=True)):
        parallel, reason = choose_layout(plan_of("70b", "parallel.pipeline=auto"), without_gpu)
        assert sizes(parallel) == (1, 1, "auto") and reason == "no GPU"


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "overrides", "expected"),
    [
        (16, 8, [], (1, 1, 16)),  # two hosts
        (4, 2, ["parallel.pipeline=2"], (2, 2, 1)),  # tensor ranks share a host
        (4, 4, ["parallel.data=1"], (4, 1, 1)),
    ],
)
def test_all_started_ranks_are_used(plan_of, ranks, ranks_per_node, overrides, expected):
    started = machine(ranks, H100, ranks_per_node=ranks_per_node, started=True)
    assert sizes(choose_layout(plan_of("70b", *overrides), started)[0]) == expected


def test_started_ranks_that_no_layout_fills_are_rejected(plan_of):
    with pytest.raises(UserError, match="no supported tensor size fills 3 ranks"):
        choose_layout(plan_of("7b", "parallel.data=2"), machine(3, H100, started=True))


def test_the_machine_is_not_inspected_if_the_recipe_has_numbers(plan_of):
    plan = plan_of("7b", "parallel.tensor=2")
    assert resolve_layout(plan, lambda: pytest.fail("inspected")) == (plan, "")


def test_second_moments_and_micro_batches_count_in_the_memory_of_a_rank(plan_of):
    def need(*overrides):
        return windows.window_bytes(plan_of("7b", *overrides), 1, 1, 32)

    plain = need("quantize.format=fp8")
    widths, modalities = (4096, 4096, 4096, 11008), 2
    sketches = sum(width * (512 + 128) for width in widths) * modalities * 8  # float64
    assert need("quantize.format=int4_awq") - plain == 33 * sketches  # of one layer for its solve
    triangles = sum(width**2 / 2 for width in widths) * modalities * 8
    whole = need("quantize.format=nvfp4_svdquant", "export.targets=[hf]") - plain
    assert 33 * triangles < whole < 40 * triangles  # strips have whole diagonal blocks
    small = need("quantize.format=fp8", "calibration.micro_batch=1")
    weights = 2 * 6.93e9  # LLaVA-1.5-7B without the output layer
    assert weights < small < weights + 3e8 < plain


@pytest.mark.parametrize("tensor", [1, 2])
def test_pipeline_stages_split_the_layers_and_the_fullest_stage_counts(plan_of, tensor):
    plan = plan_of("7b", "quantize.format=fp8")
    full = forecast.rank_parameters(plan, tensor)
    embedding = 32064 * 4096 // tensor
    half = (full - 2 * embedding - 4096) // 2 + embedding + 4096  # the last stage has the norm
    assert forecast.rank_parameters(plan, tensor, 2) == half


def test_plan_prints_the_layout_and_the_reason(tmp_path, models, set_gpus, capsys):
    recipe = write_recipe(tmp_path, models["7b"])
    set_gpus(H100, H100)
    assert commands.run_command("plan", str(recipe), []) == 0
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.startswith("calibrate ")]
    assert line.startswith("calibrate  TP 1 x PP 1 x DP 2: needs ")
    assert line.endswith(" of 85.0 GB")
    set_gpus(2 * GB)
    assert error_message("plan", recipe).startswith("no layout of 1 ranks fits: TP 1 x PP 1 needs ")


def test_evaluate_is_rejected_early_if_the_model_does_not_fit_on_one_gpu(
    tmp_path, models, set_gpus
):
    recipe = write_recipe(tmp_path, models["34b"], quantize={"format": ["fp8"]})
    set_gpus(*[48 * GB] * 8)
    message = error_message("plan", recipe)
    assert message.startswith("evaluate needs the unsharded model on each GPU, 69.")
    assert "GB in bfloat16, but 90% of a GPU is 43.2 GB; set stages=[observe," in message
    stages = message.partition("stages=")[2].partition(", and run")[0]
    assert commands.run_command("plan", str(recipe), [f"stages={stages}"]) == 0
    engine = ["evaluate.from=engine", "export.targets=[trtllm]"]
    assert commands.run_command("plan", str(recipe), engine) == 0
    message = error_message("evaluate", recipe)
    assert message.endswith("43.2 GB; run evaluate on GPUs with more memory")
    for name in ("16bit", "fp8"):  # until all results exist
        folder = tmp_path / "work" / name / "evaluate"
        folder.mkdir(parents=True)
        assert error_message("plan", recipe).startswith("evaluate needs the unsharded model")
        (folder / "manifest.json").touch()
    assert commands.run_command("plan", str(recipe), []) == 0
    set_gpus()
    assert commands.run_command("plan", str(recipe), []) == 0


def test_ranks_are_started_with_the_chosen_layout(tmp_path, models, set_gpus, monkeypatch):
    started = {}

    def run_ranks(words, count):
        started.update(count=count, words=words)
        return {}

    monkeypatch.setattr("nemo_vlm_ptq.distributed.spawn.run_ranks", run_ranks)
    monkeypatch.setattr("sys.argv", ["nemo-vlm-ptq", "observe", "recipe", "workdir=x"])
    for name in CHANGED_VARIABLES:
        monkeypatch.setenv(name, "1")  # restored when the test ends
    parallel, quantize = {"data": 1}, {"format": ["int4_awq"]}
    recipe = write_recipe(tmp_path, models["34b"], parallel=parallel, quantize=quantize)
    set_gpus(*[H100] * 4)
    assert commands.run_command("observe", str(recipe), []) == 0
    assert started == {
        "count": 4,
        "words": ["observe", "recipe", "workdir=x", "parallel.tensor=4", "parallel.pipeline=1"],
    }  # fmt: skip


def test_auto_is_the_default_and_is_resolved_to_numbers(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path, TINY)))
    assert recipe.parallel == Parallel(tensor="auto", pipeline=1, data="auto")
    plan, reason = resolve_layout(make_plan(recipe), lambda: machine(2, H100))
    assert sizes(plan.recipe.parallel) == (1, 1, 2) and reason.startswith("needs 0.")
