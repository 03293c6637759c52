"""logits: any form of the model asked with given inputs, so that any two can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.stages.model_forms import (
    load_reference_model,
    megatron_logits,
    reference_device,
    reference_logits,
)
from nemo_vlm_ptq.targets.trtllm.engine.session import engine_logits
from nemo_vlm_ptq.workdir import store

FORMS = (
    "hf_source", "megatron", "quantized", "trtllm", "hf", "compressed_tensors", "nemo", "engine"
)  # fmt: skip
DTYPES = ("float32", "bfloat16")


def write_logits(job: RunContext, options: Mapping[str, str]) -> None:
    """Logits [B,S',V] of one form for `inputs`, into `output` (safetensors).

    Inputs: input_ids [B,S] int64, optional attention_mask [B,S], pixel_values and, for families
    that cut images up, image_sizes [images,2], as the family's Hugging Face processor gives them,
    images in the order of the rows they stand in. S' counts every image token; rows that end up
    shorter than others are padded with zeros.

    Raises:
        UserError: a missing option, an unknown form, or inputs that do not fit together.
    """
    form, inputs, output, dtype = _options(options)
    fmt = _format(job, form)
    samples, masks = _samples(job, load_file(inputs))
    if form in ("megatron", "quantized"):
        logits = megatron_logits(job, fmt, samples, dtype, masks)
    elif job.parallel.rank == 0 and form == "engine" and fmt is not None:
        logits = engine_logits(job, fmt, samples, masks)
    elif job.parallel.rank == 0:
        runtime = load_reference_model(job, form, fmt, dtype, reference_device(job, dtype))
        logits = reference_logits(runtime, samples, masks)
    if job.parallel.rank == 0:
        store.save_tensors({"logits": pad_sequence(logits, batch_first=True)}, output)
    job.parallel.barrier()


def _options(options: Mapping[str, str]) -> tuple[str, Path, Path, torch.dtype]:
    for key in ("from", "inputs", "output"):
        if key not in options:
            raise UserError(f"logits needs {key}=...; e.g. from=megatron inputs=F output=G")
    form, dtype = options["from"], options.get("dtype", "float32")
    if form not in FORMS:
        raise UserError(f"from={form} is not known; known: {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not known; known: {', '.join(DTYPES)}")
    inputs = Path(options["inputs"])
    if not inputs.is_file():
        raise UserError(f"inputs={inputs} is no file")
    return form, inputs, Path(options["output"]), getattr(torch, dtype)


def _format(job: RunContext, form: str) -> QuantFormat | None:
    """The format a form is in; None for 16 bit forms."""
    if form in ("hf_source", "megatron"):
        return None
    formats = job.plan.formats
    if len(formats) != 1:
        names = ", ".join(fmt.name for fmt in formats)
        raise UserError(f"from={form} needs one format; add quantize.format= one of {names}")
    return formats[0]


def _samples(
    job: RunContext, tensors: Mapping[str, torch.Tensor]
) -> tuple[list[Sample], list[torch.Tensor | None]]:
    """Rows as samples, each with its images, and their attention masks."""
    if "input_ids" not in tensors:
        raise UserError("inputs must hold input_ids [B,S]")
    left = None
    if "pixel_values" in tensors:
        left = ImageInputs(tensors["pixel_values"], tensors.get("image_sizes"))
    masks = tensors.get("attention_mask")
    samples: list[Sample] = []
    expanded: list[torch.Tensor | None] = []
    for row, ids in enumerate(tensors["input_ids"]):
        try:
            marks = job.plan.family.find_placeholders(job.plan.config, ids, left)
        except UserError as error:
            raise UserError(f"row {row} of input_ids: {error}") from None
        have = 0 if left is None else len(left.pixel_values)
        if marks.images > have:
            raise UserError(
                f"row {row} of input_ids: it has {marks.images} images and {have} are left"
            )
        repeats = torch.where(marks.is_image, marks.repeat, 1)
        own = left.part(0, marks.images) if left is not None and marks.images else None
        left = None if left is None else left.part(marks.images)
        input_ids, is_image = (x.repeat_interleave(repeats) for x in (ids, marks.is_image))
        samples.append(Sample(f"row {row}", input_ids, is_image, own))
        expanded.append(None if masks is None else masks[row].repeat_interleave(repeats))
    return samples, expanded
