"""Plans of full-size published models, whose weight files are sparse."""

import json
import math
import re

import pytest
from bad_models import WEIGHTS, plan_error, write_recipe
from test_families import NAMES, load

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.planning.describe import describe_plan
from nemo_vlm_ptq.planning.forecast import rank_parameters
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe

DECODER = re.compile(
    r"(llm/|language_model\.)?(model\.(language_model\.|text_model\.)?(embed_tokens|layers|norm)|lm_head)\."
)
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
RANK_LINE = re.compile(r"TP (\d+) +([\d,.]+) M parameters per rank")


def write_sparse_file(path, shapes):
    """Write a safetensors file of bf16 tensors that takes no disk space for values."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_sparse_model(home, name):
    """Write the folder of a published model."""
    model, folder = load(NAMES[name], name), home / name
    for part in FAMILIES[model.family].subfolders:
        prefix = f"{part}/" if part else ""
        (folder / part).mkdir(parents=True)
        shapes = {
            key.removeprefix(prefix): shape
            for key, shape in model.tensors.items()
            if key.startswith(prefix)
        }
        write_sparse_file(folder / part / WEIGHTS, shapes)
        config = model.config[f"{part}_cfg"] if part else model.config
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def plan_of(home, name, *overrides):
    """Return the plan of a published model."""
    recipe = write_recipe(home, write_sparse_model(home, name))
    if not FAMILIES[NAMES[name]].trtllm_architecture:
        overrides = ("export.targets=[hf]", *overrides)
    return make_plan(load_recipe(str(recipe), overrides))


def parameters_per_rank(name, tensor):
    """Return the decoder parameters per tensor rank.

    Norms and a DeltaNet are replicated, the vocabulary is padded to a multiple of 64, the rest is
    sharded. A head that is the embedding is a parameter of its own.
    """
    total, tensors = 0, load(NAMES[name], name).tensors
    is_tied = not any("lm_head" in key for key in tensors)
    for key, (rows, *columns) in tensors.items():
        if DECODER.match(key):
            rows = -(-rows // 64) * 64 if key.endswith(VOCABULARY) else rows
            numel = rows * math.prod(columns)
            is_sharded = (columns or key.endswith("_proj.bias")) and "linear_attn" not in key
            copies = 1 + (is_tied and key.endswith(VOCABULARY))
            total += copies * (numel // tensor if is_sharded else numel)
    return total


def valid_tensor_sizes(name):
    """Return the tensor parallel sizes among 1, 2, 4 and 8 that divide the heads."""
    config = load(NAMES[name], name).config
    text = config.get("llm_cfg") or config.get("text_config") or config
    heads = text.get("num_attention_heads", 32)
    kv_heads = text.get("num_key_value_heads", heads)
    of_full_attention = text.get("num_global_key_value_heads") or kv_heads
    counts = (heads, kv_heads, of_full_attention)
    return [size for size in (1, 2, 4, 8) if all(count % size == 0 for count in counts)]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_the_parameters_per_rank(tmp_path, name):
    plan = plan_of(tmp_path, name, "quantize.format=fp8", "parallel.tensor=2")
    assert plan.family.name == NAMES[name]
    assert len(plan.tensors) == len(load(NAMES[name], name).tensors)
    described = describe_plan(plan, None, 1)
    lines = {int(tensor): count for tensor, count in RANK_LINE.findall(described)}
    assert [tensor for tensor in lines if tensor <= 8] == valid_tensor_sizes(name)
    for tensor in valid_tensor_sizes(name):
        assert rank_parameters(plan, tensor) == parameters_per_rank(name, tensor)
        assert lines[tensor] == f"{parameters_per_rank(name, tensor) / 1e6:,.1f}"


@pytest.mark.parametrize("name", [name for name in NAMES if "0.5b" not in name])  # 14 heads of 64
def test_groups_of_128_are_possible_on_two_ranks(tmp_path, name):
    overrides = ["quantize.format=[fp8, int4_awq]", "parallel.tensor=2", "export.tensor=2"]
    formats = [fmt.name for fmt in plan_of(tmp_path, name, *overrides).formats]
    assert formats == ["fp8", "int4_awq"]


def test_a_tensor_size_that_does_not_divide_the_heads_is_rejected(tmp_path):
    folder = write_sparse_model(tmp_path, "VILA1.5-3b")
    assert plan_error(tmp_path, folder, "parallel.tensor=8") == (
        "parallel.tensor=8 does not divide 20 heads, 20 KV heads and 6912 MLP features; "
        "supported: 1, 2, 4"
    )


def test_phi_does_not_support_pipeline_parallelism_in_tensorrt_llm(tmp_path):
    folder = write_sparse_model(tmp_path, "Phi-3-vision-128k-instruct")
    assert plan_error(tmp_path, folder, "export.targets=[trtllm]", "export.pipeline=2") == (
        "export.pipeline=2 is not supported for Phi3ForCausalLM in TensorRT-LLM; supported: 1"
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "Qwen3.6-27B",
            "31 % of the parameters: tower, projector, embedding, output layer, Gated DeltaNets "
            "(48 of 64 layers)",
        ),
        (
            "Qwen3-VL-8B-Instruct",
            "21 % of the parameters: tower, projector, embedding, output layer",
        ),
    ],
)
def test_a_plan_says_what_stays_in_16_bit(tmp_path, name, line):
    assert f"in 16 bit  {line}\n" in describe_plan(
        plan_of(tmp_path, name, "parallel.tensor=1"), None, 1
    )
