"""Parallel layout arithmetic, the launcher of ranks, and the environment of MPI ranks."""
