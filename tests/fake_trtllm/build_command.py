"""Fake trtllm-build: accepts the options of tests/trtllm_options.json and records its calls."""

import argparse
import json
import os
import sys
from pathlib import Path

OPTIONS = Path(__file__).resolve().parents[1] / "trtllm_options.json"
TYPES = {"str": str, "int": int}


def record():
    """Record arguments and names of environment variables of this call as one line of JSON."""
    with open(os.environ["FAKE_RECORD"], "a") as file:
        file.write(json.dumps({"args": sys.argv, "environment": sorted(os.environ)}) + "\n")


def make_parser(options):
    """Return the parser of options by name: str, int, flag, or a list of choices."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in options.items():
        if kind == "flag":
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(kind, list):
            parser.add_argument(f"--{name}", choices=kind)
        else:
            parser.add_argument(f"--{name}", type=TYPES[kind])
    return parser


def main():
    """Write an engine per rank; FAKE_FAIL makes it fail, FAKE_OMIT_RANK omits the last engine."""
    record()
    args = make_parser(json.loads(OPTIONS.read_text())["trtllm-build"]).parse_args()
    if "FAKE_FAIL" in os.environ:
        print("[TRT-LLM] [I] Compute capability: (9, 0)")
        sys.exit("RuntimeError: out of memory\nwhile building rank 1")
    folder = Path(args.output_dir)
    folder.mkdir(exist_ok=True)
    config = json.loads((Path(args.checkpoint_dir) / "config.json").read_text())
    for rank in range(config["mapping"]["world_size"] - ("FAKE_OMIT_RANK" in os.environ)):
        (folder / f"rank{rank}.engine").write_text(str(rank))
    build = {name: getattr(args, name) for name in ("max_batch_size", "gather_context_logits")}
    engine_config = {"pretrained_config": config, "build_config": build}
    (folder / "config.json").write_text(json.dumps(engine_config))
    Path(args.output_timing_cache).touch()
