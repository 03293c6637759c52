"""No model outlives the stage that made it, though modelopt's modules hold themselves.

Left to Python, quantized models of several formats were in memory at a time.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("models_end.py")
# modelopt is first imported in solve, or in verify where that comes alone: pulp keeps importers.
PROCESSES = (("import", "observe", "solve", "export"), ("verify",))


def test_each_stage_ends_without_its_model(tmp_path) -> None:
    for stages in PROCESSES:
        command = [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), *stages]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
