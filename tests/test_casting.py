"""A model that computes in float32 while its weights stay in 16 bit."""

import models
import pytest
import torch
from quantized_models import CASES, ask, quantized

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.compute_dtype import compute_in_dtype
from nemo_vlm_ptq.targets.megatron import quantizers


@pytest.fixture(scope="module")
def own():
    with models.alone() as parallel:
        yield parallel


def made(own, name, kv):
    model = quantized(own, name, kv, torch.bfloat16)
    quantizers.use_custom_backends(model, FORMATS[name])
    return model


@pytest.mark.parametrize(("name", "kv"), CASES)
def test_it_computes_what_the_cast_model_computes_and_is_as_it_was(own, name, kv) -> None:
    model, whole = made(own, name, kv), made(own, name, kv).to(torch.float32)
    state = [*model.named_parameters(), *model.named_buffers()]
    before = [(key, tensor.dtype, tensor.data_ptr()) for key, tensor in state]
    values = [tensor.clone() for _, tensor in state]
    compute_in_dtype(model, torch.float32)
    found = ask(model)
    assert [(key, tensor.dtype, tensor.data_ptr()) for key, tensor in state] == before
    assert all(torch.equal(a, b) for (_, a), b in zip(state, values, strict=True))
    assert torch.equal(found, ask(whole))


def test_a_layer_that_fails_is_left_as_it_was(own) -> None:
    model = made(own, "fp8", "none")
    compute_in_dtype(model, torch.float32)
    layer = model.decoder.layers[0]
    with pytest.raises(RuntimeError):
        layer(torch.zeros(3, 1, 5), attention_mask=None)
    assert {one.dtype for one in layer.parameters()} == {torch.bfloat16}
