"""Environment of ranks that Open MPI's mpirun started.

The rank numbers come from MPI; everything else runs as under torchrun. MPI is finalized at once,
because MPI_Finalize waits for all ranks, whereas a rank that fails later must end the run.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from nemo_vlm_ptq.distributed.launcher import STORE_VARIABLE
from nemo_vlm_ptq.distributed.spawn import LOOPBACK, open_listener
from nemo_vlm_ptq.errors import UserError

WORLD_SIZE_VARIABLE = "OMPI_COMM_WORLD_SIZE"  # set by Open MPI's mpirun


def started_by_mpirun() -> bool:
    """Return whether mpirun started this process."""
    return WORLD_SIZE_VARIABLE in os.environ


def set_env_from_mpi() -> None:
    """Set the environment variables that torchrun sets; a collective call of all MPI ranks.

    Raises:
        UserError: mpi4py is missing, or uses another MPI than mpirun.
    """
    mpi = _import_mpi()
    mpi.Init()
    world = mpi.COMM_WORLD
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    rank, world_size, local_rank, local_world_size = world.rank, world.size, node.rank, node.size
    single_node = local_world_size == world_size
    listener = _listen(single_node) if rank == 0 else None
    place = None if listener is None else (_address(single_node), listener.getsockname()[1])
    address, port = world.bcast(place)
    node.Free()
    mpi.Finalize()
    started = os.environ[WORLD_SIZE_VARIABLE]
    if world_size != int(started):
        library = mpi.Get_library_version().split(",")[0].strip()
        raise UserError(
            f"mpirun started {started} ranks but mpi4py sees {world_size}: it has loaded another "
            f"MPI ({library}); set MPI4PY_MPIABI=openmpi, or build mpi4py with the Open MPI of "
            "this mpirun"
        )
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_world_size,
    }
    os.environ.update({key: str(value) for key, value in numbers.items()})
    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    os.environ[STORE_VARIABLE] = "" if listener is None else str(listener.detach())
    if single_node:
        for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[key] = "lo"


def _import_mpi() -> Any:
    """Import mpi4py's MPI without initializing it."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "ranks started by mpirun need mpi4py, which cannot be imported "
            f"({str(error).splitlines()[0]}); pip install 'nemo-vlm-ptq[mpi]', "
            "or start the ranks with torchrun"
        ) from None
    return MPI


def _address(single_node: bool) -> str:
    """Return the address that rank 0 listens on: the user's, loopback, or that of its name."""
    return os.environ.get("MASTER_ADDR", LOOPBACK if single_node else socket.gethostname())


def _listen(single_node: bool) -> socket.socket:
    """Return the socket on which rank 0 waits for the others."""
    return open_listener(_address(single_node), int(os.environ.get("MASTER_PORT", "0")))
