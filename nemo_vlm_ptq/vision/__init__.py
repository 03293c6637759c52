"""Vision towers and projectors, as they were trained; never quantized unless asked by name."""
