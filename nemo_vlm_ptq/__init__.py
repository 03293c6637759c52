"""Post-training quantization of vision-language models, independent of the parallel layout.

import nemo_vlm_ptq as q
result = q.quantize("model-folder", "out-folder", format="fp8", data="questions-folder")
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_vlm_ptq.api import QuantizeResult, quantize
    from nemo_vlm_ptq.errors import UserError, VerificationError

__version__ = "0.1.0"
__all__ = ["QuantizeResult", "UserError", "VerificationError", "quantize"]

# Intel's libraries sum products in an order that depends on width and thread count unless told
# otherwise before torch is imported: MKL by a strict mode, oneDNN by not using AMX, which has no
# such mode (docs/dev/calibration.md). OpenMP threads spin while they wait by default, which takes
# CPU time from the threads of other ranks.
for _name, _value in {
    "MKL_CBWR": "AUTO,STRICT",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, so that `import nemo_vlm_ptq` stays quick."""
    if name in ("quantize", "QuantizeResult"):
        from nemo_vlm_ptq import api

        return getattr(api, name)
    if name in ("UserError", "VerificationError"):
        from nemo_vlm_ptq import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
