"""logits: compute the logits of any form of the model for given inputs, for comparisons."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from nemo_vlm_ptq.context import RunContext, on_rank_zero
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.input_files import is_file, is_folder, shorten
from nemo_vlm_ptq.stages.logits_inputs import read_inputs
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.targets.trtllm.engine.session import engine_logits
from nemo_vlm_ptq.verify.model_forms import (
    load_reference_model,
    reference_device,
    reference_logits,
    stored_logits,
)
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import check_folder

SOURCE_FORMS = ("hf_source", "megatron")  # in 16 bit
EXPORTS = tuple(name for name, spec in TARGETS.items() if spec.has_reader)
FORMS = (*SOURCE_FORMS, "quantized", *EXPORTS, "engine")
DTYPES = ("float32", "bfloat16")
MAX_NAME_BYTES = 255  # of a file


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Parsed options of the command."""

    form: str
    inputs: Path
    output: Path
    dtype: torch.dtype


def write_logits(context: RunContext, options: Mapping[str, str]) -> None:
    """Write logits [B,S',V] of one form for `inputs` into `output` (safetensors).

    Inputs: input_ids [B,S] int64, optional attention_mask [B,S], pixel_values and, for families
    whose images differ in tokens, image_sizes [images,2], image_grid_thw [images,3] or
    pixel_attention_mask [B,tiles,h,w], as the family's Hugging Face processor returns them, images
    in the order of the rows. S' counts every image token; shorter rows are padded with zeros.

    Raises:
        UserError: a missing option, an unknown form, or inconsistent inputs.
    """
    parsed = _parse_options(options)
    fmt = _select_format(context, parsed.form)
    samples, masks = read_inputs(context.plan, parsed.inputs)
    is_rank_zero = context.parallel.rank == 0
    on_rank_zero(context.parallel, lambda: _check_form(context, parsed.form, fmt))
    if parsed.form in ("megatron", "quantized"):
        logits = stored_logits(context, fmt, samples, parsed.dtype, masks)
    elif is_rank_zero and parsed.form == "engine" and fmt is not None:
        logits = engine_logits(context, fmt, samples, masks)
    elif is_rank_zero:
        device = reference_device(context, parsed.dtype)
        model = load_reference_model(context, parsed.form, fmt, parsed.dtype, device)
        logits = reference_logits(model, samples, masks)
    if is_rank_zero:
        store.save_tensors({"logits": pad_sequence(logits, batch_first=True)}, parsed.output)
    context.parallel.barrier()


def _check_form(context: RunContext, form: str, fmt: QuantFormat | None) -> None:
    """Check that what is read of the workdir was written, and is as it was written.

    Raises:
        UserError: it was not, or was changed; says how it is.
    """
    if form == "hf_source":
        return
    if fmt is None:
        folder, stage, how = context.folder("megatron"), "import", "import"
    elif form == "engine":
        folder, stage, how = context.folder(fmt.name, "engine"), "build", "the stage 'build'"
    else:
        target = "megatron" if form == "quantized" else form
        folder, stage = context.plan.export_folder(fmt, target), "export"
        how = f"export with {target} in export.targets"
    if store.read_manifest(folder) is None:
        raise UserError(f"{folder} is not finished; run {how} first")
    check_folder(folder, stage)


def _parse_options(options: Mapping[str, str]) -> _Options:
    for key in ("from", "inputs", "output"):
        if key not in options:
            raise UserError(f"logits needs {key}=...; e.g. from=megatron inputs=F output=G")
    form, dtype = options["from"], options.get("dtype", "float32")
    if form not in FORMS:
        raise UserError(f"unknown form from={form}; supported: {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype={dtype}; supported: {', '.join(DTYPES)}")
    inputs = Path(options["inputs"])
    if not is_file(inputs):
        raise UserError(f"inputs={shorten(str(inputs))} is not a file")
    output = Path(options["output"])
    too_long = len(os.fsencode(output.name)) > MAX_NAME_BYTES
    if too_long or is_folder(output) or not is_folder(output.parent):
        raise UserError(
            f"output={shorten(str(output))} must be a file in a folder that exists; it is of the "
            "format safetensors"
        )
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"output={output}: {output.parent} is not writable")
    return _Options(form=form, inputs=inputs, output=output, dtype=getattr(torch, dtype))


def _select_format(context: RunContext, form: str) -> QuantFormat | None:
    """Return the format of a form; None for 16 bit forms."""
    if form in SOURCE_FORMS:
        return None
    formats = context.plan.formats
    if len(formats) != 1:
        names = ", ".join(fmt.name for fmt in formats)
        raise UserError(f"from={form} needs one format; set quantize.format= to one of {names}")
    return formats[0]
