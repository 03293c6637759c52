"""Ranks that Open MPI's mpirun started: MPI says who is who, the rest is as under torchrun.

MPI is left at once, because its end waits for every rank: one that fails later must end the job.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from nemo_vlm_ptq.errors import UserError

WORLD_SIZE_VARIABLE = "OMPI_COMM_WORLD_SIZE"  # mpirun has put it into the environment of its ranks


def started_by_mpirun() -> bool:
    """True on a rank of mpirun."""
    return WORLD_SIZE_VARIABLE in os.environ


def adopt_mpi_ranks() -> None:
    """Put into the environment what torchrun puts there; every rank of mpirun must come.

    Raises:
        UserError: mpi4py is missing, or speaks to another MPI than mpirun.
    """
    mpi = _load()
    mpi.Init()
    world = mpi.COMM_WORLD
    here = world.Split_type(mpi.COMM_TYPE_SHARED)
    rank, size, local, node = world.rank, world.size, here.rank, here.size
    address, port = world.bcast(_meeting_point(node == size) if rank == 0 else None)
    here.Free()
    mpi.Finalize()
    if size != int(os.environ[WORLD_SIZE_VARIABLE]):
        raise UserError(
            f"mpirun started {os.environ[WORLD_SIZE_VARIABLE]} ranks and mpi4py sees {size}: it has loaded "
            f"another MPI ({mpi.Get_library_version().split(',')[0].strip()}); set "
            "MPI4PY_MPIABI=openmpi, or build mpi4py with the Open MPI of this mpirun"
        )
    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": node}
    os.environ.update({key: str(value) for key, value in places.items()})
    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": port})


def _load() -> Any:
    """mpi4py's MPI, not started."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"ranks of mpirun need mpi4py, and it cannot be loaded ({str(error).splitlines()[0]}); "
            "pip install 'nemo-vlm-ptq[mpi]', or start ranks with torchrun"
        ) from None
    return MPI


def _meeting_point(one_host: bool) -> tuple[str, str]:
    """(address, port) where the ranks meet: the user's, or this host and a port free on it."""
    address = os.environ.get("MASTER_ADDR", "localhost" if one_host else socket.gethostname())
    with socket.socket() as probe:
        probe.bind(("", 0))
        return address, os.environ.get("MASTER_PORT", str(probe.getsockname()[1]))
