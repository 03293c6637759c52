"""Fake TensorRT-LLM installation on PATH, and plans and checkpoints for engine tests."""

import functools
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from models import ROOT, single_rank

from nemo_vlm_ptq.checkpoints.huggingface import open_source
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.workdir import store

FAKE = ROOT / "tests" / "fake_trtllm"
PYTHON = '#!/bin/sh\nPYTHONPATH={} exec {} "$@"\n'  # an interpreter that has the fake tensorrt_llm
SCRIPT = "#!{}\nfrom build_command import main\nmain()\n"
MPIRUN = '#!/bin/sh\nshift 3\nexec "$@"\n'  # drops --allow-run-as-root -n N


@dataclass
class FakeInstallation:
    """Fake installation and the calls that it recorded."""

    folder: Path
    calls: list[dict] = field(default_factory=list)

    def command_lines(self):
        """Return the arguments of each call so far."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        self.calls = [json.loads(line) for line in lines]
        return [call["args"] for call in self.calls]


def install(folder: Path, monkeypatch, version="1.2.1") -> FakeInstallation:
    """Install a fake TensorRT-LLM of a version in `folder` and put it on PATH."""
    programs, metadata = folder / "bin", folder / "site" / f"tensorrt_llm-{version}.dist-info"
    programs.mkdir(parents=True)
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}"
    )
    python = programs / "python-of-trtllm"
    scripts = {
        python.name: PYTHON.format(f"{FAKE}:{folder / 'site'}", sys.executable),
        "trtllm-build": SCRIPT.format(python),
        "mpirun": MPIRUN,
    }
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_RECORD", str(folder / "calls"))
    return FakeInstallation(folder)


@functools.cache
def base_plan(family):
    """Return the plan of a tiny model; cached, because it reads the model's files."""
    return make_plan(Recipe(model=str(ROOT / "assets" / f"tiny-{family}"), workdir="none"))


def plan_for(family, workdir, fmt="fp8", tensor=1, pipeline=1, **keys):
    """Return the plan of a tiny model for engines of one format and any serving layout."""
    kv_cache = keys.pop("kv_cache", "none")
    engine = keys.pop("engine", {})
    if family == "vila":
        engine = {"vila_path": str(ROOT)} | engine
    recipe = Recipe(
        model=base_plan(family).recipe.model,
        workdir=str(workdir),
        parallel={"tensor": 1, "pipeline": 1, "data": 1},
        quantize={"format": fmt, "kv_cache": kv_cache},
        export={"targets": ("trtllm",), "tensor": tensor, "pipeline": pipeline},
        engine=engine,
        **keys,
    )
    return replace(base_plan(family), recipe=recipe)


def write_checkpoint(plan) -> Path:
    """Write what the fake installation and the vision module read of FORMAT/trtllm/."""
    (fmt,) = plan.formats
    folder = Path(plan.recipe.workdir) / fmt.name / "trtllm"
    store.begin_stage(folder, {})
    for name in ("llm", "vision"):
        (folder / name).mkdir()
    export = plan.recipe.export
    mapping = {"world_size": export.tensor * export.pipeline}
    config = {"vocab_size": plan.decoder.vocab, "mapping": mapping}
    store.write_json(folder / "llm" / "config.json", config)
    with open_source(plan.tensors) as reader:
        vision = {name: reader.get_tensor(name) for name in plan.vision_names}
    store.save_tensors(vision, folder / "vision" / "model.safetensors")
    files = store.hash_files(folder, ["llm/config.json", "vision/model.safetensors"])
    store.finish_stage(folder, stage="export", settings={}, files=files, facts={})
    return folder


def run(stage, plan, *options):
    """Run a stage, or another function of a RunContext, on a single rank in this process."""
    with single_rank() as parallel:
        return stage(RunContext(plan=plan, parallel=parallel), *options)
