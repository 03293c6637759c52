"""Make a plan of recipe and model, and reject what cannot work.

Reads config.json and the headers of the checkpoint, no weights, and needs no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import (
    SourceTensor,
    list_tensors,
    most_common_dtype,
    resolve_model_folder,
)
from nemo_vlm_ptq.checkpoints.model_config import merge_config
from nemo_vlm_ptq.checkpoints.model_folder import check_model_folder
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families import Decoder, ModelFamily, find_family, read_config
from nemo_vlm_ptq.families.config_checks import check_not_quantized
from nemo_vlm_ptq.families.transformers_import import import_transformers
from nemo_vlm_ptq.input_files import one_line
from nemo_vlm_ptq.parameter_map.entries import check_coverage, passthrough_names
from nemo_vlm_ptq.planning.constraints import check_constraints
from nemo_vlm_ptq.planning.plan import Plan
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.sources.kind import is_nemo

SOURCE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def make_plan(recipe: Recipe) -> Plan:
    """Check everything that can be checked without weights.

    Raises:
        UserError: the first thing that cannot work, with the values that would.
    """
    folder = resolve_model_folder(recipe.model)
    import_transformers()
    nemo = None
    if is_nemo(folder):
        from nemo_vlm_ptq.sources.nemo2 import open_nemo  # slow to import

        nemo = open_nemo(folder)
    config = merge_config(read_config(folder) if nemo is None else nemo.config, recipe.config)
    family = find_family(config, recipe.family)
    if nemo is None:
        check_model_folder(folder, family.subfolders)
    config = merge_config(family.complete_config(folder, config), recipe.config)
    check_not_quantized(folder, config)
    decoder, vision_shapes = _parse_config(folder, family, config)
    if nemo is None:
        tensors = list_tensors(folder, family.name_aliases, family.subfolders)
    else:
        tensors, folder = nemo.tensors, nemo.folder
    decoder_shapes = decoder.shapes(family.parameter_map(decoder))
    expected = decoder_shapes | vision_shapes
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_coverage(shapes, expected, family.ignored_tensors, str(folder))
    copied = passthrough_names(shapes, family.ignored_tensors)
    _check_dtypes(folder, tensors, [*expected, *copied])
    dtype: str = recipe.export.dtype
    if dtype == "auto":
        dtype = SOURCE_DTYPES[most_common_dtype(tensors[name] for name in decoder_shapes)]
    plan = Plan(
        recipe=recipe,
        folder=folder,
        config=config,
        family=family,
        decoder=decoder,
        tensors=tensors,
        vision_names=(*vision_shapes, *copied),
        dtype=dtype,
    )
    check_constraints(plan)
    return plan


def _parse_config(
    folder: Path, family: ModelFamily, config: dict[str, Any]
) -> tuple[Decoder, dict[str, tuple[int, ...]]]:
    """Return the decoder, and names and shapes of tower and projector."""
    try:
        return family.decoder(config), family.vision_shapes(config)
    except UserError:
        raise
    except Exception as error:  # transformers' config classes raise all kinds on invalid values
        raise UserError(f"{folder}/config.json is invalid: {one_line(error)}") from error


def _check_dtypes(folder: Path, tensors: dict[str, SourceTensor], names: list[str]) -> None:
    for name in names:
        if tensors[name].dtype not in SOURCE_DTYPES:
            raise UserError(
                f"{folder}: tensor {name} is {tensors[name].dtype}; a model to quantize must be in "
                f"{', '.join(SOURCE_DTYPES)}"
            )
