"""trtllm-build: takes the options of tests/trtllm_options.json, and notes how it was called."""

import argparse
import json
import os
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "trtllm_options.json"
SIMPLE = {"str": str, "int": int}


def record():
    """A line for a call: its words and the names in its environment."""
    with open(os.environ["FAKE_RECORD"], "a") as file:
        file.write(json.dumps({"words": sys.argv, "names": sorted(os.environ)}) + "\n")


def make_parser(options):
    """The parser of a table name -> type: str, int, flag, or a list of choices."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in options.items():
        if kind == "flag":
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(kind, list):
            parser.add_argument(f"--{name}", choices=kind)
        else:
            parser.add_argument(f"--{name}", type=SIMPLE[kind])
    return parser


def main():
    """An engine for each rank of the checkpoint, or a failure when the environment asks for it."""
    record()
    args = make_parser(json.loads(TABLE.read_text())["trtllm-build"]).parse_args()
    if "FAKE_FAIL" in os.environ:
        print("[TRT-LLM] [I] Compute capability: (9, 0)")
        sys.exit("RuntimeError: out of memory\nwhile building rank 1")
    folder = Path(args.output_dir)
    folder.mkdir(exist_ok=True)
    config = json.loads((Path(args.checkpoint_dir) / "config.json").read_text())
    for rank in range(config["mapping"]["world_size"] - ("FAKE_LOSE" in os.environ)):
        (folder / f"rank{rank}.engine").write_text(str(rank))
    built = {name: getattr(args, name) for name in ("max_batch_size", "gather_context_logits")}
    whole = {"pretrained_config": config, "build_config": built}
    (folder / "config.json").write_text(json.dumps(whole))
    Path(args.output_timing_cache).touch()
