"""Triton kernels of calibration, tested in a subprocess.

Triton decides at import whether it interprets kernels, and the test process imports it for others.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="triton is missing; CUDA builds of torch install it",
)
CASES = Path(__file__).with_name("kernel_cases.py")


def test_kernels_match_eager_pytorch():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
