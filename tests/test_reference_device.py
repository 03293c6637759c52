"""Device of the unsharded reference model: a GPU if it fits there, else the CPU or an error."""

from types import SimpleNamespace

import models
import pytest
import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages.evaluate import _require_memory
from nemo_vlm_ptq.verify import model_forms, target


@pytest.fixture
def context():
    """Return a fake context of a rank with a GPU; its log is the list `messages`."""
    messages: list[str] = []
    parallel = SimpleNamespace(
        device=torch.device("cuda", 0),
        log=messages.append,
        all_gather=lambda value: [True, value],
    )
    recipe = Recipe(model=str(models.TINY_LLAVA), workdir="work", quantize={"format": "fp8"})
    return SimpleNamespace(
        plan=make_plan(recipe), parallel=parallel, dtype=torch.bfloat16, messages=messages
    )


def set_free_memory(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    monkeypatch.setattr(model_forms, "free_memory", lambda device: int(memory))


def test_the_cpu_is_used_if_the_model_does_not_fit_on_the_gpu(context, monkeypatch) -> None:
    size = full_model_bytes(context.plan, 4)
    gpu, cpu = context.parallel.device, torch.device("cpu")
    set_free_memory(monkeypatch, size / 0.8)
    assert model_forms.reference_device(context, torch.float32) == gpu
    assert not context.messages
    set_free_memory(monkeypatch, size)  # a tenth of the free memory stays unused
    assert model_forms.reference_device(context, torch.float32) == cpu
    assert context.messages == [
        f"{size / 1e9:,.1f} GB in torch.float32 do not fit on the GPU: using the CPU"
    ]
    assert model_forms.reference_device(context, torch.bfloat16) == gpu


def test_evaluate_is_rejected_if_the_model_does_not_fit_on_one_rank(context, monkeypatch) -> None:
    set_free_memory(monkeypatch, full_model_bytes(context.plan, 2) / 0.8)
    _require_memory(context)
    set_free_memory(monkeypatch, 1)
    with pytest.raises(UserError, match=r"GB in torch.bfloat16, and it does not fit; run"):
        _require_memory(context)


def test_without_a_gpu_memory_is_not_checked(context) -> None:
    context.parallel.device = torch.device("cpu")
    assert model_forms.reference_device(context, torch.float32) == torch.device("cpu")
    assert not context.messages


def test_running_out_of_gpu_memory_is_not_a_finding_about_the_files(
    context, monkeypatch, tmp_path
) -> None:
    def run_out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(target, "check_files", lambda folder: [])
    checks = SimpleNamespace(check=lambda *_: [])
    monkeypatch.setattr(target, "load_module", lambda *_: checks)
    monkeypatch.setattr(target.TargetVerifier, "_check_content", run_out_of_memory)
    context.folder = context.export_folder = lambda *_: tmp_path
    verifier = target.TargetVerifier(context, FORMATS["fp8"], "hf", None)
    with pytest.raises(torch.OutOfMemoryError):
        verifier.run()
