"""TensorRT-LLM that is none, on PATH: what tests of the engine build and of engines share."""

import functools
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from models import ROOT, alone

from nemo_vlm_ptq.checkpoints.huggingface import open_source
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.plan import make_plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.workdir import store

FAKE = ROOT / "tests" / "fake_trtllm"
PYTHON = '#!/bin/sh\nPYTHONPATH={} exec {} "$@"\n'  # one that has tensorrt_llm, as ours has not
SCRIPT = "#!{}\nfrom build_command import main\nmain()\n"
MPIRUN = '#!/bin/sh\nshift 3\nexec "$@"\n'  # --allow-run-as-root -n N


@dataclass
class Installed:
    """The pretended installation, and what was asked of it."""

    folder: Path
    calls: list[dict] = field(default_factory=list)

    def words(self):
        """Words of each call so far."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        self.calls = [json.loads(line) for line in lines]
        return [call["words"] for call in self.calls]


def install(folder: Path, monkeypatch, version="1.2.1") -> Installed:
    """TensorRT-LLM of a version on PATH, in `folder`."""
    programs, about = folder / "bin", folder / "site" / f"tensorrt_llm-{version}.dist-info"
    programs.mkdir(parents=True)
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
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
    return Installed(folder)


@functools.cache
def base(family):
    """The plan of a little model; its files are read once."""
    return make_plan(Recipe(model=str(ROOT / "assets" / f"tiny-{family}"), workdir="none"))


def plan_for(family, work, fmt="fp8", tensor=1, pipeline=1, **keys):
    """The plan of a little model for engines of one format, for any ranks."""
    kv_cache = keys.pop("kv_cache", "none")
    engine = keys.pop("engine", {})
    if family == "vila":
        engine = {"vila_path": str(ROOT)} | engine
    recipe = Recipe(
        model=base(family).recipe.model,
        workdir=str(work),
        parallel={"tensor": 1, "pipeline": 1, "data": 1},
        quantize={"format": fmt, "kv_cache": kv_cache},
        export={"targets": ("trtllm",), "tensor": tensor, "pipeline": pipeline},
        engine=engine,
        **keys,
    )
    return replace(base(family), recipe=recipe)


def write_checkpoint(plan) -> Path:
    """FORMAT/trtllm/ as far as TensorRT-LLM's place-holder and the tower read it."""
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
        vision = {name: reader.whole(name) for name in plan.vision_names}
    store.save_tensors(vision, folder / "vision" / "model.safetensors")
    files = store.hash_files(folder, ["llm/config.json", "vision/model.safetensors"])
    store.finish_stage(folder, stage="export", settings={}, files=files, facts={})
    return folder


def run(stage, plan, *options):
    """A stage, or another function of a job, in this process alone."""
    with alone() as own:
        return stage(RunContext(plan, own), *options)
