"""Recompute what an export must hold, from source and scales, for verify to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.checkpoints.model_folder import is_sidecar
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.distributed.layout import split_evenly
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.sources.decoder_weights import open_weights
from nemo_vlm_ptq.targets.writing.published import (
    PublishedFormat,
    count_files,
    end_tensors,
    json_contents,
    layer_tensors,
)

FileTensors = tuple[str, dict[str, torch.Tensor]]  # file, some of its tensors by their name in it


@dataclass(frozen=True, kw_only=True)
class ExpectedExport:
    """Every file of an export but its manifest.

    tensors: files with tensors, a few at a time.
    make_json: (tensor with its subfolder -> file) -> content of the JSON files.
    copied: file -> the file of the model that it is a copy of.
    """

    tensors: Iterable[FileTensors]
    make_json: Callable[[Mapping[str, str]], dict[str, Any]]
    copied: Mapping[str, Path]


def expected_published(
    context: RunContext, fmt: QuantFormat, published: PublishedFormat
) -> ExpectedExport:
    """Return what an export under Hugging Face names must hold."""
    subfolders = sorted({"", *context.plan.family.subfolders})
    made = {"config.json", *json_contents(context, fmt, published, {})}
    copied = copies(context, subfolders, is_sidecar)
    return ExpectedExport(
        tensors=_tensors(context, fmt, published),
        make_json=lambda index: json_contents(context, fmt, published, index),
        copied={name: path for name, path in copied.items() if name not in made},
    )


def copies(
    context: RunContext, subfolders: Iterable[str], accept: Callable[[Path], bool]
) -> dict[str, Path]:
    """Return the accepted files of the model by their name in the export."""
    source = context.plan.folder
    paths = chain.from_iterable((source / one).iterdir() for one in subfolders)
    accepted = (path for path in sorted(paths) if accept(path) and path.is_file())
    return {str(path.relative_to(source)): path for path in accepted}


def _tensors(
    context: RunContext, fmt: QuantFormat, published: PublishedFormat
) -> Iterator[FileTensors]:
    plan, home = context.plan, context.plan.family.decoder_subfolder
    count, layers = count_files(context), range(plan.decoder.layers)
    with open_weights(plan, context.parallel.device) as weights:
        encoder = published.encoder(context, fmt, weights)
        for number in range(count):
            own = split_evenly(layers, count, number)
            encoded: Iterator[dict[str, torch.Tensor]] = (
                layer_tensors(context, encoder, published, index) for index in own
            )
            last = end_tensors(context, encoder, published) if number == count - 1 else ()
            for tensors in chain(encoded, last):
                for subfolder in sorted({name.rpartition("/")[0] for name in tensors}):
                    prefix = f"{subfolder}/" if subfolder else ""
                    suffix = f"-{number + 1:05d}-of-{count:05d}" if subfolder == home else ""
                    yield (
                        f"{prefix}model{suffix}.safetensors",
                        {
                            name.removeprefix(prefix): tensor
                            for name, tensor in tensors.items()
                            if name.rpartition("/")[0] == subfolder
                        },
                    )
