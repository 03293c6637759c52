"""Build TensorRT-LLM engines and run them (legacy: TensorRT-LLM 0.18 to 1.2.1)."""
