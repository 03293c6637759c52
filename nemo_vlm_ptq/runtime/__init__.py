"""An independent reader of every export: plain torch and transformers, nothing of the writers."""
