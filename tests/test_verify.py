"""Verify finds every type of damage in a written checkpoint, and nothing in an undamaged one.

Damage is done to copies. A signed copy has a manifest that agrees with its damage, so that only a
check of the content can find it.
"""

import shutil
from pathlib import Path

import models
import pytest
import torch

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.targets.registry import supported_targets
from nemo_vlm_ptq.targets.trtllm.contract import check_contract

WRITTEN = [  # test_compressed_tensors.py and test_nemo_checkpoint.py damage the others
    (name, target)
    for name, row in FORMATS.items()
    for target in supported_targets(row)
    if target in ("trtllm", "hf")
]
SCALED = [
    name
    for name, row in FORMATS.items()
    if row.uses_pre_quant_scale and "trtllm" in supported_targets(row)
]
AWQ = [name for name in SCALED if FORMATS[name].algorithm == "awq"]
NIBBLES = [(name, target) for name, target in WRITTEN if FORMATS[name].weight in ("nvfp4", "nf4")]
SECOND = [
    (name, target)
    for name, target in WRITTEN
    if FORMATS[name].weight == "nvfp4" or FORMATS[name].second_weight
]
LOW_RANK = [name for name, row in FORMATS.items() if row.low_rank]
LAYER = {"trtllm": "transformer.layers.1.", "hf": "language_model.model.layers.1."}
DOWN = {"trtllm": "mlp.proj.", "hf": "mlp.down_proj."}
SCALE = {"trtllm": "weights_scaling_factor", "hf": "weight_scale"}
VISION = Path("vision", models.WEIGHTS)

each_export = pytest.mark.parametrize(("name", "target"), WRITTEN)


def weight_of(name, target):
    return LAYER[target] + DOWN[target] + "weight"


def scale_of(name, target):
    return LAYER[target] + DOWN[target] + ("weight.absmax" if name == "nf4" else SCALE[target])


def norm_of(name, target):
    return LAYER[target] + "input_layernorm.weight"


@each_export
def test_an_undamaged_export_passes(export, name, target):
    assert export(name, target).findings() == set()


@each_export
def test_a_flipped_byte_changes_the_hash_of_its_file(export, name, target):
    damaged = export(name, target)
    content = bytearray(damaged.weights[-1].read_bytes())
    content[-1000] ^= 1
    damaged.weights[-1].write_bytes(content)
    assert damaged.changed()


@each_export
def test_one_wrong_code_is_found_in_the_weights(export, name, target):
    def wrong(tensors):
        tensors[weight_of(name, target)].view(torch.uint8).view(-1)[777] ^= 0x40

    damaged = export(name, target)
    damaged.change(wrong)
    assert damaged.sign().findings() == {"weights"}


@pytest.mark.parametrize("lost", [weight_of, scale_of, norm_of])
@each_export
def test_a_missing_tensor_is_found(export, name, target, lost):
    damaged = export(name, target)
    damaged.change(lambda tensors: tensors.pop(lost(name, target)))
    assert damaged.changed()
    assert damaged.sign().findings() & {"contract", "coverage", "read", "set"}


@each_export
def test_an_extra_tensor_is_found(export, name, target):
    damaged = export(name, target)
    damaged.change(lambda tensors: tensors.update(more=torch.zeros(3)))
    assert damaged.sign().findings() == {"contract" if target == "trtllm" else "coverage"}


@pytest.mark.parametrize("changed", [norm_of, scale_of])
@each_export
def test_a_wrong_dtype_is_found(export, name, target, changed):
    def cast(tensors):
        tensor = tensors[changed(name, target)]
        wrong = torch.float32 if tensor.dtype == torch.bfloat16 else torch.bfloat16
        tensors[changed(name, target)] = tensor.to(wrong)

    damaged = export(name, target)
    damaged.change(cast)
    assert damaged.changed()
    found = damaged.sign().findings()
    assert found and ("contract" in found or target == "hf")


def swap_gate_and_up(tensors, name, target):
    names = ("mlp.gate_proj.", "mlp.up_proj.") if target == "hf" else ("mlp.fc.", "mlp.gate.")
    for key in [key for key in tensors if key.startswith(LAYER[target] + names[0])]:
        other = key.replace(*names)
        tensors[key], tensors[other] = tensors[other], tensors[key]


def misplace_k(tensors, name, target):
    """k before q where they lie in one tensor; else k for v, which have one shape."""
    if target == "hf":
        for key in [key for key in tensors if LAYER[target] + "self_attn.k_proj" in key]:
            other = key.replace("k_proj", "v_proj")
            tensors[key], tensors[other] = tensors[other], tensors[key]
        return
    for key in ("attention.qkv.weight", "attention.qkv.weights_scaling_factor"):
        tensor = tensors[LAYER[target] + key]
        if len(tensor) > 1:
            *q, k, v = tensor.view(torch.uint8).chunk(4)  # two query heads share a KV head
            tensors[LAYER[target] + key] = torch.cat([k, *q, v]).view(tensor.dtype)


def double_scale(tensors, name, target):
    key = scale_of(name, target).replace("weight.absmax", "weight.nested_absmax")
    tensors[key] = (tensors[key].float() * 2).to(tensors[key].dtype)


def spoil_last_scale(tensors, name, target):
    """Half as large; nf4 keeps an index into a table of scales."""
    scale = tensors[scale_of(name, target)].view(-1)
    scale[-1:] = 255 - scale[-1:] if name == "nf4" else (scale[-1:].float() / 2).to(scale.dtype)


def exchange_layers(tensors, name, target):
    for key in [key for key in tensors if key.startswith(LAYER[target] + "mlp")]:
        other = key.replace("layers.1.", "layers.2.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


@pytest.mark.parametrize(
    "damage", [swap_gate_and_up, misplace_k, double_scale, spoil_last_scale, exchange_layers]
)
@each_export
def test_tensors_in_the_wrong_place_are_found_in_the_weights(export, name, target, damage):
    damaged = export(name, target)
    damaged.change(lambda tensors: damage(tensors, name, target))
    assert damaged.changed()
    assert damaged.sign().findings() == {"weights"}


def test_gate_and_up_exchanged_on_one_rank_are_found_in_the_weights(export):
    damaged = export("fp8")
    second = damaged.weights[1].relative_to(damaged.folder)
    damaged.change(lambda tensors: swap_gate_and_up(tensors, "fp8", "trtllm"), second)
    assert damaged.sign().findings() == {"weights"}


@pytest.mark.parametrize(("name", "target"), NIBBLES)
def test_nibbles_in_the_other_order_are_found(export, name, target):
    def swap(tensors):
        weight = tensors[weight_of(name, target)]
        weight[:] = (weight << 4) | (weight >> 4)

    damaged = export(name, target)
    damaged.change(swap)
    assert damaged.sign().findings() == {"weights"}


@pytest.mark.parametrize(("name", "target"), SECOND)
def test_a_missing_second_scale_is_found(export, name, target):
    damaged = export(name, target)
    damaged.change(lambda tensors: tensors.pop(scale_of(name, target) + "_2"))
    assert damaged.sign().findings() == ({"contract", "read"} if target == "trtllm" else {"read"})


@pytest.mark.parametrize("part", ["svdquant_lora_a", "svdquant_lora_b"])
@pytest.mark.parametrize("name", LOW_RANK)
def test_a_missing_or_empty_low_rank_branch_is_found(export, name, part):
    key = LAYER["hf"] + DOWN["hf"] + part
    damaged = export(name, "hf")
    damaged.change(lambda tensors: tensors[key].zero_())
    assert damaged.sign().findings() == {"weights"}
    damaged.change(lambda tensors: tensors.pop(key))
    assert damaged.sign().findings() == {"read"}


@pytest.mark.parametrize("name", SCALED)
def test_a_dropped_or_neutral_prequant_scale_is_found(export, name):
    key = LAYER["trtllm"] + "mlp.fc.prequant_scaling_factor"
    damaged = export(name)
    damaged.change(lambda tensors: tensors[key].fill_(1))
    assert damaged.sign().findings() == {"weights"}
    damaged.change(lambda tensors: tensors.pop(key))
    assert damaged.sign().findings() == {"contract", "read"}


def test_a_missing_truncated_or_exchanged_rank_file_is_found(export):
    damaged = export("int8_sq")
    first, second = damaged.weights
    first.rename(first.with_suffix(".away"))
    second.rename(first)
    assert damaged.findings() == {"files", "contract", "read"}
    first.with_suffix(".away").rename(second)
    assert damaged.sign().findings() == {"untouched", "weights"}
    second.write_bytes(second.read_bytes()[:-7])
    assert damaged.sign().findings() == {"contract", "read"}


def flip_bit(tensors):
    """One bit of an embedding."""
    name = max(tensors, key=lambda name: ("embed" in name, name))
    tensors[name].view(torch.int16).view(-1)[0] ^= 1


@pytest.mark.parametrize("file", [VISION, None])
def test_a_changed_tower_or_embedding_is_found(export, file):
    damaged = export("fp8")
    damaged.change(flip_bit, *([file] if file else []))
    assert damaged.sign().findings() == {"untouched"}


@pytest.mark.parametrize("key", ["pre_quant_scale", "exclude_modules", "group_size"])
@pytest.mark.parametrize("name", AWQ)
def test_a_config_under_which_scales_are_lost_is_found(export, name, key):
    for change in (lambda block: block.pop(key), lambda block: block.update({key: False})):
        damaged = export(name)
        damaged.configure(lambda config, change=change: change(config["quantization"]))
        assert "contract" in damaged.sign().findings()
        shutil.rmtree(damaged.folder)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2), (4, 4, 1), (3, 2, 1), (4, 2, 2)])
def test_a_wrong_mapping_is_found(export, sizes):
    damaged = export("fp8")
    mapping = dict(zip(("world_size", "tp_size", "pp_size"), sizes, strict=True))
    damaged.configure(lambda config: config.update(mapping=mapping))
    assert "contract" in damaged.sign().findings()


@pytest.mark.parametrize("key", ["quantization", "mapping", "vocab_size", "num_hidden_layers"])
def test_a_config_of_the_wrong_kind_is_a_finding_and_not_a_bug(export, key):
    damaged = export("fp8")
    damaged.configure(lambda config: config.update({key: None}))
    assert check_contract(damaged.folder / "llm")
