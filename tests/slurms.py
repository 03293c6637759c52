"""A Slurm of two nodes on this machine (tests/slurm/cluster.sh), and what tests ask of it."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from bad_models import ROOT

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
PATIENCE = 300  # seconds until the queue is empty


def missing():
    """Why there can be no Slurm here, or ""."""
    if os.geteuid():
        return "tests of Slurm need root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    packages = "apt install slurmctld slurmd slurm-client munge iproute2"
    return f"no {', '.join(lacking)} ({packages})" if lacking else ""


@contextlib.contextmanager
def started():
    """The cluster; yields why it cannot be had here, or "". SLURM_CONF names it meanwhile.

    Its folder is none of pytest's: their names are longer than a socket's may be. The step of a job
    may still be ending in it when it is removed.
    """
    script, why = ROOT / "tests" / "slurm" / "cluster.sh", missing()
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        if not why:
            begun = subprocess.run([script, "start", folder], stderr=subprocess.PIPE, text=True)
            why = f"Slurm cannot be started: {begun.stderr[-300:]}" if begun.returncode else ""
        if why:
            yield why
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
            try:
                yield ""
            finally:
                subprocess.run([script, "stop", folder], check=True)


def asked(*command):
    """What a program of Slurm answers."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until(true, what):
    """Wait for a condition; a program of Slurm that is cut off while it asks is asked again."""
    end = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if true():
                return
        assert time.monotonic() < end, (what, asked("squeue"), errors())
        time.sleep(0.2)


def errors():
    """What the nodes' daemons complained of."""
    nodes = sorted(Path(os.environ["SLURM_CONF"]).parent.glob("node*/slurmd.log"))
    lines = [line for log in nodes for line in log.read_text().splitlines()]
    return [line for line in lines if "error:" in line or "fatal:" in line]


def until_all_is_over():
    """Wait for an empty queue."""
    until(lambda: not asked("squeue", "-h"), "jobs are still queued")


def facts(job):
    """What Slurm says of a job: key -> value."""
    words = asked("scontrol", "-o", "show", "job", str(job)).split()
    return dict(word.split("=", 1) for word in words if "=" in word)
