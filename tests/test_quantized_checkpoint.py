"""A quantized Megatron model computes the same after save and load, and at any TP size."""

import sys
from pathlib import Path

import modelopt.torch.opt as mto
import models
import pytest
import torch
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
from quantized_models import (
    CASES,
    DECODER,
    compute_logits,
    fill_quantizers,
    model_with_quantizers,
    quantized_model,
)

from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.megatron import checkpoint
from nemo_vlm_ptq.megatron.attention import SdpaCoreAttention
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import save_model
from nemo_vlm_ptq.targets.megatron import quant_modules, quantizers

LAYOUTS = [(1, 1, 2), (2, 1, 1)]  # TP, PP, DP


@pytest.fixture(scope="module")
def parallel():
    with models.single_rank() as parallel:
        yield parallel


def tensors_of(model):
    return {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not key.endswith("_extra_state")
    }


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
def test_loaded_model_equals_the_saved_one(parallel, tmp_path, name, kv_cache):
    saved = quantized_model(parallel, name, kv_cache, torch.bfloat16)
    save_model(saved, tmp_path)
    quantizers.save_modelopt_state(saved, tmp_path)
    loaded = model_with_quantizers(parallel, name, kv_cache, torch.bfloat16)
    fill_quantizers(loaded, parallel, name, kv_cache, torch.bfloat16)
    for buffer in loaded.buffers():
        buffer.zero_()  # so that only values from the checkpoint pass
    models.load_with_megatron(loaded, tmp_path)
    expected, found = tensors_of(saved), tensors_of(loaded)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
    for model in (saved, loaded):
        quantizers.use_custom_backends(model, FORMATS[name])
    assert torch.equal(compute_logits(loaded), compute_logits(saved))


@pytest.mark.parametrize(("target_files", "files"), [(1, 2), (5, 5), (20, 8)])
def test_number_of_files_depends_on_the_model_size(
    parallel, tmp_path, monkeypatch, target_files, files
):
    saved = build_decoder(DECODER, parallel, torch.bfloat16)
    loaded = build_decoder(DECODER, parallel, torch.bfloat16)
    for parameter in saved.parameters():
        parameter.data.normal_()
    size = sum(parameter.nbytes for parameter in saved.parameters())
    monkeypatch.setattr(checkpoint, "FILE_BYTES", -(-size // target_files))
    checkpoint.save_model(saved, tmp_path)
    assert len(list(tmp_path.glob("__0_*.distcp"))) == files
    checkpoint.load_model(loaded, tmp_path)
    found = tensors_of(loaded)
    for key, tensor in tensors_of(saved).items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("name", "kv_cache"),
    [(name, "none") for name in ("fp8_pc_pt", "nvfp4", "nvfp4_awq", "int8_wo", "int4_wo")]
    + [("nvfp4", kv_cache) for kv_cache in KV_CACHES],
)
def test_modelopt_restores_the_saved_model(parallel, tmp_path, request, name, kv_cache):
    saved = quantized_model(parallel, name, kv_cache, torch.bfloat16)
    save_model(saved, tmp_path)
    quantizers.save_modelopt_state(saved, tmp_path)
    if kv_cache != "none":  # modelopt registers only TransformerEngine's attention
        QuantModuleRegistry.register({SdpaCoreAttention: "SdpaCoreAttention"})(
            quant_modules.KvQuantAttention
        )
        request.addfinalizer(lambda: QuantModuleRegistry.unregister(SdpaCoreAttention))
    restored = build_decoder(DECODER, parallel, torch.bfloat16)
    for parameter in restored.parameters():
        parameter.zero_()  # modelopt computes amaxes of the weights before it loads the saved ones
    assert not mto.ModeloptStateManager.is_converted(restored)
    restore_sharded_modelopt_state([restored], tmp_path)
    models.load_with_megatron(restored, tmp_path)
    backends = [
        module.backend for module in restored.modules() if isinstance(module, TensorQuantizer)
    ]
    assert backends and not any(backends)
    for model in (saved, restored):
        quantizers.use_custom_backends(model, FORMATS[name])
    assert torch.equal(compute_logits(restored), compute_logits(saved))


def main():
    """Ranks: save logits of each case with and without activation quantization to FOLDER.

    Each layout also saves its SVDQuant model, and the second layout loads that of the first.
    """
    folder = Path(sys.argv[1])
    for parallel in models.parallel_contexts(LAYOUTS):
        tensor_size, results = parallel.layout.tensor, {}
        for name, kv_cache in CASES:
            model = quantized_model(parallel, name, kv_cache, torch.float32)
            if (name, kv_cache) == ("nvfp4_svdquant", "fp8"):
                saved = folder / f"saved{tensor_size}"
                if parallel.rank == 0:
                    saved.mkdir()
                parallel.barrier()
                save_model(model, saved)
            quantizers.use_custom_backends(model, FORMATS[name])
            results[f"{name} {kv_cache} rounded"] = compute_logits(model)
            quantizers.disable_activation_quantizers(model)
            results[f"{name} {kv_cache} exact"] = compute_logits(model)
        if tensor_size == 2:
            results["branches"] = reload_branches(parallel, folder / "saved1")
        if parallel.rank == 0:
            torch.save(results, folder / f"logits{tensor_size}")


def reload_branches(parallel, folder):
    """Load a TP 1 checkpoint; return [number of branch tensors, whether all are as expected]."""
    model = model_with_quantizers(parallel, "nvfp4_svdquant", "fp8", torch.float32)
    fill_quantizers(model, parallel, "nvfp4_svdquant", "fp8", torch.float32)
    expected = {key: value.clone() for key, value in tensors_of(model).items() if "low_" in key}
    for buffer in model.buffers():
        buffer.zero_()
    models.load_with_megatron(model, folder)
    found = tensors_of(model)
    same = all(torch.equal(found[key], value) for key, value in expected.items())
    return torch.tensor([len(expected), same])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of TP 1 and of TP 2."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [*models.main_command("test_quantized_checkpoint"), folder]
    code, _, err = models.launch_ranks(arguments, 2)
    assert code == 0, err[-3000:]
    return [torch.load(folder / f"logits{T}") for T in (1, 2)]


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
def test_tensor_parallel_logits_match(results, name, kv_cache):
    """Activations near a rounding tie may round differently at another TP size."""
    single, sharded = results
    exact, rounded = f"{name} {kv_cache} exact", f"{name} {kv_cache} rounded"
    torch.testing.assert_close(sharded[exact], single[exact], rtol=1e-4, atol=1e-4)
    rounding = (single[rounded] - single[exact]).norm()  # the number of ties depends on the CPU
    tolerance = max(0.02 * single[rounded].norm(), 0.75 * rounding)
    assert (sharded[rounded] - single[rounded]).norm() <= tolerance


def test_branch_saved_with_tp_1_loads_with_tp_2(results):
    assert results[1]["branches"].tolist() == [2 * 4 * DECODER.layers, 1]
