"""Where a model that is never cut answers: on the GPU if it has room; else the host, or nobody."""

from types import SimpleNamespace

import models
import pytest
import torch

from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.planning.forecast import full_model_bytes
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.stages import evaluate as evaluating
from nemo_vlm_ptq.stages import model_forms as forms
from nemo_vlm_ptq.stages import verify as proving


@pytest.fixture
def job():
    """A job of a rank with a GPU, whose log is a list."""
    said: list[str] = []
    parallel = SimpleNamespace(
        device=torch.device("cuda", 0), log=said.append, gather=lambda value: [True, value]
    )
    recipe = Recipe(model=str(models.TINY_LLAVA), workdir="work", quantize={"format": "fp8"})
    return SimpleNamespace(
        plan=make_plan(recipe), parallel=parallel, dtype=torch.bfloat16, said=said
    )


def leave(monkeypatch: pytest.MonkeyPatch, memory: float) -> None:
    monkeypatch.setattr(forms, "free_memory", lambda device: int(memory))


def test_the_host_answers_for_a_gpu_without_room(job, monkeypatch) -> None:
    needed = full_model_bytes(job.plan, 4)
    leave(monkeypatch, needed / 0.8)
    assert forms.reference_device(job, torch.float32) == job.parallel.device and not job.said
    leave(monkeypatch, needed)  # a tenth is left for all else
    assert forms.reference_device(job, torch.float32) == torch.device("cpu")
    assert job.said == [
        f"the GPU has no room for {needed / 1e9:,.1f} GB in torch.float32: asking the host"
    ]
    assert forms.reference_device(job, torch.bfloat16) == job.parallel.device


def test_evaluate_is_refused_where_one_rank_has_no_room(job, monkeypatch) -> None:
    leave(monkeypatch, full_model_bytes(job.plan, 2) / 0.8)
    evaluating._need_room(job)
    leave(monkeypatch, 1)
    with pytest.raises(UserError, match=r"GB in torch.bfloat16, and a GPU has no room for it; run"):
        evaluating._need_room(job)


def test_without_a_gpu_nobody_asks_for_room(job) -> None:
    job.parallel.device = torch.device("cpu")
    assert forms.reference_device(job, torch.float32) == torch.device("cpu") and not job.said


def test_a_gpu_that_ran_out_of_memory_is_no_finding_about_the_files(monkeypatch, tmp_path) -> None:
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("_check_files", "_check_configs"):
        monkeypatch.setattr(proving, name, lambda *_: [])
    monkeypatch.setattr(proving, "_check_content", run_out)
    job = SimpleNamespace(folder=lambda *_: tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        proving._check_target(job, FORMATS["fp8"], "hf", None)
