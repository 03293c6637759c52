"""compute_in_dtype: a model that computes in float32 with weights stored in 16 bit."""

import models
import pytest
import torch
from quantized_models import CASES, compute_logits, quantized_model

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.compute_dtype import compute_in_dtype
from nemo_vlm_ptq.targets.megatron import quantizers


@pytest.fixture(scope="module")
def parallel():
    with models.single_rank() as parallel:
        yield parallel


def make_model(parallel, name, kv_cache):
    model = quantized_model(parallel, name, kv_cache, torch.bfloat16)
    quantizers.use_custom_backends(model, FORMATS[name])
    return model


@pytest.mark.parametrize(("name", "kv_cache"), CASES)
def test_results_match_a_cast_model_and_tensors_are_restored(parallel, name, kv_cache) -> None:
    model = make_model(parallel, name, kv_cache)
    cast_model = make_model(parallel, name, kv_cache).to(torch.float32)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = [(key, tensor.dtype, tensor.data_ptr()) for key, tensor in tensors]
    values = [tensor.clone() for _, tensor in tensors]
    compute_in_dtype(model, torch.float32)
    logits = compute_logits(model)
    assert [(key, tensor.dtype, tensor.data_ptr()) for key, tensor in tensors] == before
    assert all(torch.equal(a, b) for (_, a), b in zip(tensors, values, strict=True))
    assert torch.equal(logits, compute_logits(cast_model))


def test_tensors_are_restored_after_an_exception(parallel) -> None:
    model = make_model(parallel, "fp8", "none")
    compute_in_dtype(model, torch.float32)
    layer = model.decoder.layers[0]
    with pytest.raises(RuntimeError):
        layer(torch.zeros(3, 1, 5), attention_mask=None)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
