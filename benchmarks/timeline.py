"""Run nemo-vlm-ptq in this process and record where its main thread spends the time.

    python benchmarks/timeline.py OUTPUT.json run RECIPE [key=value ...]

A thread samples the main thread's stack. OUTPUT holds the seconds from the start of the process to
the first micro-batch and to the end of the last export, the GPU's peak, and the seconds of each
frame of this package, innermost first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

INTERVAL = 0.02  # seconds
FIRST_MICRO_BATCH = "_run_micro_batch"  # function that runs it
LAST_WRITE = "run_together"  # function that writes and finishes a folder


def seconds_since_start() -> float:
    """Return the seconds since the interpreter of this process was started, to 10 ms."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


class Timeline:
    """Samples of the main thread's stack."""

    def __init__(self) -> None:
        self.offset = seconds_since_start() - time.monotonic()
        self.first_micro_batch: float | None = None
        self.last_write = 0.0
        self.seconds: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Return the seconds since the start of the process."""
        return time.monotonic() + self.offset

    def _run(self) -> None:
        main, before = threading.main_thread().ident, self.now()
        while not self._done.wait(INTERVAL):
            frame, frames = sys._current_frames().get(main or 0), []
            while frame is not None:
                code = frame.f_code
                if "nemo_vlm_ptq/" in code.co_filename:
                    module = code.co_filename.rpartition("nemo_vlm_ptq/")[2].removesuffix(".py")
                    frames.append(f"{module}:{code.co_name}")
                frame = frame.f_back
            now = self.now()
            names = {name.rpartition(":")[2] for name in frames}
            if FIRST_MICRO_BATCH in names and self.first_micro_batch is None:
                self.first_micro_batch = now
            if LAST_WRITE in names:
                self.last_write = now
            self.seconds[" < ".join(frames[:3])] += now - before
            before = now

    def stop(self) -> dict[str, object]:
        """Stop sampling and return what was found."""
        self._done.set()
        self._thread.join()
        import torch

        return {
            "first_micro_batch": self.first_micro_batch,
            "last_write": self.last_write,
            "end": self.now(),
            "gpu_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
            "seconds": {name: round(s, 2) for name, s in self.seconds.most_common(40)},
        }


def main() -> None:
    """Run the command of the arguments; the exit code is its own."""
    timeline, output = Timeline(), Path(sys.argv[1])
    sys.argv = ["nemo-vlm-ptq", *sys.argv[2:]]
    from nemo_vlm_ptq.cli import main as run

    try:
        run()
    except SystemExit as stop:
        output.write_text(json.dumps(timeline.stop(), indent=1))
        os._exit(int(stop.code or 0))  # as the command itself ends


if __name__ == "__main__":
    main()
