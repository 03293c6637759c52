"""Tools of TensorRT-LLM."""
