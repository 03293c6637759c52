"""Visual question answering: generation, scoring and paired comparison with 16 bit."""
