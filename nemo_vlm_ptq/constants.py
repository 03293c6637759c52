"""Constants shared by modules of all layers; imports nothing."""

STAGES = ("import", "observe", "solve", "export", "verify", "build", "evaluate", "report")
DEFAULT_STAGES = tuple(name for name in STAGES if name not in ("import", "build"))
STAGE_GROUPS = {"calibrate": ("observe", "solve")}
BASELINE = "16bit"  # folder name, in place of a format, of results of the source model
LOGITS_OPTIONS = ("from", "inputs", "output", "dtype")  # KEY=VALUE options of the logits command
# Megatron pads the vocabulary to a multiple; a fixed one makes checkpoints layout-independent.
VOCAB_MULTIPLE = 64
SKETCH_ROWS = 512  # of a modality; benchmarks/sketch.py shows the loss of fewer and of more
BLOCK_FEATURES = 128  # of an exact diagonal block of a second moment: the largest group that clips
