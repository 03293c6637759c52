"""Run the scripts in launch/ with a fake up-to-date virtual environment."""

import os
import subprocess
import sys

from bad_models import ROOT

EXTRAS = ("base", "mpi")


def make_venv(folder):
    """Create a folder that the scripts accept as an up-to-date .venv; it wraps this Python."""
    bin_folder = folder / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, options in (("python", ""), ("nemo-vlm-ptq", "-m nemo_vlm_ptq")):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {options} "$@"\n')
        (bin_folder / name).chmod(0o755)
    command = ["bash", "-c", f"source {ROOT}/launch/common.sh; _fingerprint"]
    digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    stamp = "".join(f"{digest} {extra}\n" for extra in EXTRAS)
    (folder / "venv" / ".nemo-vlm-ptq").write_text(stamp)
    return folder / "venv"


def start(name, venv, folder, *args, **variables):
    """Start launch/NAME in a folder with extra environment variables and return its process."""
    env = {"NEMO_VLM_PTQ_VENV": str(venv), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    inherited = {key: value for key, value in os.environ.items() if key != "ROOT_SAVE_PATH"}
    return subprocess.Popen(
        [ROOT / "launch" / name, *map(str, args)],
        cwd=folder,
        env=inherited | env | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(name, venv, folder, *args, timeout=300, **variables):
    """Run launch/NAME and return (exit code, stdout, stderr)."""
    with start(name, venv, folder, *args, **variables) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    return process.returncode, out, err
