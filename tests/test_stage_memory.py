"""Every stage frees its model, although modelopt's modules are part of reference cycles.

Otherwise the quantized models of several formats are in memory at the same time.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("stage_memory.py")
# modelopt is first imported in export, or in verify if that runs separately: pulp, which it
# imports, keeps the frames of the importing functions alive.
PROCESSES = (("import", "observe", "solve", "export"), ("verify",))


def test_no_model_is_alive_after_a_stage(tmp_path) -> None:
    for stages in PROCESSES:
        command = [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), *stages]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
