"""Names of stages, in order, and of the commands that stand for several; imports nothing."""

STAGES = ("import", "observe", "solve", "export", "verify", "evaluate", "report")
GROUPS = {"calibrate": ("observe", "solve")}
LOGITS_KEYS = ("from", "inputs", "output", "dtype")
