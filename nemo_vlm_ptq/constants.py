"""Names of stages, in order, and of the commands that stand for several; imports nothing."""

STAGES = ("import", "observe", "solve", "export", "verify", "build", "evaluate", "report")
DEFAULT_STAGES = tuple(name for name in STAGES if name != "build")  # of a recipe that names none
STAGE_GROUPS = {"calibrate": ("observe", "solve")}
BASELINE = "16bit"  # stands for a format where the source itself is asked
LOGITS_KEYS = ("from", "inputs", "output", "dtype")
