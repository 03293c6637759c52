"""Files and processes that end with the process they belong to."""

import subprocess
import sys
import time

import psutil
from test_lock import alive, lock_files, wait_for

from nemo_vlm_ptq.utils import own_files
from nemo_vlm_ptq.workdir.lock import lock_workdir


def test_files_of_a_process_are_removed_once_wherever_they_are(tmp_path):
    (tmp_path / "a").touch()
    own_files.own(tmp_path / "a")
    own_files.own(tmp_path / "gone" / "b")
    with lock_workdir(tmp_path, "run"):
        own_files.remove_own_files()  # Ctrl-C
        assert lock_files(tmp_path) == [] and not (tmp_path / "a").exists()
    (tmp_path / "a").touch()
    own_files.remove_own_files()
    assert (tmp_path / "a").exists()


def test_what_a_killed_process_has_forked_ends_with_it():
    script = (
        "import multiprocessing, os, time\n"
        "from nemo_vlm_ptq.distributed.launcher import take_forks_along\n"
        "take_forks_along()\n"
        "writer = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\n"
        "writer.start(); print(writer.pid, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        writer = psutil.Process(int(process.stdout.readline()))
        time.sleep(0.5)
        process.kill()
        wait_for(lambda: not alive([writer]), 10)
