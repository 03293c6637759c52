"""TensorRT-LLM engine checkpoints (legacy).

TensorRT-LLM 0.18 to 1.2.1 builds engines from them; later versions have no engine backend and load
Hugging Face checkpoints.
"""
