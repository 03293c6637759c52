"""Names of files in the work folder that several packages read or write."""

from __future__ import annotations

from pathlib import Path

VISION_FILE = "vision.safetensors"  # in megatron/: vision tower and projector, not quantized


def rank_files(folder: Path, rank: int) -> list[str]:
    """Return the files of a torch_dist checkpoint that a rank lists in the manifest.

    Rank 0 also lists the files that all ranks share.
    """
    shards = [path.name for path in folder.glob(f"__{rank}_*.distcp")]
    if rank:
        return shards
    vision = [VISION_FILE] if (folder / VISION_FILE).is_file() else []
    return [*shards, ".metadata", "common.pt", "metadata.json", *vision]
