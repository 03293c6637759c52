"""Models that are no Hugging Face folder, as the families take them."""
