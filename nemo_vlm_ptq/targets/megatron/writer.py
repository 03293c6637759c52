"""Write the quantized Megatron checkpoint of a format."""

from nemo_vlm_ptq.targets.megatron.quantized_checkpoint import write

__all__ = ["write"]
