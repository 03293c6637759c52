"""Two-node Slurm cluster on this machine (tests/slurm/cluster.sh) and helpers to query it."""

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
WAIT_SECONDS = 300


def skip_reason():
    """Return why a cluster cannot be started on this machine, or ""."""
    if os.geteuid():
        return "tests of Slurm require root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    packages = "apt install slurmctld slurmd slurm-client munge iproute2"
    return f"missing {', '.join(missing)} ({packages})" if missing else ""


@contextlib.contextmanager
def running_cluster():
    """Start the cluster and select it with SLURM_CONF; yield a reason to skip, or "".

    The folder is not pytest's tmp_path, which is too long for the path of a socket. The step of a
    job may still write to it while it is removed, so errors of the cleanup are ignored.
    """
    script, reason = ROOT / "tests" / "slurm" / "cluster.sh", skip_reason()
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        if not reason:
            start = subprocess.run([script, "start", folder], stderr=subprocess.PIPE, text=True)
            reason = f"Slurm did not start: {start.stderr[-300:]}" if start.returncode else ""
        if reason:
            yield reason
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
            try:
                yield ""
            finally:
                subprocess.run([script, "stop", folder], check=True)


def slurm_output(*command):
    """Return the output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wait_until(condition, what):
    """Wait for a condition; a Slurm command that fails in it is retried."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if condition():
                return
        assert time.monotonic() < end, (what, slurm_output("squeue"), daemon_errors())
        time.sleep(0.2)


def daemon_errors():
    """Return the error lines in the logs of the nodes' daemons."""
    nodes = sorted(Path(os.environ["SLURM_CONF"]).parent.glob("node*/slurmd.log"))
    lines = [line for log in nodes for line in log.read_text().splitlines()]
    return [line for line in lines if "error:" in line or "fatal:" in line]


def wait_until_queue_is_empty():
    """Wait until all jobs have ended."""
    wait_until(lambda: not slurm_output("squeue", "-h"), "jobs are still queued")


def job_fields(job):
    """Return the fields of a job as key -> value."""
    words = slurm_output("scontrol", "-o", "show", "job", str(job)).split()
    return dict(word.split("=", 1) for word in words if "=" in word)
