"""Plans: layouts and models that cannot work are rejected with what would; no weights are read."""

import copy
import re

import pytest
from bad_models import (
    LLAVA_7B,
    TINY,
    WEIGHTS,
    configure,
    copy_model,
    error_message,
    hollow_model,
    plan_error,
    write_recipe,
)

from nemo_vlm_ptq.checkpoints import huggingface as source
from nemo_vlm_ptq.distributed.layout import data_parallel_size
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning import forecast
from nemo_vlm_ptq.planning.describe import describe_plan
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.targets.registry import TARGETS, supported_targets


@pytest.fixture(scope="module")
def llava_7b(tmp_path_factory):
    """LLaVA-1.5-7B's shapes: 32 heads, hidden 4096, MLP 11008 = 86 groups of 128."""
    return hollow_model(tmp_path_factory.mktemp("hollow") / "7b", LLAVA_7B)


HEADS = "8 heads, 4 KV heads and 768 MLP features"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tensor=3"], f"parallel.tensor=3 does not divide {HEADS}; supported: 1, 2, 4"),
        (["parallel.tensor=8"], f"parallel.tensor=8 does not divide {HEADS}; supported: 1, 2, 4"),
        (["export.tensor=3"], f"export.tensor=3 does not divide {HEADS}; supported: 1, 2, 4, 8"),
        (["parallel.pipeline=3"],
         "parallel.pipeline=3 does not divide 4 layers; supported: 1, 2, 4"),
        (["export.pipeline=3"], "export.pipeline=3 does not divide 4 layers; supported: 1, 2, 4"),
        (["parallel.tensor=4", "quantize.format=int4_awq"],
         "parallel.tensor=4 splits a group of 128 of format int4_awq; supported: 1, 2"),
        (["export.tensor=4", "quantize.format=w4a8_awq"],
         "export.tensor=4 splits a group of 128 of format w4a8_awq, or a tile of TensorRT-LLM; "
         "supported: 1, 2"),
        (["quantize.group_size=64", "quantize.format=w4a8_awq"],
         "format w4a8_awq needs quantize.group_size=128, got 64"),
        (["export.targets=[hf]", "quantize.format=int8_sq"],
         "format int8_sq cannot be exported to hf; supported: compressed_tensors, megatron, "
         "trtllm, nemo"),
        (["export.targets=[trtllm]", "quantize.format=nf4"],
         "format nf4 cannot be exported to trtllm; supported: hf, megatron"),
        (["quantize.group_size=256", "quantize.format=int4_awq",
          "export.targets=[hf, compressed_tensors]"],
         "format int4_awq needs quantize.group_size=32 or 64 or 128, got 256"),
        (["quantize.group_size=32", "quantize.format=int4_awq"],
         "format int4_awq needs quantize.group_size=64 or 128, got 32"),
        (["quantize.kv_cache=nvfp4", "export.targets=[compressed_tensors]"],
         "format fp8 with quantize.kv_cache=nvfp4 cannot be exported to compressed_tensors; "
         "supported KV caches: none, fp8"),
        (["quantize.format=nvfp4_awq", "export.targets=[compressed_tensors]"],
         "format nvfp4_awq cannot be exported to compressed_tensors; supported: hf, megatron, "
         "nemo"),
        (["parallel.tensor=4", "quantize.format=int4_wo", "export.targets=[hf]"],
         "parallel.tensor=4 splits a group of 128 of format int4_wo; supported: 1, 2"),
        (["export.targets=[trtllm]", "quantize.kv_cache=nvfp4"],
         "format fp8 with quantize.kv_cache=nvfp4 cannot be exported to trtllm; "
         "supported KV caches: none, fp8, int8"),
        (["export.targets=[hf]", "quantize.kv_cache=int8"],
         "format fp8 with quantize.kv_cache=int8 cannot be exported to hf; "
         "supported KV caches: none, fp8, nvfp4"),
        (["export.targets=[trtllm]", "quantize.kv_cache=int8", "quantize.format=nvfp4"],
         "format nvfp4 with quantize.kv_cache=int8 cannot be exported to trtllm; "
         "supported KV caches: none, fp8"),
        (["quantize.image_share=0.5", "calibration.modality=text", "quantize.format=int4_awq"],
         "quantize.image_share=0.5 needs image tokens, and calibration.modality=text has none; "
         "remove it or set modality=image_text"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_work_is_rejected_with_those_that_do(tmp_path, words, said):
    assert plan_error(tmp_path, TINY, *words) == said


def test_groups_of_a_real_model_limit_its_tensor_ranks(tmp_path, llava_7b):
    words = ["quantize.format=[fp8, int4_awq]", "parallel.tensor=4"]
    assert plan_error(tmp_path, llava_7b, *words) == (
        "parallel.tensor=4 splits a group of 128 of format int4_awq; supported: 1, 2"
    )
    recipe = load_recipe(str(write_recipe(tmp_path, llava_7b)), ["parallel.tensor=8"])
    assert "TP 8 x PP 1" in describe_plan(make_plan(recipe), None, 1)


@pytest.mark.parametrize("format", ["fp8", "int4_awq"])
@pytest.mark.parametrize("key", ["parallel.tensor", "export.tensor"])
@pytest.mark.parametrize("name", ["tiny", "7b"])
def test_every_size_that_an_error_names_does_work(tmp_path, llava_7b, format, key, name):
    recipe = write_recipe(tmp_path, {"tiny": TINY, "7b": llava_7b}[name])
    first = f"quantize.format={format}"
    said = error_message("plan", recipe, first, f"{key}=3")
    for size in re.search(r"supported: (.+)$", said)[1].split(", "):
        make_plan(load_recipe(str(recipe), [first, f"{key}={size}"]))


def test_groups_must_fit_into_the_inputs_of_every_linear(tmp_path):
    """Attention is wider than the hidden size here, so its inputs alone do not tell."""
    folder = hollow_model(tmp_path / "model", _narrow(LLAVA_7B))
    words = ["quantize.format=int4_awq", "quantize.group_size=128", "export.targets=[hf]"]
    assert "group of 128" in plan_error(tmp_path, folder, *words)


@pytest.mark.parametrize(
    ("name", "group", "sizes"),
    [("nvfp4", 16, "1, 2"), ("nf4", 64, "none"), ("nvfp4_awq", 16, "1, 2")],
)
def test_blocks_that_a_format_fixes_limit_tensor_ranks_too(tmp_path, name, group, sizes):
    """4 heads of 8, so 32 inputs of o_proj."""
    folder = hollow_model(tmp_path / "model", _small(LLAVA_7B))
    words = [f"quantize.format={name}", "export.targets=[hf]", "quantize.group_size=4096"]
    assert plan_error(tmp_path, folder, *words, "parallel.tensor=4") == (
        f"parallel.tensor=4 splits a group of {group} of format {name}; supported: {sizes}"
    )


def _small(config):
    text = config["text_config"] | {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "intermediate_size": 192, "num_hidden_layers": 1, "vocab_size": 64,
    }  # fmt: skip
    return config | {"text_config": text}


def test_an_nvfp4_cache_needs_heads_of_whole_blocks(tmp_path):
    folder = hollow_model(tmp_path / "model", _small(LLAVA_7B))
    words = ["quantize.kv_cache=nvfp4", "export.targets=[hf]"]
    assert plan_error(tmp_path, folder, *words) == (
        "quantize.kv_cache=nvfp4 needs a head_dim that is a multiple of 16, and this model's is 8; "
        "supported: none, fp8, int8"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["quantize.format=[fp8, nvfp4]", "quantize.smoothquant_alpha=search"], False),
        (["quantize.format=[fp8, nvfp4_svdquant]", "export.targets=[hf]"], True),
        (["quantize.format=int8_sq"], False),
        (["quantize.format=int8_sq", "quantize.smoothquant_alpha=search"], True),
    ],
)
def test_second_moments_are_required_where_something_is_searched(tmp_path, words, expected):
    words = ["parallel.tensor=1", *words]
    made = make_plan(load_recipe(str(write_recipe(tmp_path, TINY)), words))
    assert bool(forecast.layer_statistics_bytes(made, 1)) == expected
    kept = re.search(r"keep_statistics would write ([\d.]+) MB more", describe_plan(made, None, 1))
    assert (float(kept[1]) > 0) == expected


def test_a_format_goes_to_the_targets_that_take_it_with_the_kv_cache(tmp_path):
    words = ["quantize.format=[fp8, int8_sq, nvfp4]", "export.targets=[trtllm, hf]"]
    recipe = str(write_recipe(tmp_path, TINY))
    for kv_cache, expected in (
        ("none", [["trtllm", "hf"], ["trtllm"], ["trtllm", "hf"]]),
        ("fp8", [["trtllm", "hf"], ["trtllm"], ["trtllm", "hf"]]),
    ):
        made = make_plan(load_recipe(recipe, [*words, f"quantize.kv_cache={kv_cache}"]))
        assert [made.targets(fmt) for fmt in made.formats] == expected
    made = make_plan(load_recipe(recipe, [words[1], "quantize.kv_cache=nvfp4"]))
    assert made.targets(FORMATS["fp8"]) == ["hf"]
    made = make_plan(load_recipe(recipe, [words[0], "export.targets=[compressed_tensors, hf]"]))
    assert [made.targets(fmt)[0] for fmt in made.formats] == ["compressed_tensors"] * 3


def _narrow(config):
    text = config["text_config"] | {
        "hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128,
        "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64,
    }  # fmt: skip
    return config | {"text_config": text}


def test_ranks_that_were_started_must_make_up_the_layout():
    assert data_parallel_size(2, 2, 8, None) == 2
    assert data_parallel_size(2, 1, 4, 2) == 2
    with pytest.raises(UserError) as caught:
        data_parallel_size(2, 2, 6, None)
    assert str(caught.value) == (
        "6 ranks cannot hold tensor 2 x pipeline 2: start a multiple of 4 ranks"
    )
    with pytest.raises(UserError) as caught:
        data_parallel_size(2, 1, 2, 3)
    assert str(caught.value) == (
        "parallel: tensor 2 x pipeline 1 x data 3 needs 6 ranks but 2 were started; "
        "start 6, or set parallel.data=auto"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architectures": ["Glm4vForConditionalGeneration"]},
         "architecture 'Glm4vForConditionalGeneration' is not supported; supported: "),
        ({"architectures": None}, "architecture 'none' is not supported; supported: "),
        ({"tie_word_embeddings": True},
         "llava: tie_word_embeddings is True; only False is supported"),
        ({"text_config.tie_word_embeddings": True},
         "llava: tie_word_embeddings is True; only False is supported"),
        ({"text_config.rope_scaling": {"rope_type": "linear", "factor": 2.0}},
         "llava: rope type is 'linear'; only 'default' is supported"),
        ({"text_config.rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "llava: rope type is 'dynamic'; only 'default' is supported"),
        ({"text_config.hidden_act": "gelu"},
         "llava: text_config.hidden_act is 'gelu'; only 'silu' is supported"),
        ({"text_config.attention_bias": True},
         "llava: text_config.attention_bias is True; only False is supported"),
        ({"text_config.mlp_bias": True},
         "llava: text_config.mlp_bias is True; only False is supported"),
        ({"text_config.model_type": "mistral"},
         "llava: text_config.model_type is 'mistral'; only 'llama' is supported"),
        ({"vision_config.model_type": "siglip_vision_model"},
         "llava: vision_config.model_type is 'siglip_vision_model'; only 'clip_vision_model' is"),
        ({"vision_feature_select_strategy": "full"},
         "llava: vision_feature_select_strategy is 'full'; only 'default' is supported"),
    ],
)  # fmt: skip
def test_a_model_that_no_family_holds_is_rejected_by_what_is_different(tmp_path, values, said):
    line = plan_error(tmp_path, configure(copy_model(tmp_path / "model"), values))
    assert line.startswith(said)
    assert ("LlavaForConditionalGeneration" in line) == ("architectures" in values)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("text_config.hidden_size", "big", "hidden_size"),
        ("text_config.hidden_size", 250, "250"),
        ("text_config.num_attention_heads", 7, "7"),
        ("text_config.num_attention_heads", 0, "config.json"),
        ("text_config.model_type", "newlm", "newlm"),
        ("text_config", [1], "text_config"),
        ("vision_config.hidden_act", "nope", "nope"),
        ("vision_feature_layer", -9, "vision_feature_layer"),
    ],
)
def test_a_config_that_makes_no_sense_is_rejected_by_the_value(tmp_path, key, value, named):
    folder = configure(copy_model(tmp_path / "model"), {key: value})
    assert named in plan_error(tmp_path, folder)


def test_where_no_size_fits_a_target_its_removal_is_suggested(tmp_path):
    config = copy.deepcopy(LLAVA_7B)
    config["text_config"] = config["text_config"] | {"num_key_value_heads": 1, "head_dim": 32}
    model = hollow_model(tmp_path / "model", config)
    said = plan_error(tmp_path, model, "quantize.format=int4_awq")
    assert said.endswith("or a tile of TensorRT-LLM; supported: none; remove trtllm from "
                         "export.targets")  # fmt: skip


def test_an_unknown_family_lists_the_known_ones(tmp_path):
    said = plan_error(tmp_path, TINY, "family=llama")
    assert said.startswith(
        "family 'llama' is not supported; supported: auto, gemma3, gemma4, internvl, "
    )


def test_plan_prints_every_format_and_reads_no_weights(tmp_path, monkeypatch, capsys):
    folder = copy_model(tmp_path / "model")
    path = folder / WEIGHTS
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:head].ljust(path.stat().st_size, b"\xff"))  # all NaN
    monkeypatch.setattr(
        source.SourceReader, "get_slice", lambda self, name: pytest.fail(f"read {name}")
    )
    every = f"quantize.format=[{','.join(FORMATS)}]"
    words = [f"model={folder}", f"workdir={tmp_path / 'work'}", every, "parallel.tensor=1"]
    words += [f"export.targets=[{','.join(TARGETS)}]", "export.tensor=2"]
    text = describe_plan(make_plan(load_recipe("quickstart", words)), None, 1)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert "4.5 M parameters, 9.1 MB, bfloat16" in lines["model"]
    assert lines["decoder"].startswith("4 layers, hidden 256, 8 heads, 4 KV heads, MLP 768")
    assert set(lines) >= set(FORMATS)
    for name, row in FORMATS.items():
        assert lines[name].startswith(f"-> {', '.join(supported_targets(row))}: about ")
        served = lines[name].endswith("TensorRT-LLM ranks: TP 2 x PP 1")
        assert served == ("trtllm" in supported_targets(row))
    assert not (tmp_path / "work").exists()
