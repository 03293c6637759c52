"""`auto` in parallel: the smallest model parallelism that fits, on machines that are made up."""

import pytest
from bad_models import LLAVA_7B, TINY, askable, hollow_model, refusal, write_recipe

from nemo_vlm_ptq import commands as launch
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.planning import auto_layout as autolayout
from nemo_vlm_ptq.planning import forecast
from nemo_vlm_ptq.planning.auto_layout import Machine, choose_layout, detect_machine, resolve_layout
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Parallel, load_recipe

H100 = 85_017_493_504  # torch's total_memory of an H100 80GB
GB = 10**9
SIZES = {  # hidden, layers, heads, KV heads, MLP, vocabulary
    "7b": (4096, 32, 32, 32, 11008, 32064),
    "34b": (7168, 60, 56, 8, 20480, 64064),
    "70b": (8192, 80, 64, 8, 28672, 32064),
}
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> folder of a LLaVA with a decoder of that size, whose weights take no disk."""
    home = tmp_path_factory.mktemp("hollow")
    text = LLAVA_7B["text_config"]
    return {
        name: askable(
            hollow_model(
                home / name, LLAVA_7B | {"text_config": text | dict(zip(KEYS, sizes, strict=True))}
            )
        )
        for name, sizes in SIZES.items()
    }


@pytest.fixture
def plan_of(models, tmp_path):
    """(size, override words) -> plan; groups of 128 limit 7b to two tensor ranks."""

    def plan_of(name, *words):
        recipe = write_recipe(tmp_path, models[name], quantize={"format": ["fp8", "int4_awq"]})
        return make_plan(load_recipe(str(recipe), words))

    return plan_of


def sizes(parallel):
    return parallel.tensor, parallel.pipeline, parallel.data


@pytest.mark.parametrize(
    ("name", "fmt", "gpus", "memory", "expected"),
    [
        ("7b", "int4_awq", 1, H100, (1, 1, 1)),
        ("7b", "int4_awq", 2, H100, (1, 1, 2)),
        ("7b", "int4_awq", 8, H100, (1, 1, 8)),
        ("7b", "fp8", 2, 24 * GB, (1, 1, 2)),
        ("34b", "fp8", 8, H100, (1, 1, 8)),
        ("34b", "int4_awq", 3, H100, (2, 1, 1)),  # one is left over
        ("70b", "fp8", 4, H100, (2, 1, 2)),
        ("70b", "int4_awq", 2, 1000 * GB, (1, 1, 2)),
    ],
)
def test_data_parallel_takes_what_the_smallest_fitting_tensor_size_leaves(
    plan_of, name, fmt, gpus, memory, expected
):
    plan = plan_of(name, f"quantize.format={fmt}")
    parallel, why = choose_layout(plan, Machine(gpus, gpus, memory))
    assert sizes(parallel) == expected
    need = forecast.observe_bytes(plan, parallel.tensor)
    assert need <= 0.9 * memory
    assert why.startswith(f"fits in {need / GB:,.1f} of {memory / GB:,.1f} GB")
    smaller = parallel.tensor // 2
    assert not smaller or forecast.observe_bytes(plan, smaller) > 0.9 * memory


@pytest.mark.parametrize(
    ("name", "gpus", "memory", "expected", "runs"),
    [
        ("7b", 2, 24 * GB, (2, 1, 1), [8, 3]),
        ("34b", 8, H100, (4, 1, 2), [5, 2]),
    ],
)
def test_more_tensor_ranks_are_taken_where_second_moments_need_fewer_passes(
    plan_of, name, gpus, memory, expected, runs
):
    plan = plan_of(name)
    parallel, why = choose_layout(plan, Machine(gpus, gpus, memory))
    assert sizes(parallel) == expected
    assert why.endswith(f"; second moments take {runs[1]} passes over the data")
    tensors = (parallel.tensor // 2, parallel.tensor)
    assert [forecast.count_passes(plan, tensor, 1, memory) for tensor in tensors] == runs


def test_more_tensor_ranks_are_not_taken_where_they_send_longer_than_passes_take(plan_of):
    plan, machine = plan_of("70b"), Machine(8, 8, H100)
    assert [forecast.count_passes(plan, tensor, 1, H100) for tensor in (4, 8)] == [6, 4]
    assert sizes(choose_layout(plan, machine)[0]) == (4, 1, 2)


@pytest.mark.parametrize("pipeline", [1, "auto"])
def test_few_samples_do_not_make_other_ranks_of_data_ranks(plan_of, pipeline):
    plan = plan_of("7b", "calibration.samples=1", f"parallel.pipeline={pipeline}")
    assert sizes(choose_layout(plan, Machine(8, 8, H100))[0]) == (1, 1, 8)


def test_passes_follow_the_memory_that_the_recipe_gives_second_moments(plan_of):
    layer = 16 * (3 * 4096**2 + 11008**2)  # float64, two modalities; strips are less
    plan = plan_of("7b", f"calibration.max_statistics_memory={layer}")
    assert forecast.count_passes(plan, 1, 1, H100) == 32
    assert forecast.count_passes(plan, 1, 2, H100) == 16
    assert forecast.count_passes(plan_of("7b", "quantize.format=fp8"), 1, 1, 16 * GB) == 1


@pytest.mark.parametrize(("tensor", "measured"), [(1, 69.0), (2, 36.7)])
def test_the_forecast_of_one_pass_is_what_was_measured(plan_of, tensor, measured):
    """docs/scaling.md: LLaVA-1.5-7B on H200s, second moments of all layers in one pass."""
    plan = plan_of("7b", "calibration.micro_batch=16")
    assert forecast.second_moment_bytes(plan, tensor) / GB == pytest.approx(measured, rel=0.1)


def test_a_model_that_fits_nowhere_is_refused_with_what_it_takes(plan_of):
    plan = plan_of("7b")
    with pytest.raises(UserError) as caught:
        choose_layout(plan, Machine(1, 1, 16 * GB))
    assert str(caught.value) == (
        "no layout of 1 ranks fits: at TP 1 x PP 1 one takes "
        f"{forecast.observe_bytes(plan, 1) / GB:,.1f} GB in observe, and 90% of its GPU are "
        "14.4 GB; use parallel.pipeline=auto, a smaller calibration.micro_batch or more GPUs, "
        "or set parallel.tensor=1 to try"
    )


def test_pipeline_is_taken_for_memory_and_only_where_it_is_auto(plan_of):
    machine = Machine(4, 4, 11 * GB)  # groups of 128 allow 7b no more than two tensor ranks
    with pytest.raises(UserError):
        choose_layout(plan_of("7b"), machine)
    assert sizes(choose_layout(plan_of("7b", "parallel.pipeline=auto"), machine)[0]) == (1, 4, 1)
    short = "calibration.samples=16"  # two micro-batches: stages would wait for each other
    words = [short, "parallel.pipeline=auto"]
    assert sizes(choose_layout(plan_of("7b", *words), machine)[0]) == (2, 2, 1)
    roomy = Machine(4, 4, H100)
    assert sizes(choose_layout(plan_of("7b", "parallel.pipeline=auto"), roomy)[0]) == (1, 1, 4)


def test_numbers_in_the_recipe_are_kept(plan_of):
    machine = Machine(8, 8, H100)
    words = ["parallel.pipeline=2", "parallel.data=3"]
    assert sizes(choose_layout(plan_of("7b", *words), machine)[0]) == (1, 2, 3)
    words = ["parallel.tensor=2", "parallel.pipeline=auto"]
    assert sizes(choose_layout(plan_of("7b", *words), machine)[0]) == (2, 1, 4)


def test_without_a_gpu_auto_is_one_and_data_takes_the_ranks(plan_of):
    for machine in (Machine(1, 1, None), Machine(4, 4, None, started=True)):
        parallel, why = choose_layout(plan_of("70b", "parallel.pipeline=auto"), machine)
        assert sizes(parallel) == (1, 1, "auto") and why == "there is no GPU"


@pytest.mark.parametrize(
    ("ranks", "node", "words", "expected"),
    [
        (16, 8, [], (4, 1, 4)),  # two hosts
        (4, 2, ["parallel.pipeline=2"], (2, 2, 1)),  # tensor ranks stay on their host
        (4, 4, ["parallel.data=1"], (4, 1, 1)),
    ],
)
def test_ranks_that_were_started_are_all_used(plan_of, ranks, node, words, expected):
    machine = Machine(ranks, node, H100, started=True)
    assert sizes(choose_layout(plan_of("70b", *words), machine)[0]) == expected


def test_ranks_that_no_layout_makes_up_are_refused(plan_of):
    with pytest.raises(UserError, match=r"no tensor size that works makes up 3 ranks"):
        choose_layout(plan_of("7b", "parallel.data=2"), Machine(3, 3, H100, started=True))


def test_the_machine_is_not_asked_for_when_the_recipe_has_numbers(plan_of):
    plan = plan_of("7b", "parallel.tensor=2")
    assert resolve_layout(plan, lambda: pytest.fail("asked")) == (plan, "")


def test_second_moments_and_micro_batches_count_in_what_a_rank_takes(plan_of):
    plain = forecast.observe_bytes(plan_of("7b", "quantize.format=fp8"), 1)
    moments = forecast.observe_bytes(plan_of("7b"), 1) - plain
    triangle = (3 * 4096**2 + 11008**2) / 2 * 2 * 8  # two modalities, float64
    assert 2 * triangle < moments < 3 * triangle  # gathered, and on their way into a file
    small = forecast.observe_bytes(
        plan_of("7b", "quantize.format=fp8", "calibration.micro_batch=1"), 1
    )
    weights = 2 * 6.93e9  # LLaVA-1.5-7B's without its head
    assert weights < small < weights + 3e8 < plain


@pytest.mark.parametrize("tensor", [1, 2])
def test_pipeline_stages_share_layers_and_the_fuller_end_counts(plan_of, tensor):
    plan = plan_of("7b", "quantize.format=fp8")
    whole = forecast.rank_parameters(plan, tensor)
    embedding = 32064 * 4096 // tensor
    half = (whole - 2 * embedding - 4096) // 2 + embedding + 4096  # the head's end has the norm
    assert forecast.rank_parameters(plan, tensor, 2) == half


@pytest.fixture
def gpus(monkeypatch):
    """GPUs of the given memory are in this machine."""
    torch = pytest.importorskip("torch")

    def install(*memory):
        class Card:
            def __init__(self, number):
                self.total_memory = memory[number]

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", Card)

    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return install


def test_the_smallest_gpu_of_the_machine_counts(gpus):
    gpus()
    assert detect_machine() == Machine(1, 1, None)
    gpus(80, 40, 80)
    assert detect_machine() == Machine(3, 3, 40)


@pytest.mark.parametrize("cards", [4, 1])
def test_a_rank_counts_all_ranks_and_shares_a_gpu_where_it_must(gpus, monkeypatch, cards):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    gpus(*[80] * cards)
    assert detect_machine() == Machine(8, 4, 80 if cards == 4 else 20, started=True)


def test_plan_prints_the_choice_and_why(tmp_path, models, gpus, capsys):
    recipe = write_recipe(tmp_path, models["7b"])
    gpus(H100, H100)
    assert launch.run_command("plan", str(recipe), []) == 0
    (line,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("calibrate ")]
    assert line.startswith("calibrate  TP 1 x PP 1 x DP 2: fits in ")
    assert line.endswith(" of 85.0 GB")
    gpus(16 * GB)
    assert refusal("plan", recipe).startswith("no layout of 1 ranks fits: at TP 1 x PP 1 one takes")


def test_evaluate_is_refused_early_where_no_gpu_has_room_for_the_model(tmp_path, models, gpus):
    recipe = write_recipe(tmp_path, models["34b"], quantize={"format": ["fp8"]})
    gpus(*[48 * GB] * 8)
    said = refusal("plan", recipe)
    assert said.startswith("evaluate asks a model that is whole on each GPU, 69.")
    assert "GB in bfloat16, and 90% of a GPU here are 43.2 GB; set stages=[import," in said
    stages = said.partition("stages=")[2].partition(", and run")[0]
    assert launch.run_command("plan", str(recipe), [f"stages={stages}"]) == 0
    assert launch.run_command("plan", str(recipe), ["evaluate.from=engine"]) == 0
    assert refusal("evaluate", recipe).endswith("43.2 GB; run evaluate where GPUs have more memory")
    for name in ("16bit", "fp8"):  # nothing is left to ask
        folder = tmp_path / "work" / name / "evaluate"
        folder.mkdir(parents=True)
        assert refusal("plan", recipe).startswith("evaluate asks")
        (folder / "manifest.json").touch()
    assert launch.run_command("plan", str(recipe), []) == 0
    gpus()
    assert launch.run_command("plan", str(recipe), []) == 0


def test_ranks_that_the_command_starts_are_told_the_numbers(tmp_path, models, gpus, monkeypatch):
    started = {}

    def launcher(config, program):
        return lambda *words: started.update(count=config.nproc_per_node, words=words)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launcher)
    monkeypatch.setattr("sys.argv", ["nemo-vlm-ptq", "observe", "recipe", "workdir=x"])
    for name in (launch.PARENT_VARIABLE, "PYTHONWARNINGS", "OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY",
                 "TORCH_CPP_LOG_LEVEL"):  # fmt: skip
        monkeypatch.setenv(name, "1")  # so that it is as before when the test has ended
    recipe = write_recipe(tmp_path, models["34b"], quantize={"format": ["int4_awq"]})
    gpus(*[H100] * 4)
    assert launch.run_command("observe", str(recipe), []) == 0
    assert started == {
        "count": 4,
        "words": ("-m", "nemo_vlm_ptq", "observe", "recipe", "workdir=x", "parallel.tensor=4",
                  "parallel.pipeline=1"),
    }  # fmt: skip


def test_auto_is_the_default_and_only_a_plan_without_it_reaches_the_ranks(tmp_path):
    recipe = load_recipe(str(write_recipe(tmp_path, TINY)))
    assert recipe.parallel == Parallel(tensor="auto", pipeline=1, data="auto")
    plan, why = autolayout.resolve_layout(make_plan(recipe), lambda: Machine(2, 2, H100))
    assert sizes(plan.recipe.parallel) == (1, 1, 2) and why.startswith("fits in 0.")
