"""The scripts in launch/, run with an environment that they take for their own."""

import os
import subprocess
import sys

from bad_models import ROOT

EXTRAS = ("base", "mpi")


def make_venv(folder):
    """A folder that passes for .venv, up to date: its programs are those that run the tests."""
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("nemo-vlm-ptq", "-m nemo_vlm_ptq")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    ask = ["bash", "-c", f"source {ROOT}/launch/common.sh; _wanted"]
    wanted = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    stamp = "".join(f"{wanted} {extra}\n" for extra in EXTRAS)
    (folder / "venv" / ".nemo-vlm-ptq").write_text(stamp)
    return folder / "venv"


def start(name, venv, folder, *words, **settings):
    """launch/NAME in a folder, with settings in its environment; its process."""
    own = {"NEMO_VLM_PTQ_VENV": str(venv), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    kept = {key: value for key, value in os.environ.items() if key != "ROOT_SAVE_PATH"}
    return subprocess.Popen(
        [ROOT / "launch" / name, *map(str, words)],
        cwd=folder,
        env=kept | own | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(name, venv, folder, *words, timeout=300, **settings):
    """(exit code, stdout, stderr) of launch/NAME."""
    with start(name, venv, folder, *words, **settings) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    return process.returncode, out, err
