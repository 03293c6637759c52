"""TensorRT-LLM engines: what it is told to build, whether it is there, and asking what it built."""
