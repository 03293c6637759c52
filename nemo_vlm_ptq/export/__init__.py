"""From a quantized Megatron checkpoint to what others read: one stream, one writer a target."""
