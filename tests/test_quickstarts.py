"""The quickstarts of the models that ship, shortened: they see, and still do when quantized.

tiny-llava's own is launch/quickstart.sh; other tests run its model through the line.
"""

import subprocess
import sys

import pytest
from models import ROOT

from nemo_vlm_ptq.workdir import store

SHORT = (
    "quantize.format=[int8_sq, int4_awq]",
    "calibration.samples=32",
    "evaluate.limit=400",
)


@pytest.fixture(scope="module", params=["vila", "phi"])
def work(request, tmp_path_factory):
    """The work folder of a finished quickstart."""
    folder = tmp_path_factory.mktemp(request.param) / "work"
    run = [sys.executable, "-m", "nemo_vlm_ptq", "run", f"quickstart_{request.param}", *SHORT]
    done = subprocess.run(
        [*run, f"workdir={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_model_answers_what_it_sees_and_guesses_what_it_does_not(work):
    found = store.read_json(work / "16bit" / "evaluate" / "gqa.json")
    assert found["accuracy"]["total"] == found["swapped"]["total"] == 400
    assert found["accuracy"]["accuracy"] >= 95
    assert found["swapped"]["accuracy"] <= 45


def test_its_exports_are_proven_and_see_as_well(work):
    for fmt in ("int8_sq", "int4_awq"):
        assert store.read_json(work / fmt / "verify.json")["passed"]
        found = store.read_json(work / fmt / "evaluate" / "gqa.json")
        assert found["accuracy"]["accuracy"] >= 95
        assert found["swapped"]["accuracy"] <= 45
