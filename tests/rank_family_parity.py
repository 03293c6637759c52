"""Rank script of test_family_parity: logits of each family's tiny model in several layouts."""

import sys
from pathlib import Path

import torch
from models import parallel_contexts
from observing import plan_of
from references import Question

from nemo_vlm_ptq.families import find_family, read_config
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.families.tiles import drop_padding
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, load_model, save_model
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision

CHECKPOINT = "checkpoint_{}"  # folder of a torch_dist checkpoint; {}: layout
CHECKPOINT_FAMILY = "phi"  # the family with fused tensors
SAVING_LAYOUTS = ("1x1", "2x2")
RELOADED_CASES = ("images", "padded")


def read_family(folder):
    """Return the family and the config of a model folder."""
    config = read_config(folder)
    family = find_family(config)
    return family, family.complete_config(folder, config)


def import_model(parallel, folder):
    """Return the decoder and the vision module with the weights of a model folder."""
    plan = plan_of(folder)
    model = build_decoder(plan.decoder, parallel, torch.float32)
    with open_weights(plan, parallel.device) as weights:
        load_from_source(model, parallel, weights)
    return model, plan.family.build_vision(plan.config, read_vision(plan))


def reload_model(parallel, folder, checkpoint):
    """Return the decoder with the weights of a torch_dist checkpoint."""
    family, config = read_family(folder)
    model = build_decoder(family.decoder(config), parallel, torch.float32)
    load_model(model, checkpoint)
    return model


def to_samples(folder, questions):
    """Convert questions to samples, with one id for each image token."""
    family, config = read_family(folder)
    samples = []
    for index, question in enumerate(questions):
        images = None
        if question.pixel_values is not None:
            pixels, mask = question.pixel_values, question.pixel_attention_mask
            if family.pads_tiles:
                pixels, mask = drop_padding(pixels, mask)
            sizes, grids = question.image_sizes, question.image_grid_thw
            images = ImageInputs(pixels, sizes, grids, mask, question.image_position_ids)
        placeholders = family.find_placeholders(config, question.ids, images)
        repeats = torch.where(placeholders.is_image, placeholders.tokens_per_placeholder, 1)
        is_image = placeholders.is_image.repeat_interleave(repeats)
        positions = family.positions and family.positions(config, is_image, images)
        samples.append(
            Sample(
                id=f"q{index}",
                input_ids=question.ids.repeat_interleave(repeats),
                is_image=is_image,
                images=images,
                positions=positions,
            )
        )
    return samples


def read_cases(home):
    """Return case -> questions of a family."""
    cases = torch.load(home / "cases")
    return {
        name: [Question(**question) for question in questions] for name, questions in cases.items()
    }


def compute_logits(parallel, home, model, vision, only=None):
    """Return case -> logits [B,S,V] of its samples in one batch; None before the last stage."""
    family, config = read_family(home / "model")
    logits, width = {}, family.decoder(config).feature_width
    for name, questions in read_cases(home).items():
        if only is None or name in only:
            samples = to_samples(home / "model", questions)
            (features,) = encode_images(vision, parallel, [samples], width)
            logits[name] = forward(model, parallel, collate(samples), features)
    return logits


def reloaded_logits(parallel, home, model, vision, layout):
    """Save the model in SAVING_LAYOUTS; return the logits with the checkpoint of one rank."""
    if layout in SAVING_LAYOUTS:
        checkpoint = home / CHECKPOINT.format(layout)
        if parallel.rank == 0:
            checkpoint.mkdir()
        parallel.barrier()
        save_model(model, checkpoint)
    reloaded = reload_model(parallel, home / "model", home / CHECKPOINT.format("1x1"))
    return compute_logits(parallel, home, reloaded, vision, RELOADED_CASES)


def run(parallel, out):
    """Import each family's model and save its logits; save the one with fused tensors."""
    layout = f"{parallel.layout.tensor}x{parallel.layout.pipeline}"
    for home in sorted(out.iterdir()):
        model, vision = import_model(parallel, home / "model")
        logits = {"imported": compute_logits(parallel, home, model, vision)}
        if home.name == CHECKPOINT_FAMILY:
            logits["reloaded"] = reloaded_logits(parallel, home, model, vision, layout)
        if parallel.last_stage and parallel.tensor_rank == 0 and parallel.data_rank == 0:
            torch.save(logits, home / f"logits_{layout}")
        parallel.barrier()


def main():
    """Arguments: OUT TxP ...; OUT has a folder for each family, with its model and cases."""
    out = Path(sys.argv[1])
    layouts = [(*map(int, layout.split("x")), "auto") for layout in sys.argv[2:]]
    for parallel in parallel_contexts(layouts):
        run(parallel, out)
