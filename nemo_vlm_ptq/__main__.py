"""`python -m nemo_vlm_ptq`: the same command, inside ranks that torchrun or mpirun started."""

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `entry` has its own: no traceback

from nemo_vlm_ptq.cli import entry

if __name__ == "__main__":  # checkpoint saving re-imports the main module in worker processes
    entry()
