"""Model families against fixtures with configs and tensor shapes of full-size models."""

import copy
import json
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import NamedTuple

import make_family_fixtures
import pytest
import torch
from bad_models import said_by
from unsupported_configs import UNSUPPORTED

from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.families import FAMILIES, Decoder, find_family
from nemo_vlm_ptq.parameter_map.entries import check_coverage, passthrough_names
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor, unshard_tensor

FILES = sorted((Path(__file__).parent / "families").glob("*.json"))
FIXTURES = {path.stem: json.loads(path.read_text())["models"] for path in FILES}
LAYER_RANGES = re.compile(r"\{([\d.,]+)\}")
SMALL = Decoder(
    hidden=16, ffn=24, layers=1, heads=8, kv_heads=4, head_dim=4, vocab=100,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip


class Model(NamedTuple):
    """A published model; tensors: published name -> shape."""

    family: str
    config: dict
    tensors: dict


def expand_layer_ranges(tensors):
    """Replace each name with `{0..31}` by 32 names; there may be several ranges."""
    shapes = {}
    for pattern, shape in tensors.items():
        match = LAYER_RANGES.search(pattern)
        for layers in match[1].split(",") if match else ["0..0"]:
            first, last = map(int, layers.split(".."))
            for layer in range(first, last + 1):
                shapes[LAYER_RANGES.sub(str(layer), pattern)] = tuple(shape)
    return shapes


def load(family, name):
    """Return a copy of a model of a fixture."""
    entry = FIXTURES[family][name]
    tensors = expand_layer_ranges(entry["tensors"])
    return Model(family=family, config=copy.deepcopy(entry["config"]), tensors=tensors)


NAMES = {name: family for family, models in FIXTURES.items() for name in models}


@pytest.fixture(params=NAMES)
def model(request):
    """Each model of each fixture."""
    return load(NAMES[request.param], request.param)


@pytest.fixture(params=FIXTURES)
def first_model(request):
    """The first model of each fixture."""
    return load(request.param, next(iter(FIXTURES[request.param])))


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family."""
    return FAMILIES[request.param]


def expected_shapes(config):
    """Return name -> shape of all tensors that a family expects of a model."""
    family = find_family(config)
    decoder = family.decoder(config)
    return decoder.shapes(family.parameter_map(decoder)) | family.vision_shapes(config)


def test_families_and_fixtures_correspond():
    assert set(FIXTURES) == set(FAMILIES)
    assert all(FIXTURES.values()), "a fixture must hold a model"


def test_the_script_reproduces_the_fixtures(tmp_path):
    make_family_fixtures.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in FILES]
    for path in FILES:
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_the_script_does_not_use_the_package():
    assert "nemo_vlm_ptq" not in Path(make_family_fixtures.__file__).read_text()


def test_the_family_is_found_by_the_config(model):
    assert find_family(model.config) is FAMILIES[model.family]


def test_parameter_map_and_vision_module_cover_the_tensors_exactly(model):
    expected, ignored = expected_shapes(model.config), FAMILIES[model.family].ignored_tensors
    check_coverage(model.tensors, expected, ignored, "here")
    unused = [name for name in model.tensors if name not in expected]
    assert passthrough_names(unused, ignored) == unused, "missing in exports"


def test_reading_a_config_does_not_modify_it(model):
    """Exports contain the config."""
    before = copy.deepcopy(model.config)
    family = find_family(model.config)
    for read in (family.decoder, family.text_config, family.vision_shapes):
        read(model.config)
        assert model.config == before


def test_shards_hold_every_parameter_once(model):
    family = find_family(model.config)
    decoder = family.decoder(model.config)
    padded_vocab = decoder.sizes(VOCAB_MULTIPLE).padded_vocab
    sharded = (decoder.heads, *decoder.kv_head_counts, decoder.ffn, padded_vocab)
    for T in [T for T in (1, 2, 4, 8) if all(size % T == 0 for size in sharded)]:
        for entry in family.parameter_map(decoder):
            sizes = decoder.sizes(VOCAB_MULTIPLE, entry.first_layer)
            names = entry.for_layer(max(entry.layers or [decoder.layers - 1])).hf_names
            parts = [torch.empty(model.tensors[name], device="meta") for name in names]
            total = sum(part.numel() for part in parts)
            if entry.sharding == "vocab":
                total += (sizes.padded_vocab - decoder.vocab) * decoder.hidden
            per_shard = total if entry.sharding == "replicate" else total / T
            counts = [shard_tensor(entry.sharding, parts, sizes, t, T).numel() for t in range(T)]
            assert counts == [per_shard] * T, (entry, T)


def random_parts(family):
    """Yield each parameter map entry with random tensors of the small decoder."""
    torch.manual_seed(0)
    for entry in family.parameter_map(SMALL):
        yield entry, [torch.randn(shape) for shape in SMALL.shapes((entry,)).values()]


def test_unsharding_inverts_sharding(family):
    sizes = SMALL.sizes(VOCAB_MULTIPLE)
    for entry, parts in random_parts(family):
        sharded = shard_tensor(entry.sharding, parts, sizes, 0, 1)
        restored = unshard_tensor(entry.sharding, sharded, sizes)
        assert entry.is_fused or [x.shape for x in restored] == [x.shape for x in parts]
        assert torch.equal(torch.cat(restored), torch.cat(parts)), entry


@pytest.mark.parametrize("T", [1, 2, 4])
def test_a_fused_tensor_is_sharded_like_its_parts(family, T):
    sizes = SMALL.sizes(VOCAB_MULTIPLE)
    part_rows = {"qkv": (32, 16, 16), "gated": (24, 24)}
    fused = {entry.sharding: torch.cat(parts) for entry, parts in random_parts(family)}
    for sharding, rows in part_rows.items():
        parts = fused[sharding].split(rows)
        for t in range(T):
            shard = shard_tensor(sharding, [fused[sharding]], sizes, t, T)
            assert torch.equal(shard, shard_tensor(sharding, parts, sizes, t, T)), sharding


def coverage_error(tensors, model):
    """Return the message for a checkpoint with these tensors and the config of a model."""
    ignored = FAMILIES[model.family].ignored_tensors
    return said_by(check_coverage, tensors, expected_shapes(model.config), ignored, "here")


def test_a_missing_tensor_is_rejected_by_name(first_model):
    names = list(expected_shapes(first_model.config))
    for name in (names[0], names[-1]):  # of the decoder and of the vision module
        found = {key: shape for key, shape in first_model.tensors.items() if key != name}
        message = f"here: missing tensor {name} (1 missing in total)"
        assert coverage_error(found, first_model) == message


def test_an_unexpected_tensor_is_rejected_by_name(first_model):
    family = FAMILIES[first_model.family]
    decoder = family.decoder(first_model.config)
    (name,) = family.parameter_map(decoder)[-1].for_layer(decoder.layers).hf_names
    message = f"here: unexpected tensor {name} (1 in total)"
    assert coverage_error(first_model.tensors | {name: (1,)}, first_model) == message


def test_a_tensor_of_another_shape_is_rejected_by_name(first_model):
    family = FAMILIES[first_model.family]
    decoder = family.decoder(first_model.config)
    (name,) = family.parameter_map(decoder)[-1].for_layer(3).hf_names
    shape = first_model.tensors[name]
    message = f"here: tensor {name} has shape {shape[::-1]}, expected {shape}"
    assert coverage_error(first_model.tensors | {name: shape[::-1]}, first_model) == message


def changed_config(name, changes):
    """Return the config of a model with values at dotted keys changed."""
    config = load(NAMES[name], name).config
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        reduce(getitem, parents, config)[last] = value
    return config


def test_a_class_of_two_families_is_told_apart_by_its_tower():
    pixtral = load("mistral3", "pixtral-12b").config
    clip = load("llava", "llava-1.5-7b-hf").config
    assert pixtral["architectures"] == clip["architectures"]
    assert find_family(pixtral) is FAMILIES["mistral3"]
    for vision in (clip["vision_config"], {"model_type": "siglip_vision_model"}, {}, None, "x"):
        assert find_family(clip | {"vision_config": vision}) is FAMILIES["llava"]
    said = said_by(find_family(pixtral, "llava").decoder, pixtral)
    assert "vision_config.model_type is 'pixtral'; only 'clip_vision_model'" in said


def test_every_architecture_has_a_fixture():
    found = {
        one["config"]["architectures"][0] for group in FIXTURES.values() for one in group.values()
    }
    assert found == {name for family in FAMILIES.values() for name in family.architectures}


def test_an_unsupported_architecture_is_rejected():
    names = [name for one in FAMILIES.values() for name in one.architectures]
    supported = ", ".join(dict.fromkeys(names))
    message = f"architecture 'NewForCausalLM' is not supported; supported: {supported}"
    assert said_by(find_family, {"architectures": ["NewForCausalLM"]}) == message


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("InternVLChatModel",
         "take the repository whose class is InternVLForConditionalGeneration: the one of the same "
         "name that ends in -hf or -HF"),
        ("Qwen3VLMoeForConditionalGeneration",
         "the nearest is Qwen3VLForConditionalGeneration (family qwen3_vl)"),
        ("LlavaNextVideoForConditionalGeneration",
         "the nearest is LlavaNextForConditionalGeneration (family llava_next)"),
        ("LlavaLlamaForCausalLM",
         "take the repository whose class is LlavaForConditionalGeneration: the one of llava-hf "
         "whose name ends in -hf"),
        ("LlavaQwenForCausalLM",
         "take the repository whose class is LlavaOnevisionForConditionalGeneration: the one of "
         "llava-hf whose name ends in -hf"),
        ("Gemma4UnifiedForConditionalGeneration", "take the repository whose class is "
         "Gemma4ForConditionalGeneration: google/gemma-4-31B-it"),
        ("Phi4MMForCausalLM", None),
        (None, None),
        ({}, None),
    ],
)  # fmt: skip
def test_what_is_near_an_unsupported_architecture_is_named(architecture, hint):
    said = said_by(find_family, {"architectures": [architecture]})
    start = f"architecture {str(architecture)!r} is not supported; "
    assert said.startswith(start + (f"{hint}; supported: " if hint else "supported: "))


CASES = [(name, *case) for name, cases in UNSUPPORTED.items() for case in cases]


@pytest.mark.parametrize(("name", "changes", "message"), CASES)
def test_an_unsupported_value_is_rejected_by_name(name, changes, message):
    found = said_by(expected_shapes, changed_config(name, changes))
    assert found == f"{NAMES[name]}: {message}"


def write_vila_configs(folder, config):
    """Write the configs of the sub-folders of a VILA and return a root config that differs."""
    for part in FAMILIES["vila"].subfolders:
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config[f"{part}_cfg"]))
    outdated = {"_name_or_path": "/gone", "resume_path": "/gone/too", "mm_projector_cfg": None}
    outdated |= {"llm_cfg": {"vocab_size": 1}, "vision_tower_cfg": "./vlm/vision_tower"}
    return config | outdated


def test_subfolder_configs_of_vila_take_precedence(tmp_path):
    config = load("vila", "Llama-3-VILA1.5-8b").config
    root = write_vila_configs(tmp_path, config)
    before = copy.deepcopy(root)
    merged = FAMILIES["vila"].complete_config(tmp_path, root)
    for part in FAMILIES["vila"].subfolders:
        assert merged[f"{part}_cfg"] == config[f"{part}_cfg"]
    assert root == before
    assert expected_shapes(merged) == expected_shapes(config)


@pytest.mark.parametrize("part", FAMILIES["vila"].subfolders)
def test_a_vila_subfolder_without_a_config_requires_one_in_the_root(tmp_path, part):
    config = load("vila", "VILA1.5-3b").config
    root = write_vila_configs(tmp_path, config) | {f"{part}_cfg": "./dangling"}
    (tmp_path / part / "config.json").unlink()
    complete = FAMILIES["vila"].complete_config
    assert said_by(complete, tmp_path, root) == f"{tmp_path} has no {part}/config.json"
    merged = complete(tmp_path, root | {f"{part}_cfg": config[f"{part}_cfg"]})
    assert expected_shapes(merged) == expected_shapes(config)
