"""No damage to models, data or recipes ends in a traceback or in silence.

A seeded part of tests/campaigns/sources.py, which says what it counts.
"""

import sys

from models import ROOT


def test_no_damage_of_a_seeded_campaign_is_a_defect(tmp_path):
    import subprocess

    command = [sys.executable, str(ROOT / "tests" / "campaigns" / "sources.py")]
    words = ["--count", "40", "--seed", "1", "--seconds", "300", "--work", str(tmp_path)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    assert last.split()[0] == "all" and sum(map(int, last.split()[1:])) == 40
