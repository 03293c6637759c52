"""Plans of full-size published models: headers as published, bodies that are holes in files."""

import json
import math
import re

import pytest
from bad_models import WEIGHTS, plan_refusal, write_recipe
from test_families import NAMES, load

from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.planning.forecast import describe_plan, rank_parameters
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe

DECODER = re.compile(r"(llm/|language_model\.)?(model\.(embed_tokens|layers|norm)|lm_head)\.")
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
RANK_LINE = re.compile(r"TP (\d+) +([\d,.]+) M parameters a rank")


def hollow_file(path, shapes):
    """A safetensors file of bf16 tensors whose values take no disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def hollow_folder(home, name):
    """A published model in its folder or folders."""
    model, folder = load(NAMES[name], name), home / name
    for part in FAMILIES[model.family].subfolders:
        start = f"{part}/" if part else ""
        (folder / part).mkdir(parents=True)
        found = {key: shape for key, shape in model.tensors.items() if key.startswith(start)}
        hollow_file(
            folder / part / WEIGHTS, {key[len(start) :]: shape for key, shape in found.items()}
        )
        config = model.config[f"{part}_cfg"] if part else model.config
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def plan_of(home, name, *words):
    """The plan of a published model."""
    recipe = write_recipe(home, hollow_folder(home, name))
    return make_plan(load_recipe(str(recipe), words))


def counted(name, tensor):
    """Decoder parameters on a rank: norms whole, the vocabulary padded to 64 rows, the rest cut."""
    total = 0
    for key, (rows, *columns) in load(NAMES[name], name).tensors.items():
        if DECODER.match(key):
            rows = -(-rows // 64) * 64 if key.endswith(VOCABULARY) else rows
            total += rows * columns[0] // tensor if columns else rows
    return total


def fitting(name):
    """Tensor sizes among 1, 2, 4 and 8 that the heads allow."""
    config = load(NAMES[name], name).config
    text = config.get("llm_cfg") or config.get("text_config") or config
    heads = text.get("num_attention_heads", 32)
    shared = text.get("num_key_value_heads", heads)
    return [size for size in (1, 2, 4, 8) if heads % size == 0 and shared % size == 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_a_published_model_says_what_a_rank_holds(tmp_path, name):
    plan = plan_of(tmp_path, name, "quantize.format=fp8", "parallel.tensor=2")
    assert plan.family.name == NAMES[name]
    assert len(plan.tensors) == len(load(NAMES[name], name).tensors)
    lines = {int(tensor): count for tensor, count in RANK_LINE.findall(describe_plan(plan))}
    assert [tensor for tensor in lines if tensor <= 8] == fitting(name)
    for tensor in fitting(name):
        assert rank_parameters(plan, tensor) == counted(name, tensor)
        assert lines[tensor] == f"{counted(name, tensor) / 1e6:,.1f}"


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_128_fit_into_a_published_model_on_two_ranks(tmp_path, name):
    words = ["quantize.format=[fp8, int4_awq]", "parallel.tensor=2", "export.tensor=2"]
    formats = [fmt.name for fmt in plan_of(tmp_path, name, *words).formats]
    assert formats == ["fp8", "int4_awq"]


def test_twenty_heads_do_not_go_onto_eight_ranks(tmp_path):
    folder = hollow_folder(tmp_path, "VILA1.5-3b")
    assert plan_refusal(tmp_path, folder, "parallel.tensor=8") == (
        "parallel.tensor=8 does not divide 20 heads, 20 KV heads and 6912 MLP features; "
        "these work: 1, 2, 4"
    )


def test_phi_has_no_pipeline_in_tensorrt_llm(tmp_path):
    folder = hollow_folder(tmp_path, "Phi-3-vision-128k-instruct")
    assert plan_refusal(tmp_path, folder, "export.pipeline=2") == (
        "export.pipeline=2 is not possible for Phi3ForCausalLM in TensorRT-LLM; these work: 1"
    )
