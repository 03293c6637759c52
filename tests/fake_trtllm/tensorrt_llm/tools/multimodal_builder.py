"""Fake builder of vision engines, with the options of 1.2; the engine file holds feature sizes."""

import json
import os
from pathlib import Path

from build_command import record


def add_multimodal_arguments(parser):
    """Add the options that this package uses."""
    parser.add_argument("--model_type", choices=["llava", "llava_next", "vila"], required=True)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--vila_path")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_batch_size", type=int, default=4)
    return parser


class MultimodalEngineBuilder:
    """Builder of one vision engine."""

    def __init__(self, args):
        self.args = args

    def build(self):
        record()
        assert (self.args.vila_path is None) == (self.args.model_type != "vila")
        folder = Path(self.args.output_dir)
        folder.mkdir()
        (folder / "model.engine").write_text(os.environ.get("FAKE_TOWER", "[1, 1]"))
        config = {"precision": "float16", "model_type": self.args.model_type}
        (folder / "config.json").write_text(json.dumps({"builder_config": config}))
