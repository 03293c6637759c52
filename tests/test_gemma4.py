"""Gemma 4: prompts and pixels, answers, layers of two shapes in exports, and configs refused."""

import json

import models
import pytest
import torch
from bad_models import plan_error, said_by, write_recipe
from processors import write_gemma4
from reference_gemma4 import CONFIG, IMAGE_TOKEN, MOST_TOKENS, PATCH, POOLING, Gemma4
from safetensors.torch import load_file
from test_families import SMALL
from test_family_prompts import (
    ANSWER,
    QUESTION,
    check_placeholders_are_rejected,
    check_sample,
    random_image,
)
from test_full_size import plan_of, write_sparse_model
from transformers import AutoTokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from nemo_vlm_ptq.checkpoints.model_config import merge_config
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.families import gemma4
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor, unshard_tensor
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import load_recipe
from nemo_vlm_ptq.reference.attention_masks import image_masks
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.workdir import store

NAME, SIDE = "gemma-4-31B-it", PATCH * POOLING
SLIDING, FULL = (f"model.language_model.layers.{i}.self_attn." for i in (0, 1))
FORMATS = ("fp8", "nvfp4", "int4_awq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4") / "model"
    write_gemma4(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):
    """Window -> the work folder of a finished run."""
    found = {}
    with models.single_rank() as parallel:
        for window in ("auto", 1, 2):
            home = tmp_path_factory.mktemp(f"window_{window}")
            recipe = write_recipe(
                home,
                folder,
                quantize={"format": list(FORMATS), "kv_cache": "fp8"},
                calibration={"data": "scenes", "samples": 4, "micro_batch": 2, "window": window},
                export={"targets": ["compressed_tensors", "hf"], "dtype": "bfloat16"},
                evaluate={"data": None},
            )
            plan = make_plan(load_recipe(str(recipe), []))
            stages = ["observe", "solve", "export"] + ["verify"] * (window == "auto")
            run_stages(RunContext(plan=plan, parallel=parallel), stages)
            found[window] = home / "work"
    return found


@pytest.mark.parametrize("size", [(90, 40), (32, 32), (20, 200)])
def test_prompts_and_pixels_are_those_of_the_published_processor(folder, size):
    preprocess, image = gemma4.make_preprocessor(folder, CONFIG), random_image(*size)
    sample = preprocess("q", QUESTION, image)
    processor = Gemma4ImageProcessorPil(
        patch_size=PATCH, pooling_kernel_size=POOLING, max_soft_tokens=MOST_TOKENS
    )
    expected = processor(image, return_tensors="pt")
    count = sample.images.patch_positions.shape[1]
    assert torch.equal(sample.images.pixel_values, expected["pixel_values"][:, :count])
    assert torch.equal(sample.images.patch_positions, expected["image_position_ids"][:, :count])
    assert bool((expected["image_position_ids"][:, count:] == -1).all())
    tokens = (
        "<|image|>" * expected["num_soft_tokens_per_image"][0]
    )  # as Gemma4Processor, which needs torchvision
    text = f"<s><user>\n\n\n<|image>{tokens}<image|>\n\n{QUESTION}\n<model>\n"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    check_sample(sample, ids, IMAGE_TOKEN)
    again = preprocess("q", QUESTION, sample.images.to_meta(), ANSWER)
    assert again.input_ids[: len(ids)].tolist() == ids


def test_a_prompt_without_an_image_has_no_marks(folder):
    preprocess = gemma4.make_preprocessor(folder, CONFIG)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"<s><user>\n{QUESTION}\n<model>\n", add_special_tokens=False)["input_ids"]
    check_sample(preprocess("q", QUESTION), ids, IMAGE_TOKEN, has_image=False)
    check_placeholders_are_rejected(preprocess, "<|image|>")


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (8, 8), (5, 500)])
@pytest.mark.parametrize("tokens", [1, 2, 12, 69])
def test_max_pixels_bounds_the_tokens_of_an_image(folder, size, tokens):
    preprocess = gemma4.make_preprocessor(folder, CONFIG)
    sample = preprocess("q", QUESTION, random_image(*size), max_pixels=tokens * SIDE**2)
    assert 0 < int(sample.is_image.sum()) <= tokens
    assert gemma4.pixels_per_token(CONFIG) == SIDE**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 16}, "patch_size is 16; the vision tower has 4"),
        ({"pooling_kernel_size": 3}, "pooling_kernel_size is 3; the vision tower has 2"),
        ({"do_resize": False}, "do_resize is False; the vision tower has True"),
        ({"max_soft_tokens": 140}, "max_soft_tokens is 140; the vision tower has positions for"),
        ({"max_soft_tokens": 71}, "`max_soft_tokens` must be one of"),
        ({"image_processor_type": "Gemma3ImageProcessor"}, "supported: Gemma4ImageProcessor"),
    ],
)
def test_a_processor_that_does_not_suit_the_tower_is_refused(tmp_path, change, message):
    write_gemma4(tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in said_by(gemma4.make_preprocessor, tmp_path / "model", CONFIG)


def test_answers_are_those_of_transformers(tmp_path, folder):
    """A batch is padded, and answers grow beyond the window."""
    recipe = write_recipe(tmp_path, folder, evaluate={"data": None})
    plan = make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))
    checkpoint = read_source(plan.tensors)
    vision = {name: checkpoint.plain[name] for name in plan.vision_names}
    model = ReferenceModel(
        plan.family, plan.config, checkpoint, vision, torch.float32, torch.device("cpu")
    )
    model.eos_token_ids = set()
    preprocess = gemma4.make_preprocessor(folder, plan.config)
    image = random_image(90, 40)
    samples = [preprocess("a", QUESTION, image, max_pixels=900), preprocess("b", "Why?")]
    found = model.generate(samples, [model.encode_images(samples[0].images), None], 8)
    for sample, answer in zip(samples, found, strict=True):
        ids, images = sample.input_ids[None], {}
        if sample.images is not None:
            images["pixel_values"] = sample.images.pixel_values
            images["image_position_ids"] = sample.images.patch_positions
        expected = Gemma4(0).model.generate(
            input_ids=ids, mm_token_type_ids=sample.is_image[None].long(), **images,
            max_new_tokens=8, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert answer == expected[0, ids.shape[1] :].tolist()


def test_tokens_of_an_image_attend_to_each_other_in_layers_with_a_window_only():
    is_image = torch.tensor([[True, True, False, True, True, True, False, False]])
    found = image_masks(torch.ones(1, 8), is_image, 2, full_is_causal=True)
    both_ways = image_masks(torch.ones(1, 8), is_image, 2)
    assert torch.equal(found["sliding_attention"], both_ways["sliding_attention"])
    assert torch.equal(found["full_attention"][0, 0], torch.ones(8, 8).bool().tril())


def test_numbers_that_transformers_computes_in_float32_stay_so_in_16_bit(folder):
    names = read_source(make_plan_of(folder).tensors).plain
    tensors = {name: tensor.bfloat16() for name, tensor in names.items()}
    module = gemma4.FAMILY.build_vision(CONFIG, tensors)
    tower = module.vision_tower
    assert tower.std_scale.dtype == tower.patch_embedder.input_proj.weight.dtype == torch.bfloat16
    assert tower.encoder.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(tower.std_bias, tensors["model.vision_tower.std_bias"])


def make_plan_of(folder):
    recipe = write_recipe(folder.parent, folder, evaluate={"data": None})
    return make_plan(load_recipe(str(recipe), ["export.targets=[hf]"]))


def exported(work, fmt, target):
    """Return the tensors of an export."""
    tensors = {}
    for path in (work / fmt / target).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("window", [1, 2])
def test_any_window_gives_the_same_bytes(runs, window, fmt):
    for part in ("scales", "compressed_tensors", "hf"):
        files = [store.read_manifest(runs[one] / fmt / part)["files"] for one in ("auto", window)]
        assert files[0] == files[1]


@pytest.mark.parametrize("fmt", FORMATS)
def test_runs_with_a_quantized_kv_cache_are_verified(runs, fmt):
    result = store.read_json(runs["auto"] / fmt / "verify.json")
    assert result["passed"]
    names = {check["name"] for check in result["checks"]}
    assert {"hf KV scales", "compressed_tensors KV scales"} <= names


@pytest.mark.parametrize("target", ["compressed_tensors", "hf"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_layer_without_v_proj_has_no_entry_of_it(runs, fmt, target):
    tensors = exported(runs["auto"], fmt, target)
    assert {name for name in tensors if "v_proj" in name and SLIDING in name}
    assert not [name for name in tensors if "v_proj" in name and FULL in name]
    for name in ("k_scale", "v_scale"):
        assert f"{FULL}{name}" in tensors
    config = store.read_json(runs["auto"] / fmt / target / "config.json")["quantization_config"]
    assert not [name for name in config["ignore"] if f"{FULL}v_proj" in name]


def test_linears_that_servers_fuse_have_one_global_scale(runs):
    tensors = exported(runs["auto"], "nvfp4", "compressed_tensors")
    for layer, parts in ((SLIDING, "qkv"), (FULL, "qk")):
        for scale in ("weight_global_scale", "input_global_scale"):
            found = {float(tensors[f"{layer}{part}_proj.{scale}"]) for part in parts}
            assert len(found) == 1


def test_the_input_of_o_proj_is_not_scaled_where_a_norm_undoes_it(runs):
    scaled = set()
    for path in (runs["auto"] / "int4_awq" / "scales").glob("*.safetensors"):
        scales = {name: one for name, one in load_file(path).items() if "prequant" in name}
        scaled |= {name.partition(".")[0] for name, one in scales.items() if bool((one != 1).any())}
    assert scaled and "linear_proj" not in scaled


def test_a_key_stands_behind_the_queries_of_its_kv_head():
    sizes, dim = SMALL.sizes(1), SMALL.head_dim
    q, k = torch.arange(8 * dim)[:, None], 1000 + torch.arange(4 * dim)[:, None]
    whole = shard_tensor("qk", [q, k], sizes, 0, 1)
    assert whole[: 3 * dim].flatten().tolist() == [*range(2 * dim), *range(1000, 1000 + dim)]
    for T in (1, 2, 4):
        shards = [shard_tensor("qk", [q, k], sizes, t, T) for t in range(T)]
        assert torch.equal(torch.cat(shards), whole)
        parts = zip(*(unshard_tensor("qk", whole, sizes, t, T) for t in range(T)), strict=True)
        assert all(map(torch.equal, map(torch.cat, parts), (q, k)))


def test_a_tensor_size_beyond_the_kv_heads_of_a_layer_is_rejected(tmp_path):
    model = write_sparse_model(tmp_path, NAME)
    said = plan_error(tmp_path, model, "parallel.tensor=8", "export.targets=[hf]")
    assert said == (
        "parallel.tensor=8 does not divide 32 heads, 16 and 4 KV heads and 21504 MLP features; "
        "supported: 1, 2, 4"
    )
    assert "target trtllm does not support the family gemma4" in plan_error(
        tmp_path, model, "export.targets=[trtllm]"
    )


def test_layers_of_both_shapes_are_counted(tmp_path):
    plan = plan_of(tmp_path, NAME)
    kinds = {shape.head_dim: layers for shape, layers in plan.decoder.attention_kinds.items()}
    assert {dim: len(layers) for dim, layers in kinds.items()} == {256: 50, 512: 10}
    assert plan.decoder.q_features(5) == 2 * plan.decoder.q_features(4) == 16384
    assert FULL.replace("1", "5") + "v_proj.weight" not in plan.tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token_id": -1}, "image_token_id must be the id of a token, got -1"),
        ({"vision_config": None}, "vision_config is null; a model of text is not supported"),
        ({"text_config": {"hidden_activation": "gelu"}},
         "text_config.hidden_activation is 'gelu'; only 'gelu_pytorch_tanh' is supported"),
        ({"text_config": {"attention_bias": True}},
         "text_config.attention_bias is True; only False is supported"),
        ({"text_config": {"sliding_window": 0}},
         "text_config.sliding_window must be a positive integer, got 0"),
        ({"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default"}}}},
         "rope type of full_attention is 'default'; only 'proportional' is supported"),
        ({"vision_config": {"use_clipped_linears": True}},
         "vision_config.use_clipped_linears is True; only False is supported"),
        ({"vision_config": {"pooling_kernel_size": 0}},
         "vision_config.pooling_kernel_size must be a positive integer, got 0"),
        ({"vision_config": {"rope_parameters": {"rope_type": "axial"}}},
         "vision_config's rope type is 'axial'; only 'default' is supported"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_refused(change, message):
    said = said_by(gemma4.decoder, merge_config(CONFIG, change))
    assert said.startswith("gemma4: ") and message in said
