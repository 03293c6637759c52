"""Triton kernels of calibration, in a process of their own.

Triton decides when it is imported whether it interprets, and in this process others import it.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed; torch's CUDA builds bring it"
)
CASES = Path(__file__).with_name("kernel_cases.py")


def test_kernels_compute_what_plain_torch_says():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(words, env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
