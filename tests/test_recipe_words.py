"""Words that people try in recipes: names of other programs, any case, numbers as people write."""

import pytest
from bad_models import said_by, write_recipe

from nemo_vlm_ptq.formats import FORMATS, find_format
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe, make_recipe, recipe_keys
from nemo_vlm_ptq.recipe.words import _KEYS

EQUAL = {
    "FP8": "fp8",
    "Fp8": "fp8",
    "NVFP4": "nvfp4",
    "FP8_DYNAMIC": "fp8_pc_pt",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt",
    "W8A16": "int8_wo",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "INT4_AWQ_CFG": "int4_awq",
    "FP8_DEFAULT_CFG": "fp8",
    "int4-awq": "int4_awq",
    "NVFP4_SVD": "nvfp4_svdquant",
}
OTHER = {
    "W4A16": "int4_awq",
    "W8A8": "int8_sq",
    "INT8": "int8_sq",
    "W4A8": "w4a8_awq",
    "W4AFP8": "w4a8_awq",
    "FP8_BLOCK": "fp8",
    "NVFP4A16": "nvfp4",
    "MXFP4": "nvfp4",
    "awq": "int4_awq",
    "gptq": "int4_awq",
    "bnb": "nf4",
    "fp16": "that of the model itself",
    "BF16": "that of the model itself",
    "none": "that of the model itself",
}
MEANT = {
    "calib_size": "calibration.samples",
    "num_samples": "calibration.samples",
    "samples": "calibration.samples",
    "calibration.num_samples": "calibration.samples",
    "calibration.calib_size": "calibration.samples",
    "evaluate.samples": "evaluate.limit",
    "calib_data": "calibration.data",
    "dataset": "calibration.data",
    "calibration.dataset": "calibration.data",
    "evaluate.dataset": "evaluate.data",
    "tp": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "parallel.tp": "parallel.tensor",
    "export.tp": "export.tensor",
    "pp": "parallel.pipeline",
    "dp": "parallel.data",
    "qformat": "quantize.format",
    "format": "quantize.format",
    "quantize.scheme": "quantize.format",
    "kv_cache_dtype": "quantize.kv_cache",
    "quantize.kv_cache_dtype": "quantize.kv_cache",
    "batch_size": "calibration.micro_batch",
    "calibration.batch_size": "calibration.micro_batch",
    "evaluate.batch_size": "evaluate.batch",
    "output_dir": "workdir",
    "output-dir": "workdir",
    "model_path": "model",
    "group_size": "quantize.group_size",
    "dtype": "export.dtype",
    "quantize.alpha": "quantize.smoothquant_alpha",
    "quantize.fromat": "quantize.format",
    "WorkDir": "workdir",
}


@pytest.mark.parametrize("name", EQUAL)
def test_names_of_the_same_format_elsewhere_are_aliases_in_any_case(name):
    assert find_format(name) is FORMATS[EQUAL[name]]
    tree = {"model": "m", "workdir": "w", "quantize": {"format": name}}
    assert make_recipe(tree).quantize.format == (EQUAL[name],)


@pytest.mark.parametrize("name", OTHER)
def test_names_of_something_else_are_refused_with_the_right_one(name):
    assert OTHER[name] in said_by(find_format, name)


@pytest.mark.parametrize("key", MEANT)
def test_a_key_of_another_program_gets_the_key_that_it_means(tmp_path, key):
    recipe = str(write_recipe(tmp_path))
    said = said_by(load_recipe, recipe, [f"{key}=3"])
    assert said == f"unknown recipe key {key!r}; did you mean {MEANT[key]!r}?"


@pytest.mark.parametrize(
    "key", ["ignore", "quantize.ignore", "quantize.exclude", "exclude_modules"]
)
def test_a_selection_of_layers_is_told_what_is_quantized(tmp_path, key):
    said = said_by(load_recipe, str(write_recipe(tmp_path)), [f"{key}=[lm_head]"])
    assert said.startswith(f"unknown recipe key {key!r}; every linear of the decoder is quantized")


def test_the_keys_that_are_suggested_exist():
    known = recipe_keys()
    assert all(name in known for names in _KEYS.values() for name in names)


def test_values_are_taken_in_any_case_and_by_equal_names(tmp_path):
    recipe = str(write_recipe(tmp_path))
    words = ["quantize.kv_cache=FP8", "export.dtype=BF16", "calibration.modality=Image_Text"]
    made = load_recipe(recipe, [*words, "export.targets=[HF, compressed-tensors]"])
    assert (made.quantize.kv_cache, made.export.dtype) == ("fp8", "bfloat16")
    assert made.export.targets == ("hf", "compressed_tensors")
    assert load_recipe(recipe, ["export.dtype=torch.float16"]).export.dtype == "float16"
    said = said_by(load_recipe, recipe, ["export.targets=[vllm]"])
    assert "vllm reads compressed_tensors" in said


NUMBERS = {
    "5e5": 5e5,
    "1e-3": 1e-3,
    "1E6": 1e6,
    "1.0e5": 1e5,
    "+2e3": 2e3,
    "-1e-3": -1e-3,
    ".5": 0.5,
    ".5e1": 5.0,
    "5.": 5.0,
    "1_000": 1000,
    "1_0e2": 1e3,
    "10000.0": 10000.0,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_as_people_write_them_are_numbers(tmp_path, text):
    recipe = write_recipe(tmp_path)
    found = load_recipe(str(recipe), [f"config.text_config.rope_theta={text}"]).config
    assert found["text_config"]["rope_theta"] == NUMBERS[text]
    assert not isinstance(found["text_config"]["rope_theta"], str)
    recipe.write_text(recipe.read_text() + f"config: {{text_config: {{rope_theta: {text}}}}}\n")
    assert load_recipe(str(recipe)).config == found


@pytest.mark.parametrize("text", ["5e5x", "e5", "1e", "a1e5", "'5e5'", "1e5-v2"])
def test_words_that_are_no_numbers_stay_words(tmp_path, text):
    found = load_recipe(str(write_recipe(tmp_path)), [f"config.x={text}"]).config["x"]
    assert found == text.strip("'")


def test_a_rope_theta_in_powers_of_ten_plans(tmp_path):
    words = ["config.text_config.rope_theta=5e5"]
    assert make_plan(load_recipe(str(write_recipe(tmp_path)), words)).decoder.rope_theta == 5e5
    said = said_by(make_plan, load_recipe(str(write_recipe(tmp_path)), [f"{words[0]}x"]))
    assert "rope" in said and "5e5x" in said


HUGE = 99999999999999999999


@pytest.mark.parametrize(
    "key",
    [
        *("calibration.samples", "calibration.micro_batch", "calibration.seed"),
        *("calibration.save_every", "calibration.window", "quantize.group_size"),
        *("parallel.tensor", "parallel.pipeline", "parallel.data", "export.tensor"),
        *("export.pipeline", "evaluate.limit", "evaluate.batch", "engine.max_batch_size"),
        *("engine.max_input_len", "engine.max_seq_len"),
    ],
)
def test_integers_without_end_are_refused_at_once(tmp_path, key):
    for value in (HUGE, "1e20", -HUGE):
        recipe = str(write_recipe(tmp_path))

        def plan(value=value, recipe=recipe):
            make_plan(load_recipe(recipe, [f"{key}={value}"]))

        assert key in said_by(plan)


def test_a_recipe_that_is_nested_without_end_is_refused(tmp_path):
    recipe = str(write_recipe(tmp_path))
    assert "is not YAML" in said_by(load_recipe, recipe, ["config.x=" + "[" * 10_000])
    (tmp_path / "deep.yaml").write_text("config: " + "[" * 10_000)
    assert "is not YAML" in said_by(load_recipe, str(tmp_path / "deep.yaml"))
