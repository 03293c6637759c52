"""A workdir survives kills, and two commands at once; a seeded part of tests/campaigns/runs.py."""

import subprocess
import sys

from models import ROOT


def test_no_kill_and_no_pair_of_runs_of_a_seeded_campaign_is_a_defect(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "campaigns" / "runs.py")]
    words = ["--kills", "3", "--pairs", "2", "--stages", "observe,solve,export"]
    done = subprocess.run(
        [*command, *words, "--work", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sum(int(line.split()[-1]) for line in done.stdout.splitlines()) == 5
