"""A quantized Megatron model computes the same once saved and loaded, and on any tensor ranks."""

import sys
from pathlib import Path

import modelopt.torch.opt as mto
import models
import pytest
import torch
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state
from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
from quantized_models import CASES, DECODER, ask, fill, inserted, quantized

from nemo_vlm_ptq.formats import FORMATS, KV_CACHES
from nemo_vlm_ptq.megatron import checkpoint
from nemo_vlm_ptq.megatron.attention import SdpaCoreAttention
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import save_model
from nemo_vlm_ptq.targets.megatron import quant_modules as modules
from nemo_vlm_ptq.targets.megatron import quantizers

TENSOR_RANKS = [(1, 1, 2), (2, 1, 1)]


@pytest.fixture(scope="module")
def own():
    with models.alone() as parallel:
        yield parallel


def tensors_of(model):
    return {key: one for key, one in model.state_dict().items() if isinstance(one, torch.Tensor)
            and not key.endswith("_extra_state")}  # fmt: skip


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_saved_and_loaded_it_is_the_same(own, tmp_path, name, kv):
    first = quantized(own, name, kv, torch.bfloat16)
    save_model(first, tmp_path)
    quantizers.save_modelopt_state(first, tmp_path)
    second = inserted(own, name, kv, torch.bfloat16)
    fill(second, own, name, kv, torch.bfloat16)
    for buffer in second.buffers():
        buffer.zero_()  # so that it is seen to come from the checkpoint
    models.load_with_megatron(second, tmp_path)
    expected, found = tensors_of(first), tensors_of(second)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
    for model in (first, second):
        quantizers.use_custom_backends(model, FORMATS[name])
    assert torch.equal(ask(second), ask(first))


@pytest.mark.parametrize(("wanted", "files"), [(1, 2), (5, 5), (20, 8)])
def test_a_large_model_is_written_into_more_files(own, tmp_path, monkeypatch, wanted, files):
    first = build_decoder(DECODER, own, torch.bfloat16)
    second = build_decoder(DECODER, own, torch.bfloat16)
    for parameter in first.parameters():
        parameter.data.normal_()
    size = sum(parameter.nbytes for parameter in first.parameters())
    monkeypatch.setattr(checkpoint, "FILE", -(-size // wanted))
    checkpoint.save_model(first, tmp_path)
    assert len(list(tmp_path.glob("__0_*.distcp"))) == files
    checkpoint.load_model(second, tmp_path)
    for key, tensor in tensors_of(first).items():
        assert torch.equal(tensors_of(second)[key], tensor), key


@pytest.mark.parametrize(
    ("name", "kv"),
    [(name, "none") for name in ("fp8_pc_pt", "nvfp4", "nvfp4_awq", "int8_wo", "int4_wo")]
    + [("nvfp4", kv) for kv in KV_CACHES],
)
def test_modelopt_restores_the_saved_model_by_itself(own, tmp_path, request, name, kv):
    first = quantized(own, name, kv, torch.bfloat16)
    save_model(first, tmp_path)
    quantizers.save_modelopt_state(first, tmp_path)
    if kv != "none":  # it has to know the attention, as it knows TransformerEngine's
        QuantModuleRegistry.register({SdpaCoreAttention: "SdpaCoreAttention"})(modules.KvAttention)
        request.addfinalizer(lambda: QuantModuleRegistry.unregister(SdpaCoreAttention))
    second = build_decoder(DECODER, own, torch.bfloat16)
    for parameter in second.parameters():
        parameter.zero_()  # it makes maxima of whatever is there before it loads the saved ones
    assert not mto.ModeloptStateManager.is_converted(second)
    restore_sharded_modelopt_state([second], tmp_path)
    models.load_with_megatron(second, tmp_path)
    backends = [one.backend for one in second.modules() if isinstance(one, TensorQuantizer)]
    assert backends and not any(backends)
    for model in (first, second):
        quantizers.use_custom_backends(model, FORMATS[name])
    assert torch.equal(ask(second), ask(first))


def main():
    """Ranks: FOLDER; logits of each format with and without rounded activations, a layout a file.

    Every layout also saves its SVDQuant model, and the second loads that of the first.
    """
    folder = Path(sys.argv[1])
    for own in models.each_layout(TENSOR_RANKS):
        word, found = str(own.layout.tensor), {}
        for name, kv in CASES:
            model = quantized(own, name, kv, torch.float32)
            if (name, kv) == ("nvfp4_svdquant", "fp8"):
                target = folder / f"saved{word}"
                if own.rank == 0:
                    target.mkdir()
                own.barrier()
                save_model(model, target)
            quantizers.use_custom_backends(model, FORMATS[name])
            found[f"{name} {kv} rounded"] = ask(model)
            quantizers.disable_activation_quantizers(model)
            found[f"{name} {kv} exact"] = ask(model)
        if own.layout.tensor == 2:
            other = inserted(own, "nvfp4_svdquant", "fp8", torch.float32)
            fill(other, own, "nvfp4_svdquant", "fp8", torch.float32)
            expected = {key: one.clone() for key, one in tensors_of(other).items() if "low_" in key}
            for buffer in other.buffers():
                buffer.zero_()
            models.load_with_megatron(other, folder / "saved1")
            branches = tensors_of(other)
            same = all(torch.equal(branches[key], one) for key, one in expected.items())
            found["branches"] = torch.tensor([len(expected), same])
        if own.rank == 0:
            torch.save(found, folder / f"logits{word}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(tensor 1, tensor 2) -> what the ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = models.launch([*models.main_of("test_quantized_saved"), folder], 2)
    assert code == 0, err[-3000:]
    return [torch.load(folder / f"logits{T}") for T in (1, 2)]


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_tensor_ranks_compute_the_same(ranks, name, kv):
    """Activations next to half way between two codes may go to either."""
    alone, cut_in_two = ranks
    exact, rounded = f"{name} {kv} exact", f"{name} {kv} rounded"
    torch.testing.assert_close(cut_in_two[exact], alone[exact], rtol=1e-4, atol=1e-4)
    rounding = (alone[rounded] - alone[exact]).norm()  # how many lie there is the CPU's affair
    allowed = max(0.02 * alone[rounded].norm(), 0.75 * rounding)
    assert (cut_in_two[rounded] - alone[rounded]).norm() <= allowed


def test_a_branch_saved_by_one_rank_is_cut_for_two(ranks):
    assert ranks[1]["branches"].tolist() == [2 * 4 * DECODER.layers, 1]
