"""Families: each has a fixture with configs and tensors of full-size models, and fits them."""

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

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import FAMILIES, Decoder, find_family
from nemo_vlm_ptq.parameter_map.entries import carried_names, check_coverage
from nemo_vlm_ptq.parameter_map.sharding import shard_tensor, unshard_tensor
from nemo_vlm_ptq.planning.plan import VOCAB_MULTIPLE

FILES = sorted((Path(__file__).parent / "families").glob("*.json"))
FIXTURES = {path.stem: json.loads(path.read_text())["models"] for path in FILES}
FOLDED = re.compile(r"\{0\.\.(\d+)\}")
SMALL = Decoder(
    hidden=16, ffn=24, layers=1, heads=8, kv_heads=4, head_dim=4, vocab=100,
    norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip


class Model(NamedTuple):
    """A published model: its config.json, and published name -> shape of its tensors."""

    family: str
    config: dict
    tensors: dict


def unfold(table):
    """A table with `{0..31}` in its names, one line for each of the 32."""
    shapes = {}
    for line, shape in table.items():
        found = FOLDED.search(line)
        for layer in range(int(found[1]) + 1 if found else 1):
            shapes[FOLDED.sub(str(layer), line)] = tuple(shape)
    return shapes


def load(family, name):
    """A model of a fixture, free to be changed."""
    made = FIXTURES[family][name]
    return Model(family, copy.deepcopy(made["config"]), unfold(made["tensors"]))


NAMES = {name: family for family, models in FIXTURES.items() for name in models}


@pytest.fixture(params=NAMES)
def model(request):
    """Every model of every fixture."""
    return load(NAMES[request.param], request.param)


@pytest.fixture(params=FIXTURES)
def first(request):
    """One model of every family."""
    return load(request.param, next(iter(FIXTURES[request.param])))


@pytest.fixture(params=FAMILIES)
def family(request):
    """Every family."""
    return FAMILIES[request.param]


def expected(config):
    """Name -> shape of all that a family asks of a model."""
    own = find_family(config)
    return own.decoder(config).shapes(own.parameter_map) | own.vision_shapes(config)


def test_every_family_has_a_fixture_and_every_fixture_a_family():
    assert set(FIXTURES) == set(FAMILIES)
    assert all(FIXTURES.values()), "a fixture holds at least one model"


def test_the_script_writes_the_fixtures_as_they_are(tmp_path):
    make_family_fixtures.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in FILES]
    for path in FILES:
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_the_script_knows_nothing_of_the_package():
    assert "nemo_vlm_ptq" not in Path(make_family_fixtures.__file__).read_text()


def test_a_model_is_found_by_its_config(model):
    assert find_family(model.config) is FAMILIES[model.family]


def test_rows_and_vision_name_every_tensor_in_its_shape_and_no_other(model):
    wanted, drops = expected(model.config), FAMILIES[model.family].ignored_tensors
    check_coverage(model.tensors, wanted, drops, "here")
    unused = [name for name in model.tensors if name not in wanted]
    assert carried_names(unused, drops) == unused, "lost in exports"


def test_looking_at_a_config_leaves_it_as_it_was(model):
    """It is written into every export."""
    before = copy.deepcopy(model.config)
    own = find_family(model.config)
    for look in (own.decoder, own.text_config, own.vision_shapes):
        look(model.config)
        assert model.config == before


def test_shards_of_every_row_hold_every_parameter_once(model):
    own = find_family(model.config)
    decoder = own.decoder(model.config)
    sizes = decoder.sizes(VOCAB_MULTIPLE)
    cut = (decoder.heads, decoder.kv_heads, decoder.ffn, sizes.padded_vocab)
    for T in [T for T in (1, 2, 4, 8) if all(size % T == 0 for size in cut)]:
        for row in own.parameter_map:
            shapes = [model.tensors[name] for name in row.for_layer(decoder.layers - 1).hf_names]
            parts = [torch.empty(shape, device="meta") for shape in shapes]
            whole = sum(part.numel() for part in parts)
            if row.sharding == "vocab":
                whole += (sizes.padded_vocab - decoder.vocab) * decoder.hidden
            share = whole if row.sharding == "replicate" else whole / T
            held = [shard_tensor(row.sharding, parts, sizes, t, T).numel() for t in range(T)]
            assert held == [share] * T, (row, T)


def random_parts(family):
    """(row, its tensors at random) for every row of a family, of a small decoder."""
    torch.manual_seed(0)
    for row in family.parameter_map:
        yield row, [torch.randn(shape) for shape in SMALL.shapes((row,)).values()]


def test_a_whole_tensor_gives_the_parts_of_its_row_back(family):
    sizes = SMALL.sizes(VOCAB_MULTIPLE)
    for row, parts in random_parts(family):
        back = unshard_tensor(row.sharding, shard_tensor(row.sharding, parts, sizes, 0, 1), sizes)
        assert row.is_fused or [one.shape for one in back] == [one.shape for one in parts]
        assert torch.equal(torch.cat(back), torch.cat(parts)), row


@pytest.mark.parametrize("T", [1, 2, 4])
def test_a_fused_tensor_is_cut_like_its_parts(family, T):
    sizes = SMALL.sizes(VOCAB_MULTIPLE)
    heights = {"qkv": (32, 16, 16), "gated": (24, 24)}
    found = {row.sharding: torch.cat(parts) for row, parts in random_parts(family)}
    for kind, rows in heights.items():
        apart = found[kind].split(rows)
        for t in range(T):
            fused = shard_tensor(kind, [found[kind]], sizes, t, T)
            assert torch.equal(fused, shard_tensor(kind, apart, sizes, t, T)), kind


def refusal(call, *args):
    """What is said instead of an answer."""
    with pytest.raises(UserError) as caught:
        call(*args)
    return str(caught.value)


def said_of(tensors, model):
    """What is said of a checkpoint with these tensors and the config of a model."""
    drops = FAMILIES[model.family].ignored_tensors
    return refusal(check_coverage, tensors, expected(model.config), drops, "here")


def test_a_missing_tensor_is_refused_by_its_name(first):
    wanted = list(expected(first.config))
    for name in (wanted[0], wanted[-1]):  # of the decoder, and of what looks
        found = {other: first.tensors[other] for other in first.tensors if other != name}
        assert said_of(found, first) == f"here: tensor {name} is missing (1 in all)"


def test_a_tensor_too_many_is_refused_by_its_name(first):
    own = FAMILIES[first.family]
    (name,) = own.parameter_map[-1].for_layer(own.decoder(first.config).layers).hf_names
    said = f"here: tensor {name} has no place in this family (1 in all)"
    assert said_of(first.tensors | {name: (1,)}, first) == said


def test_a_tensor_of_another_shape_is_refused_by_its_name(first):
    (name,) = FAMILIES[first.family].parameter_map[-1].for_layer(3).hf_names
    shape = first.tensors[name]
    said = f"here: tensor {name} has shape {shape[::-1]}, the config asks for {shape}"
    assert said_of(first.tensors | {name: shape[::-1]}, first) == said


def configured(name, changes):
    """The config of a model with dotted keys set."""
    config = load(NAMES[name], name).config
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        reduce(getitem, parents, config)[last] = value
    return config


def test_another_architecture_is_refused_with_those_that_are_supported():
    configs = [next(iter(models.values()))["config"] for models in FIXTURES.values()]
    known = ", ".join(config["architectures"][0] for config in configs)
    said = f"architecture 'NewForCausalLM' is not supported; supported: {known}"
    assert refusal(find_family, {"architectures": ["NewForCausalLM"]}) == said


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA_3 = LINEAR | {
    "type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
TIED = "tie_word_embeddings is True; only False is supported"
FULL = "vision_feature_select_strategy is 'full'; only 'default' is supported"
ROPE = "rope type is {!r}; only 'default' is supported"
PHI_ROPE = "rope type is {!r}; supported: su, longrope, or none"
WHOLE = "only attention over all of them is supported"
WINDOW = f"sliding_window {{}} is shorter than the {{}} positions; {WHOLE}"
LLAVA = [
    ({"tie_word_embeddings": True}, TIED),
    ({"text_config.tie_word_embeddings": True}, TIED),
    ({"vision_feature_select_strategy": "full"}, FULL),
    ({"text_config.rope_scaling": LLAMA_3}, ROPE.format("llama3")),
    ({"text_config.rope_scaling": LINEAR}, ROPE.format("linear")),
]
REFUSED = {
    "llava-1.5-7b-hf": LLAVA,
    "llava-v1.6-vicuna-7b-hf": LLAVA,
    "llava-v1.6-mistral-7b-hf": [
        ({"text_config.sliding_window": 4096}, WINDOW.format(4096, 32768)),
        ({"text_config.model_type": "qwen2"},
         "text_config.model_type is 'qwen2'; supported: llama, mistral"),
    ],
    "Phi-3-vision-128k-instruct": [
        ({"tie_word_embeddings": True}, TIED),
        ({"embd_layer.projection_cls": "linear"},
         "embd_layer.projection_cls is 'linear'; only 'mlp' is supported"),
        ({"embd_layer.hd_transform_order": "glb_sub"},
         "embd_layer.hd_transform_order is 'glb_sub'; only 'sub_glb' is supported"),
        ({"rope_scaling.type": "yarn"}, PHI_ROPE.format("yarn")),
        ({"rope_scaling": LINEAR}, PHI_ROPE.format("linear")),
        ({"rope_scaling": None, "partial_rotary_factor": 0.5},
         "partial_rotary_factor is 0.5; only 1.0 is supported"),
        ({"sliding_window": 2047}, WINDOW.format(2047, 131072)),
    ],
    "VILA1.5-3b": [
        ({"llm_cfg.tie_word_embeddings": True}, TIED),
        ({"mm_projector_cfg.mm_projector_type": "mlp"},
         "mm_projector_type is 'mlp'; only 'mlp_downsample' is supported"),
        ({"llm_cfg.rope_scaling": LLAMA_3}, ROPE.format("llama3")),
        ({"llm_cfg.rope_scaling": LINEAR}, ROPE.format("linear")),
        ({"s2": True}, "s2 is True; only False is supported"),
        ({"mm_token_order": "diagonal"}, "mm_token_order is 'diagonal'; known: column, row"),
    ],
}  # fmt: skip


CASES = [(name, *case) for name, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(("name", "changes", "said"), CASES)
def test_what_a_family_does_not_hold_is_refused_by_its_name(name, changes, said):
    assert refusal(expected, configured(name, changes)) == f"{NAMES[name]}: {said}"


def vila_folder(folder, config):
    """The folders of a VILA, each with its own config; the root's say nothing that is true."""
    for part in FAMILIES["vila"].subfolders:
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config[f"{part}_cfg"]))
    gone = {"_name_or_path": "/gone", "resume_path": "/gone/too", "llm_cfg": {"vocab_size": 1}}
    return config | gone | {"vision_tower_cfg": "./vlm/vision_tower", "mm_projector_cfg": None}


def test_configs_of_the_folders_of_a_vila_count_over_its_own(tmp_path):
    config = load("vila", "Llama-3-VILA1.5-8b").config
    root = vila_folder(tmp_path, config)
    before = copy.deepcopy(root)
    whole = FAMILIES["vila"].complete_config(tmp_path, root)
    for part in FAMILIES["vila"].subfolders:
        assert whole[f"{part}_cfg"] == config[f"{part}_cfg"]
    assert root == before
    assert expected(whole) == expected(config)


@pytest.mark.parametrize("part", FAMILIES["vila"].subfolders)
def test_a_folder_of_a_vila_without_a_config_needs_one_in_the_root(tmp_path, part):
    config = load("vila", "VILA1.5-3b").config
    root = vila_folder(tmp_path, config) | {f"{part}_cfg": "./dangling"}
    (tmp_path / part / "config.json").unlink()
    complete = FAMILIES["vila"].complete_config
    assert refusal(complete, tmp_path, root) == f"{tmp_path} has no {part}/config.json"
    known = complete(tmp_path, root | {f"{part}_cfg": config[f"{part}_cfg"]})
    assert expected(known) == expected(config)
