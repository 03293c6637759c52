"""`python -m nemo_vlm_ptq`: the same command, inside ranks that torchrun or mpirun started."""

from nemo_vlm_ptq.cli import entry

if __name__ == "__main__":  # checkpoint saving re-imports the main module in worker processes
    entry()
