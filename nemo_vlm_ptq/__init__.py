"""Post-training quantization of vision-language models, independent of the parallel layout."""

import os

__version__ = "0.1.0"

# Intel's libraries add a product's terms in an order that depends on its width and on the number of
# threads, unless they are told not to before torch is imported: MKL by a strict mode, oneDNN by
# doing without AMX, which has no such mode. What was seen and what it costs: docs/calibration.md.
# OpenMP's threads wait by spinning, unless told not to, and take the time of those that work.
for _name, _value in {
    "MKL_CBWR": "AUTO,STRICT",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)
