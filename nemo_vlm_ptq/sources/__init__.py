"""Source models that are not Hugging Face folders."""
