"""Contract checks of the config of a checkpoint folder."""

import re

import pytest
from encoded_models import write_trtllm
from test_contract import HEAD, edit_config, encoded_model
from test_contract_damage import KV_SCALE, LAYER, QKV, assert_findings, edit_rank

from nemo_vlm_ptq.targets.trtllm.contract import check_contract

INFINITE = float("inf")
NOT_JSON = " cannot be read: * is not a JSON number"


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("int4_awq", {"group_size": 64}, "must have shape [256, 8], got [256, 4]"),
        ("int4_awq", {"quant_algo": "W4A8_AWQ"}, "activation_scaling_factor is missing"),
        ("fp8", {"quant_algo": None}, "must have dtype BF16, got F8_E4M3"),
        (
            "fp8",
            {"kv_cache_quant_algo": None},
            f"unexpected tensor {LAYER}attention.kv_cache_scaling_factor",
        ),
        ("nvfp4", {"quant_algo": "FP8"}, "must have dtype F8_E4M3, got U8"),
        (
            "w4a8_awq",
            {"quant_algo": "W4A16_AWQ"},
            f"unexpected tensor {LAYER}mlp.fc.activation_scaling_factor",
        ),
    ],
)
def test_config_of_another_format_is_reported(tmp_path, name, changes, expected):
    write_trtllm(tmp_path / "llm", encoded_model(name), (2, 1), "fp8")
    edit_config(tmp_path / "llm", lambda config: config["quantization"].update(changes))
    assert any(finding.endswith(expected) for finding in check_contract(tmp_path / "llm"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 500}, f"{HEAD} must have shape [250, 512], got [251, 512]"),
        ({"num_hidden_layers": 3}, "tensor transformer.layers.2.mlp.fc.weight is missing"),
        ({"num_hidden_layers": 1}, f"unexpected tensor {LAYER}mlp.fc.weight"),
        ({"num_key_value_heads": 4}, f"{QKV}weight must have shape [384, 512], got [512, 512]"),
        (
            {"architecture": "Phi3ForCausalLM", "hidden_act": "swiglu", "rotary_pct": 1.0},
            f"unexpected tensor {LAYER}mlp.gate.weight",
        ),
    ],
)
def test_config_of_another_model_is_reported(checkpoint, changes, expected):
    edit_config(checkpoint, lambda config: config.update(changes))
    assert f"rank1.safetensors: {expected}" in check_contract(checkpoint)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda config: config.pop("rotary_pct"),
            "rotary_pct is missing; Phi3ForCausalLM requires it",
        ),
        (
            lambda config: config.pop("longrope_scaling_long_factors"),
            "longrope_scaling_long_factors is missing",
        ),
        (
            lambda config: config.update(longrope_scaling_short_factors=[1.0] * 15),
            "longrope_scaling_short_factors must hold 16 positive factors, got 15",
        ),
        (
            lambda config: config.update(original_max_position_embeddings=512),
            "original_max_position_embeddings must be between 1 and max_position_embeddings 256, "
            "got 512",
        ),
        (
            lambda config: config.update(hidden_act="silu"),
            "unsupported hidden_act 'silu'; supported: swiglu",
        ),
        (
            lambda config: config["mapping"].update(pp_size=2, world_size=4),
            "Phi3ForCausalLM has no pipeline parallelism: pp_size must be 1, got 2",
        ),
    ],
)
def test_damaged_phi_config_is_reported(tmp_path, edit, expected):
    write_trtllm(tmp_path / "llm", encoded_model("fp8", "phi"), (2, 1))
    edit_config(tmp_path / "llm", edit)
    assert_findings(tmp_path / "llm", f"config.json: {expected}")


def test_common_kv_scale_must_be_the_larger_of_key_and_value_scales(checkpoint):
    names = [KV_SCALE.replace("kv_", f"{part}_") for part in "kv"]

    def add_scales(key, value):
        factors = zip(names, (key, value), strict=True)
        return lambda tensors: tensors.update(
            {name: tensors[KV_SCALE] * factor for name, factor in factors}
        )

    for rank in range(2):
        edit_rank(checkpoint, rank, add_scales(0.5, 1.0))
    assert check_contract(checkpoint) == []
    for rank in range(2):
        edit_rank(checkpoint, rank, add_scales(0.5, 0.75))
    assert_findings(
        checkpoint,
        f"rank0.safetensors: {KV_SCALE} must be the larger of the key and value scales",
    )


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "null"])
def test_config_that_is_no_json_object_is_reported(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    assert len(check_contract(checkpoint)) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, a rank file holds *"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be at most *"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer, got -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a positive integer, got 2.0"),
        ({"hidden_size": 10**15}, "hidden_size must be at most *"),
        ({"vocab_size": 10**300}, "vocab_size must be at most *"),
        ({"head_size": 0}, "head_size must be a positive integer, got 0"),
        (
            {"mapping": {"world_size": 10**12, "tp_size": 10**12, "pp_size": 1}},
            "mapping.world_size must be at most 1024, *",
        ),
        ({"rotary_base": INFINITE}, NOT_JSON),
        ({"rotary_base": float("nan")}, NOT_JSON),
        ({"rotary_base": "10000"}, "rotary_base must be greater than 1, got '10000'"),
        ({"rotary_base": True}, "rotary_base must be greater than 1, got True"),
        ({"rotary_base": None}, "rotary_base must be greater than 1, got None"),
        ({"rotary_pct": 0}, "rotary_pct must be above 0 and at most 1, got 0"),
        ({"rotary_scaling": ["type"]}, "rotary_scaling must have the key type or rope_type"),
        (
            {"rotary_scaling": {"type": "linear", "factor": [1.0, -INFINITE]}},
            NOT_JSON,
        ),
        ({"norm_epsilon": INFINITE}, NOT_JSON),
        ({"norm_epsilon": "1e-5"}, "norm_epsilon must be between 0 and 1, got '1e-5'"),
        ({"more": {"deep": [{"x": INFINITE}]}}, NOT_JSON),
    ],
)
def test_sizes_and_numbers_of_no_model_are_findings_at_once(checkpoint, changes, expected):
    edit_config(checkpoint, lambda config: config.update(changes))
    found = check_contract(checkpoint)
    where = "config.json" if expected == NOT_JSON else "config.json: "
    pattern = re.escape(f"{where}{expected}").replace(r"\*", ".*")
    assert re.fullmatch(pattern, found[0]), found


@pytest.mark.parametrize("size", [10**15, -128, True, "128", 0])
def test_a_group_size_of_no_kernel_is_a_finding(tmp_path, size):
    write_trtllm(tmp_path / "llm", encoded_model("int4_awq"), (1, 1))
    edit_config(tmp_path / "llm", lambda config: config["quantization"].update(group_size=size))
    expected = f"config.json: group_size of W4A16_AWQ must be 64 or 128, got {size}"
    assert check_contract(tmp_path / "llm") == [expected]


def test_an_exponent_beyond_float_is_a_finding(checkpoint):
    text = (checkpoint / "config.json").read_text()
    text = re.sub(r'"rotary_base": [0-9.]+', '"rotary_base": 1e999', text)
    (checkpoint / "config.json").write_text(text)
    (found,) = check_contract(checkpoint)
    assert found.endswith("config.json is not valid JSON: 1e999 is beyond the range of numbers")
