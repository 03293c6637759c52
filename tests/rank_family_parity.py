"""Ranks of test_family_parity: each family's tiny model, asked at one layout after the other."""

import sys
from pathlib import Path

import torch
from models import each_layout
from references import Question

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors, open_source
from nemo_vlm_ptq.families import find_family, read_config
from nemo_vlm_ptq.families.base import ImageInputs, Sample
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, load_model, save_model
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward

SAVED = "saved_{}"
SAVES = "phi"  # the family whose checkpoint is saved and loaded: its rows are fused
SAVING_LAYOUTS = ("1x1", "2x2")
LOADED_CASES = ("images", "padded")


def read_family(folder):
    """(family, config) of a model folder."""
    config = read_config(folder)
    family = find_family(config)
    return family, family.complete_config(folder, config)


def import_model(own, folder):
    """(decoder, vision) of a model folder on this rank, filled slice by slice from its files."""
    family, config = read_family(folder)
    decoder = family.decoder(config)
    model = build_decoder(decoder, own, torch.float32)
    with open_source(list_tensors(folder, family.name_aliases, family.subfolders)) as reader:
        load_from_source(model, own, family.parameter_map, decoder, reader)
        names = family.vision_shapes(config)
        vision = family.build_vision(config, {name: reader.whole(name) for name in names})
    return model, vision


def reload_model(own, folder, saved):
    """The decoder filled from a torch_dist checkpoint, whoever saved it."""
    family, config = read_family(folder)
    model = build_decoder(family.decoder(config), own, torch.float32)
    load_model(model, saved)
    return model


def to_samples(folder, questions):
    """Questions as the package's samples: one id for each image token."""
    family, config = read_family(folder)
    samples = []
    for index, one in enumerate(questions):
        pixels = (
            None if one.pixel_values is None else ImageInputs(one.pixel_values, one.image_sizes)
        )
        marks = family.find_placeholders(config, one.ids, pixels)
        repeats = torch.where(marks.is_image, marks.repeat, 1)
        ids, is_image = (x.repeat_interleave(repeats) for x in (one.ids, marks.is_image))
        samples.append(Sample(f"q{index}", ids, is_image, pixels))
    return samples


def read_cases(home):
    """Case -> questions of a family."""
    cases = torch.load(home / "cases")
    return {name: [Question(**one) for one in case] for name, case in cases.items()}


def ask(own, home, model, vision, only=None):
    """Case -> logits [B,S,V] of its samples in one padded batch; None off the last stage."""
    logits = {}
    for name, questions in read_cases(home).items():
        if only is None or name in only:
            samples = to_samples(home / "model", questions)
            (features,) = encode_images(vision, own, [samples], model.config.hidden_size)
            logits[name] = forward(model, own, collate(samples), features)
    return logits


def reloaded(own, home, model, vision, name):
    """Save where told; then the logits of a model filled from what one rank saved before."""
    if name in SAVING_LAYOUTS:
        saved = home / SAVED.format(name)
        if own.rank == 0:
            saved.mkdir()
        own.barrier()
        save_model(model, saved)
    again = reload_model(own, home / "model", home / SAVED.format("1x1"))
    return ask(own, home, again, vision, LOADED_CASES)


def run(own, out):
    """Import and ask every family of the folder, and save the one with fused rows."""
    name = f"{own.layout.tensor}x{own.layout.pipeline}"
    for home in sorted(out.iterdir()):
        model, vision = import_model(own, home / "model")
        found = {"imported": ask(own, home, model, vision)}
        if home.name == SAVES:
            found["reloaded"] = reloaded(own, home, model, vision, name)
        if own.last_stage and own.tensor == 0 and own.data == 0:
            torch.save(found, home / f"logits_{name}")
        own.barrier()


def main():
    """OUT TxP ...; OUT holds a folder for each family, with its model and its cases."""
    out = Path(sys.argv[1])
    layouts = [(*map(int, word.split("x")), "auto") for word in sys.argv[2:]]
    for own in each_layout(layouts):
        run(own, out)
