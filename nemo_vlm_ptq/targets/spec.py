"""What a target declares about itself: formats, options, and the servers that read it.

Specs import nothing of a target's writer or reader, so that recipes and plans can use them cheaply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """One export target.

    name: the value of `export.targets`.
    folder: the folder name below FORMAT/.
    package: subpackage of nemo_vlm_ptq.targets that holds writer.py, reader.py and checks.py.
    made_from: target whose files the writer reads; it is written, too.
    has_reader: whether reader.py and checks.py exist, so that the reference model runs the export.
    formats: weight and activation formats that the target can store.
    kv_caches: KV cache formats that the target can store.
    unsupported_pairs: (format, KV cache) combinations that no server runs.
    servers: format -> servers that load it, for the support matrix.
    int4_group_sizes: group sizes that the int4 kernels of the servers accept; empty: any.
    layout_keys: keys of the recipe's export section that change the written files.
    folds_scales: pre_quant_scales are folded into the preceding norms and linears.
    shares_kv_scale: keys and values of a layer share the larger scale.
    dynamic_w4a8_inputs: W4A8 quantizes activations per token instead of with a static scale.
    int_scales_in_model_dtype: scales of packed integers are stored in the model's dtype, so int4
        and weight-only int8 need a 16 bit model.
    legacy: why the target is kept only for existing users; empty for current targets.
    """

    name: str
    folder: str
    package: str
    formats: tuple[str, ...]
    made_from: str = ""
    has_reader: bool = True
    kv_caches: tuple[str, ...] = ()
    unsupported_pairs: tuple[tuple[str, str], ...] = ()
    servers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    int4_group_sizes: tuple[int, ...] = ()
    layout_keys: tuple[str, ...] = ()
    folds_scales: bool = False
    shares_kv_scale: bool = False
    dynamic_w4a8_inputs: bool = False
    int_scales_in_model_dtype: bool = False
    legacy: str = ""

    def supports(self, fmt: str, kv_cache: str) -> bool:
        """Return whether the target stores a format together with a KV cache format."""
        if fmt not in self.formats:
            return False
        if kv_cache == "none":
            return True
        return kv_cache in self.kv_caches and (fmt, kv_cache) not in self.unsupported_pairs
