"""Recipes: what is rejected and how, what overrides do, which file a name means."""

import pytest
from bad_models import ROOT, write_recipe
from pydantic import ValidationError

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.recipe import load_recipe, recipe_file

KNOWN = ", ".join(FORMATS)
STAGES = "import, observe, solve, export, verify, build, evaluate, report"


def error_message(path, *overrides) -> str:
    """Return the message of load_recipe, one line."""
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), overrides)
    said = str(caught.value)
    assert said and "\n" not in said
    return said


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("paralel.tensor=2", "'paralel'; did you mean 'parallel'?"),
        ("parallel.tensors=2", "'parallel.tensors'; did you mean 'parallel.tensor'?"),
        ("calibration.sample=3", "'calibration.sample'; did you mean 'calibration.samples'?"),
        ("format=fp8", "'format'; did you mean 'quantize.format'?"),
        ("evaluate.gate.gqa_dropp=1", "'evaluate.gate.gqa_dropp'; did you mean "
         "'evaluate.gate.gqa_drop'?"),
        ("xyzzy=1", "'xyzzy'"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_rejected_and_the_nearest_known_one_named(recipe, wrong, near):
    assert error_message(recipe, wrong) == f"unknown recipe key {near}"


@pytest.mark.parametrize("key", ["model", "workdir"])
def test_a_missing_key_is_named(tmp_path, key):
    other = {"model": "workdir", "workdir": "model"}[key]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{other}: here\n")
    assert error_message(path) == f"recipe key {key!r} is missing"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("quantize.format=nvfp5", f"'quantize.format': unknown format 'nvfp5'; supported: {KNOWN}"),
        ("quantize.format=[fp8, x]", f"'quantize.format': unknown format 'x'; supported: {KNOWN}"),
        (
            "export.targets=[vllm]",
            "'export.targets': unknown target 'vllm'; supported: compressed_tensors, hf",
        ),
        ("stages=[imports]", f"'stages': unknown stage 'imports'; supported: {STAGES}"),
        ("evaluate.tasks=[vqa]", "'evaluate.tasks': Input should be 'gqa' or 'sight'"),
        ("export.dtype=int8", "'export.dtype': Input should be 'auto', 'bfloat16' or 'float16'"),
        ("calibration.modality=video", "'calibration.modality': Input should be 'image_text' or "),
        ("quantize.kv_cache=fp4", "'quantize.kv_cache': Input should be 'none', 'fp8', "),
    ],
)
def test_an_unknown_name_is_rejected_with_the_known_ones(recipe, word, said):
    assert error_message(recipe, word).startswith(f"recipe key {said}")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("parallel.tensor=0", "'parallel.tensor': Input should be a positive number of ranks or"),
        ("parallel.tensor=two", "'parallel.tensor': Input should be a positive number of ranks or"),
        ("parallel.tensor=1.5", "'parallel.tensor': Input should be a positive number of ranks or"),
        ("parallel.pipeline=-1", "'parallel.pipeline': Input should be a positive number of ranks"),
        ("calibration.samples=0", "'calibration.samples': Input should be greater than or equal"),
        ("quantize.group_size=8", "'quantize.group_size': Input should be greater than or equal"),
        ("evaluate.limit=0", "'evaluate.limit': Input should be greater than or equal to 1"),
        ("evaluate.gate.gqa_drop=few", "'evaluate.gate.gqa_drop': Input should be a valid number"),
        ("model=3", "'model': Input should be a valid string"),
        ("workdir=", "'workdir': Input should be a valid string"),
        ("parallel=2", "'parallel': Input should be a valid dictionary"),
        ("stages=import", "'stages': Input should be a valid tuple"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_rejected_with_its_key(recipe, word, said):
    value = word.partition("=")[2] or "None"
    line = error_message(recipe, word)
    assert line.startswith(f"recipe key {said}")
    assert line.removesuffix(")").replace("'", "").endswith(f"got {value}")


@pytest.mark.parametrize("value", ["3", "", "{fp8: 1}"])
def test_formats_that_are_no_list_of_names_are_rejected(recipe, value):
    assert "'quantize.format'" in error_message(recipe, f"quantize.format={value}")


@pytest.mark.parametrize("key", ["quantize.format", "export.targets", "stages"])
def test_an_empty_list_that_would_do_nothing_is_rejected(recipe, key):
    assert f"recipe key {key!r}" in error_message(recipe, f"{key}=[]")


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "data"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "1.0", "true", "[2]", "null"])
def test_an_axis_is_a_positive_number_of_ranks_or_auto(recipe, axis, value):
    line = error_message(recipe, f"parallel.{axis}={value}")
    said = "Input should be a positive number of ranks or 'auto'"
    assert line.startswith(f"recipe key 'parallel.{axis}': {said} (got ")
    for right in ("auto", "2"):
        made = load_recipe(str(recipe), [f"parallel.{axis}={right}"])
        assert str(getattr(made.parallel, axis)) == right


def test_a_gate_that_no_result_can_pass_is_rejected(recipe):
    assert "'evaluate.gate.gqa_drop'" in error_message(recipe, "evaluate.gate.gqa_drop=.nan")


@pytest.mark.parametrize(
    "text", ["model: [", "a: b: c", "model: x\n\tworkdir: y", "model: \x00", "'open"]
)
def test_a_file_that_is_not_yaml_is_named(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert error_message(path).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x\nworkdir: y\nmodel: z", "line 3: key 'model' is not unique"),
        ("quantize:\n  format: fp8\n  format: int8_sq", "line 3: key 'format' is not unique"),
        ("model: x\n3: y", "line 2: key '3' is not a string"),
        ("model: x\n[a]: y", "line 2: key "),
    ],
)
def test_a_repeated_key_or_one_that_is_not_a_string_is_rejected_with_its_line(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert error_message(path).startswith(f"{path} is not YAML: {said}")


@pytest.mark.parametrize("word", ["calibration.samples=true", "quantize.group_size=yes"])
def test_a_truth_value_is_no_number(recipe, word):
    key = word.partition("=")[0]
    assert error_message(recipe, word).startswith(f"recipe key {key!r}: Input should not be true")


@pytest.mark.parametrize("value", ["serch", "2", "[1]"])
def test_a_value_of_either_type_is_rejected_by_its_key_alone(recipe, value):
    word = f"quantize.smoothquant_alpha={value}"
    assert error_message(recipe, word).startswith("recipe key 'quantize.smoothquant_alpha': ")


KEYS = ["model", "workdir", "calibration.data", "evaluate.data", "engine.vila_path"]


@pytest.mark.parametrize("key", KEYS)
def test_paths_may_name_the_home_folder_and_variables(recipe, monkeypatch, key):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("SCRATCH", "/fast")
    for value, path in (("~/a b", "/somewhere/a b"), ("$SCRATCH/x", "/fast/x"), ("./x", "./x")):
        read = load_recipe(str(recipe), [f"{key}={value}"])
        for part in key.split("."):
            read = getattr(read, part)
        assert read == path
    monkeypatch.delenv("SCRATCH")
    said = error_message(recipe, f"{key}=$SCRATCH/x")
    assert (
        said == f"recipe key {key!r}: an environment variable in it is not set (got '$SCRATCH/x')"
    )


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    assert error_message(path).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize("text", ["- model", "just words", "3"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert error_message(path) == f"{path} must be a mapping of recipe keys"


def test_an_override_without_a_value_or_with_bad_yaml_is_quoted(recipe):
    assert error_message(recipe, "verbose") == "'verbose' is not an override; expected key=value"
    assert "'quantize.format=[fp8'" in error_message(recipe, "quantize.format=[fp8")


def test_an_override_of_a_group_below_a_value_is_rejected(tmp_path):
    recipe = write_recipe(tmp_path, parallel={"tensor": 2})
    assert error_message(recipe, "parallel.tensor.first=2") == (
        "recipe key 'parallel.tensor.first': 'tensor' holds a value, not a section"
    )


def test_overrides_are_read_as_yaml_and_the_last_one_wins(recipe):
    made = load_recipe(
        str(recipe),
        ["quantize.format=[fp8, int4_awq]", "parallel.tensor=2", "parallel.tensor=4",
         "evaluate.gate.gqa_drop=0.5", "evaluate.limit=null", "workdir=a=b"],
    )  # fmt: skip
    assert made.quantize.format == ("fp8", "int4_awq")
    assert (made.parallel.tensor, made.evaluate.gate.gqa_drop) == (4, 0.5)
    assert (made.evaluate.limit, made.workdir) == (None, "a=b")


def test_format_names_of_modelopt_mean_the_same_rows_and_repeats_count_once(recipe):
    word = "quantize.format=[fp8, fp8_default, int8_smoothquant, w4a8_awq_beta, w4a8_awq]"
    assert load_recipe(str(recipe), [word]).quantize.format == ("fp8", "int8_sq", "w4a8_awq")
    assert load_recipe(str(recipe), ["quantize.format=int4_awq"]).quantize.format == ("int4_awq",)


@pytest.mark.parametrize(
    "value", [".nan", "[.inf]", "1e999", "2020-01-01", "{a: 2020-01-01}", "!!binary YQ=="]
)
def test_a_value_of_config_json_that_json_cannot_hold_is_rejected(recipe, value):
    said = error_message(str(recipe), f"config.text_config.x={value}")
    assert said.startswith("recipe key 'config': Input should hold values of JSON only: ")


def test_a_recipe_cannot_be_changed_after_it_was_checked(recipe):
    made = load_recipe(str(recipe))
    with pytest.raises(ValidationError):
        made.parallel.tensor = 3


def test_a_name_that_does_not_exist_lists_the_shipped_recipes(tmp_path):
    shipped = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
    assert "quickstart" in shipped
    for name in ("xyzzy", str(tmp_path), str(tmp_path / "none.yaml")):
        assert error_message(name) == f"recipe {name!r} is not a file; shipped recipes: {shipped}"
    near = "quickstart, quickstart_phi, quickstart_vila, ..."
    assert (
        error_message("quickstrat") == f"recipe 'quickstrat' is not a file; shipped recipes: {near}"
    )


def test_every_shipped_recipe_is_found_by_name_and_is_valid():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert recipe_file(path.stem).read_text() == path.read_text()
        load_recipe(path.stem)
