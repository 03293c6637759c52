"""Fixtures that several files share: a tiny random LLaVA, and work folders of a trained one.

What they need is imported late: most tests need no torch.
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import nemo_vlm_ptq  # noqa: F401  before torch, which it has settings for

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command sets it


@pytest.fixture(scope="session")
def llava():
    """transformers' model with random weights."""
    from models import build_llava

    return build_llava()


@pytest.fixture(scope="session")
def tiny(llava, tmp_path_factory):
    """The random model as folders, and what transformers says to three cases, sample by sample."""
    import models
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    cases = {
        "images": models.random_questions((40, 40), (0, 1), seed=1),
        "text": models.random_questions((33, 33), (), seed=2),
        "padded": models.random_questions((41, 19, 30), (0, 2), seed=3),
    }
    tensors = {name: [vars(one) for one in case] for name, case in cases.items()}
    torch.save(tensors, folder / "cases")
    return models.TinyModel(
        models.write_llava(llava, folder / "float32", torch.float32),
        models.write_llava(llava, folder / "bfloat16", torch.bfloat16),
        folder / "cases",
        {
            name: [models.transformers_logits(llava, one) for one in case]
            for name, case in cases.items()
        },
    )


@pytest.fixture(scope="session")
def works(tmp_path_factory):
    """TPxPPxDP -> work folder of the little trained model, from import to export.

    One rank in this process; two ranks, in one launch, in the three ways to use them.
    """
    import models

    folder = tmp_path_factory.getbasetemp() / "works"
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: the first makes it for all
        folder = folder.parents[1] / "works"
    words = ("1x1x2", "1x2x1", "2x1x1")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            with models.single_rank() as own:
                models.run_all_stages(own, folder / "1x1x1")
            main = models.main_command("test_layout_independence")
            code, _, err = models.launch_ranks([*main, folder, *words], 2)
            assert code == 0, err[-3000:]
            (folder / "made").touch()
    return {word: folder / word for word in ("1x1x1", *words)}


@dataclass
class Export:
    """A copy of an exported target, to be damaged."""

    folder: Path
    target: str  # trtllm or hf

    @property
    def weights(self):
        """The files of the decoder's weights."""
        return sorted(self.folder.glob("llm/rank*" if self.target == "trtllm" else "model-*"))

    def change(self, change, *files):
        """Pass the tensors of each file through a function that changes them in place."""
        from safetensors.torch import load_file, save_file

        for path in [self.folder / name for name in files] or self.weights:
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)

    def configure(self, change, name="llm/config.json"):
        """Pass a JSON file through a function that changes it in place."""
        config = json.loads((self.folder / name).read_text())
        change(config)
        (self.folder / name).write_text(json.dumps(config))

    def sign(self):
        """Make the manifest agree with the files; returns the copy."""
        from nemo_vlm_ptq.workdir import store

        manifest = store.read_manifest(self.folder)
        names = [name for name in manifest["files"] if (self.folder / name).is_file()]
        manifest["files"] = store.hash_files(self.folder, names)
        store.write_json(self.folder / store.MANIFEST, manifest)
        return self

    def read(self):
        """(decoder, tower and projector), by the independent readers."""
        from models import TINY_LLAVA, WEIGHTS
        from safetensors.torch import load_file

        from nemo_vlm_ptq.families import llava, read_config
        from nemo_vlm_ptq.reference.checkpoint import ReadCheckpoint
        from nemo_vlm_ptq.targets.hf.reader import read_unified
        from nemo_vlm_ptq.targets.trtllm.reader import read_trtllm

        if self.target == "trtllm":
            read = read_trtllm(self.folder / "llm", llava.FAMILY.decoder_prefix)
            return read, load_file(self.folder / "vision" / WEIGHTS)
        read, names = (
            read_unified(self.folder, llava.FAMILY),
            llava.FAMILY.vision_shapes(read_config(TINY_LLAVA)),
        )
        plain = {name: tensor for name, tensor in read.plain.items() if name not in names}
        vision = {name: tensor for name, tensor in read.plain.items() if name in names}
        return ReadCheckpoint(read.linears, plain), vision

    def changed(self):
        """Files that are not as the manifest says."""
        from nemo_vlm_ptq.verify.files import check_files

        return check_files(self.folder)

    def findings(self):
        """Names of the checks that find something; tensors are compared when all are there."""
        from nemo_vlm_ptq.errors import VerificationError
        from nemo_vlm_ptq.targets.trtllm.contract import check_contract

        found = {"files": self.changed()}
        if self.target == "trtllm":
            found["contract"] = check_contract(self.folder / "llm")
        try:
            found |= compare_with_source(*self.read())
        except VerificationError as error:
            found["read"] = [str(error)]
        return {name for name, problems in found.items() if problems}


def compare_with_source(read, vision):
    """Check -> findings, of tensors against the names and values of the model they came from."""
    import models
    import torch

    from nemo_vlm_ptq.checkpoints.huggingface import list_tensors, open_source
    from nemo_vlm_ptq.families import llava, read_config
    from nemo_vlm_ptq.verify import tensors as checks

    decoder = llava.decoder(read_config(models.TINY_LLAVA))
    rows = llava.FAMILY.parameter_map(decoder)
    linears = decoder.shapes(tuple(row for row in rows if row.is_linear))
    found = {"coverage": checks.check_names(read, decoder.shapes(rows))}
    found["set"] = checks.check_quantized_set(read, linears)
    if found["coverage"]:
        return found
    with open_source(list_tensors(models.TINY_LLAVA, llava.NAME_ALIASES)) as source:
        plain = read.plain | vision
        found["untouched"] = checks.check_untouched(plain, source, torch.bfloat16)
        cpu = torch.device("cpu")
        found["weights"] = checks.check_linears(read.linears, source, torch.bfloat16, cpu)[0]
    return found


@pytest.fixture
def export(works, tmp_path):
    """(format, target) -> a copy of what two tensor ranks wrote for two inference ranks."""

    def copy(name, target="trtllm"):
        folder = tmp_path / name / target
        shutil.copytree(works["2x1x1"] / name / target, folder)
        return Export(folder, target)

    return copy


@pytest.fixture
def verification(works, tmp_path):
    """(the whole stage verify of an fp8 export, its folder), to be damaged."""
    shutil.copytree(works["2x1x1"] / "fp8", tmp_path / "fp8")
    return verifier(tmp_path, ["fp8"]), tmp_path / "fp8"


def verifier(folder, formats, targets=("trtllm", "hf")):
    """What runs verify in a work folder, for formats that are exported there for two ranks."""
    import models

    from nemo_vlm_ptq.context import RunContext
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.recipe import Recipe
    from nemo_vlm_ptq.stages.verify import verify
    from nemo_vlm_ptq.workdir import store

    recipe = Recipe(
        model=str(models.TINY_LLAVA),
        workdir=str(folder),
        quantize={"format": formats},
        calibration={"data": "scenes"},
        export={"targets": targets, "tensor": 2},
    )

    def run():
        with models.single_rank() as own:
            verify(RunContext(plan=make_plan(recipe), parallel=own))
        return store.read_json(folder / formats[0] / "verify.json")

    return run


@pytest.fixture(scope="session")
def nemo_line(tmp_path_factory):
    """A work folder: tiny-llava in every format as NeMo has it, verified, and 16 bit in nemo/."""
    import models
    from nemo_folders import FORMAT_NAMES, make_context

    from nemo_vlm_ptq.nemo.checkpoint import write_checkpoint
    from nemo_vlm_ptq.stages import run_stages

    home = tmp_path_factory.mktemp("nemo")
    with models.single_rank() as own:
        context = make_context(own, home, tuple(FORMAT_NAMES))
        run_stages(context, ("observe", "solve", "export", "verify"))
    write_checkpoint("quickstart", [f"model={models.TINY_LLAVA}", f"workdir={home}"])
    return home


@pytest.fixture
def set_gpus(monkeypatch):
    """Return a function that fakes GPUs of the given memory in this machine."""
    torch = pytest.importorskip("torch")

    def set_gpus(*memory):
        class Properties:
            def __init__(self, index):
                self.total_memory = memory[index]

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
        monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)

    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return set_gpus


@pytest.fixture
def checkpoint(tmp_path):
    """An fp8 engine checkpoint for two tensor-parallel ranks with an fp8 KV cache."""
    from encoded_models import write_trtllm
    from test_contract import encoded_model

    write_trtllm(tmp_path / "llm", encoded_model("fp8"), (2, 1), "fp8")
    return tmp_path / "llm"
