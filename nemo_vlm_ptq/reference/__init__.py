"""Reference reader: decode exported checkpoints and run them, independently of the writers."""
