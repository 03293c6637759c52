"""A Slurm of two nodes on this machine (tests/slurm/cluster.sh), and what tests ask of it."""

import contextlib
import os
import shutil
import subprocess
import time

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
def started(folder):
    """The cluster; yields why it cannot be had here, or "". SLURM_CONF names it meanwhile."""
    why, before = missing(), os.environ.get("SLURM_CONF")
    script = ROOT / "tests" / "slurm" / "cluster.sh"
    if not why:
        begun = subprocess.run([script, "start", folder], stderr=subprocess.PIPE, text=True)
        why = f"Slurm cannot be started: {begun.stderr[-300:]}" if begun.returncode else ""
    if why:
        yield why
        return
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield ""
    finally:
        subprocess.run([script, "stop", folder], check=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


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
        assert time.monotonic() < end, (what, asked("squeue"))
        time.sleep(0.2)


def until_all_is_over():
    """Wait for an empty queue."""
    until(lambda: not asked("squeue", "-h"), "jobs are still queued")


def facts(job):
    """What Slurm says of a job: key -> value."""
    words = asked("scontrol", "-o", "show", "job", str(job)).split()
    return dict(word.split("=", 1) for word in words if "=" in word)
