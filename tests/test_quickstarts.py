"""The quickstarts of the models that ship, shortened: they see, and still do when quantized.

tiny-llava's own is launch/quickstart.sh; other tests run its model through the line.
"""

import subprocess
import sys

import pytest
from models import ROOT

from nemo_vlm_ptq.workdir import store

FORMATS = {
    "vila": ("int8_sq", "int4_awq"),
    "phi": ("int8_sq", "int4_awq"),
    "qwen3_vl": ("int4_awq",),
}
SHORT = {  # further words
    "vila": ("calibration.samples=32", "evaluate.limit=400"),
    "phi": ("calibration.samples=32", "evaluate.limit=400"),
    "qwen3_vl": ("calibration.samples=16", "evaluate.limit=200", "parallel.tensor=1"),
}
LEAST = {"vila": 95, "phi": 95, "qwen3_vl": 72}  # accuracy in percent; its questions are harder


@pytest.fixture(scope="module", params=FORMATS)
def run(request, tmp_path_factory):
    """The model's name, and the work folder of a finished quickstart."""
    folder = tmp_path_factory.mktemp(request.param) / "work"
    words = [sys.executable, "-m", "nemo_vlm_ptq", "run", f"quickstart_{request.param}"]
    words += [f"quantize.format=[{','.join(FORMATS[request.param])}]", f"workdir={folder}"]
    words += SHORT[request.param]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


def test_the_model_answers_what_it_sees_and_guesses_what_it_does_not(run):
    name, work = run
    found = store.read_json(work / "16bit" / "evaluate" / "gqa.json")
    assert f"evaluate.limit={found['accuracy']['total']}" in SHORT[name]
    assert found["swapped"]["total"] == found["accuracy"]["total"]
    assert found["accuracy"]["accuracy"] >= LEAST[name]
    assert found["swapped"]["accuracy"] <= 45


def test_its_exports_are_proven_and_see_as_well(run):
    name, work = run
    for fmt in FORMATS[name]:
        assert store.read_json(work / fmt / "verify.json")["passed"]
        found = store.read_json(work / fmt / "evaluate" / "gqa.json")
        assert found["accuracy"]["accuracy"] >= LEAST[name]
        assert found["swapped"]["accuracy"] <= 45
