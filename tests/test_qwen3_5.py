"""Qwen3.5: layers without attention, gates of heads, dtypes and tensors that are handed on."""

import re
from dataclasses import replace

import models
import pytest
import torch
from bad_models import said_by, write_recipe
from observing import plan_of
from processors import write_qwen
from rank_family_parity import import_model
from reference_qwen import MTP, QwenVL, qwen_cases
from references import VOCAB
from safetensors.torch import load_file, save_file
from test_families import SMALL
from transformers.quantizers.quantizers_utils import should_convert_module

from nemo_vlm_ptq.checkpoints.model_config import merge_config
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.families import qwen3_5, read_config
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.megatron.forward import collate, forward
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor, unshard_tensor
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.targets.hf import nf4
from nemo_vlm_ptq.workdir import store

LAYER = "model.language_model.layers.0.linear_attn."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of a model in 16 bit with some tensors in float32."""
    home = tmp_path_factory.mktemp("qwen3_5")
    write_qwen(home / "model", "qwen3_5")
    path = home / "model" / "model.safetensors"
    tensors = load_file(path)
    kept = {"A_log": torch.float32, "norm.weight": torch.float32, "dt_bias": torch.bfloat16}
    for name, tensor in tensors.items():
        dtype = kept.get(name.rpartition("linear_attn.")[2], torch.bfloat16)
        tensors[name] = tensor.to(dtype)
    save_file(tensors, path)
    recipe = write_recipe(
        home,
        home / "model",
        quantize={"format": ["fp8", "int4_awq"], "kv_cache": "fp8"},
        export={"targets": ["compressed_tensors", "hf"]},
        evaluate={"data": None},
    )
    with models.single_rank() as parallel:
        plan = make_plan(load_recipe(str(recipe), []))
        run_stages(
            RunContext(plan=plan, parallel=parallel),
            ["observe", "solve", "export", "verify", "report"],
        )
    return home, tensors


@pytest.mark.parametrize("target", ["compressed_tensors", "hf"])
def test_what_is_not_quantized_is_handed_on_in_its_dtype(run, target):
    home, source = run
    folder = home / "work" / "fp8" / target
    exported = {}
    for path in folder.glob("*.safetensors"):
        exported |= load_file(path)
    for name in (
        MTP,
        *(
            LAYER + part
            for part in ("A_log", "dt_bias", "norm.weight", "in_proj_qkv.weight", "conv1d.weight")
        ),
    ):
        assert exported[name].dtype == source[name].dtype
        assert torch.equal(exported[name], source[name])
    attention = [name for name in exported if name.endswith(("k_scale", "v_scale"))]
    assert {name.split(".")[3] for name in attention} == {"1"}


def test_modules_of_layers_without_attention_are_ignored_by_servers(run):
    home, _ = run
    config = store.read_json(home / "work" / "fp8" / "hf" / "hf_quant_config.json")
    excluded = config["quantization"]["exclude_modules"]
    for part in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "conv1d"):
        assert LAYER + part in excluded


def test_a_tied_head_is_not_taken_for_quantized(run):
    """transformers has a linear for it, though checkpoints do not hold it."""
    home, source = run
    assert "lm_head.weight" not in source
    folder = home / "work" / "fp8"
    config = store.read_json(folder / "compressed_tensors" / "config.json")
    ignored = config["quantization_config"]["ignore"]
    assert any(re.match(one.removeprefix("re:"), "lm_head") for one in ignored)
    config = store.read_json(folder / "hf" / "hf_quant_config.json")
    assert "lm_head" in config["quantization"]["exclude_modules"]


def test_transformers_converts_the_linears_that_nf4_quantizes_and_no_others():
    skipped = nf4.quantization_config(
        "bfloat16", ["model.visual.merger.weight", MTP], ["linear_attn.in_proj_qkv"]
    )["llm_int8_skip_modules"]
    layer = "model.language_model.layers.0."
    for name in ("mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"):
        assert should_convert_module(layer + name, skipped)
    others = ("lm_head", "model.visual.merger", "mtp.fc", layer + "linear_attn.in_proj_qkv")
    assert not any(should_convert_module(name, skipped) for name in others)
    assert "linear_attn" in skipped  # vLLM compares parts of names


def test_masked_tokens_in_front_are_left_out_of_the_recurrence(tmp_path):
    """As padding on the left is; transformers leaves it out in batches of several rows."""
    write_qwen(tmp_path / "model", "qwen3_5")
    reference = QwenVL(0, "qwen3_5")
    (question,) = qwen_cases(1, reference)["text"][:1]
    mask = (torch.arange(len(question.ids)) >= 5).long()
    positions = (mask.cumsum(0) - 1).clamp(min=0).expand(3, -1)
    with torch.no_grad():
        expected = reference.model(
            input_ids=question.ids.expand(2, -1),
            attention_mask=mask.expand(2, -1),
            position_ids=positions[:, None].expand(-1, 2, -1),
        ).logits[0, 5:]
    sample = Sample("q", question.ids, torch.zeros(len(question.ids)).bool(), None, positions)
    plan, device = plan_of(tmp_path / "model"), torch.device("cpu")
    with models.single_rank() as parallel:
        model, _ = import_model(parallel, tmp_path / "model")
        found = forward(model, parallel, collate([sample], mask), None)[0, 5:, :VOCAB]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    read = read_source(plan.tensors)
    vision = {name: read.plain[name] for name in plan.vision_names}
    model = ReferenceModel(plan.family, plan.config, read, vision, torch.float32, device)
    found = model.logits(sample, None, mask)[5:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_gate_of_a_head_goes_behind_all_queries_of_its_kv_head():
    decoder = replace(SMALL, output_gate=True)
    sizes, dim = decoder.sizes(1), decoder.head_dim
    q = torch.arange(2 * decoder.heads * dim).reshape(decoder.heads, 2, dim)
    k = 1000 + torch.arange(decoder.kv_heads * dim)
    parts = [q.flatten()[:, None], k[:, None], 1000 + k[:, None]]
    for T in (1, 2):
        for t in range(T):
            shard = shard_tensor("qkv", parts, sizes, t, T).view(-1, 6, dim)
            for local, group in enumerate(shard):
                kv_head = t * decoder.kv_heads // T + local
                queries = q[2 * kv_head : 2 * kv_head + 2]
                assert torch.equal(group[:4], torch.cat([queries[:, 0], queries[:, 1]]))
                assert torch.equal(group[4], k.view(-1, dim)[kv_head])
    whole = shard_tensor("qkv", parts, sizes, 0, 1)
    for restored, part in zip(unshard_tensor("qkv", whole, sizes), parts, strict=True):
        assert torch.equal(restored, part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"attention_bias": True}},
         "text_config.attention_bias is True; only False is supported"),
        ({"text_config": {"attn_output_gate": False}},
         "text_config.attn_output_gate is False; only True is supported"),
        ({"text_config": {"layer_types": ["full_attention", "chunked_attention"]}},
         "kinds in layer_types is ['chunked_attention', 'full_attention', 'linear_attention']"),
        ({"text_config": {"linear_num_value_heads": 3}},
         "linear_num_value_heads % linear_num_key_heads is 1; only 0 is supported"),
        ({"text_config": {"linear_conv_kernel_dim": 0}},
         "linear_conv_kernel_dim must be a positive integer, got 0"),
        ({"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5}}},
         "sum of mrope_section is 4; only 8 is supported"),
        ({"text_config": {"rope_parameters": {"partial_rotary_factor": 2.0}}},
         "partial_rotary_factor is 2.0; only 1.0 is supported"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}},
         "rope type is 'yarn'; only 'default' is supported"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_refused(run, change, message):
    config = merge_config(read_config(run[0] / "model"), change)
    said = said_by(qwen3_5.decoder, config)
    assert said.startswith("qwen3_5: ") and message in said
