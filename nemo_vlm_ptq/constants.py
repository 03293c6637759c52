"""Constants shared by modules of all layers; imports nothing."""

STAGES = ("import", "observe", "solve", "export", "verify", "build", "evaluate", "report")
DEFAULT_STAGES = tuple(name for name in STAGES if name != "build")  # of a recipe without stages
STAGE_GROUPS = {"calibrate": ("observe", "solve")}
BASELINE = "16bit"  # folder name, in place of a format, of results of the source model
LOGITS_OPTIONS = ("from", "inputs", "output", "dtype")  # KEY=VALUE options of the logits command
# Megatron pads the vocabulary to a multiple; a fixed one makes checkpoints layout-independent.
VOCAB_MULTIPLE = 64
