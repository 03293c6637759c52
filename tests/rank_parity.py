"""Ranks of test_parity: the tiny model imported, asked and saved at one layout after the other."""

import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from models import Question, each_layout, to_samples

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors, open_source
from nemo_vlm_ptq.families import find_family, read_config
from nemo_vlm_ptq.megatron import checkpoint
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, load_model, save_model
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward

SAVED = "saved_{}x{}"


def import_llava(own, folder, dtype=torch.float32, to_observe=False):
    """(decoder, vision) of a model folder on this rank, filled slice by slice from its files."""
    config = read_config(folder)
    family = find_family(config)
    decoder = family.decoder(config)
    model = build_decoder(decoder, own, dtype, to_observe=to_observe)
    rows = family.parameter_map
    if to_observe:
        rows = [replace(row, layout="column") if row.sharding == "row" else row for row in rows]
    with open_source(list_tensors(folder, family.name_aliases)) as reader:
        load_from_source(model, own, rows, decoder, reader)
        names = family.vision_shapes(config)
        vision = family.build_vision(config, {name: reader.whole(name) for name in names})
    return model, vision


def ask(own, model, vision, cases_file):
    """Case -> logits [B,S,V] of its samples in one padded batch; None off the last stage."""
    logits = {}
    for name, case in torch.load(cases_file).items():
        samples = to_samples(Question(**one) for one in case)
        (features,) = encode_images(vision, own, [samples], model.config.hidden_size)
        logits[name] = forward(model, own, collate(samples), features)
    return logits


def reload(own, folder, vision, saved, cases_file):
    """The same, of a model filled from a torch_dist checkpoint, whoever saved it; and what of it
    every rank read from files and holds then."""
    config = read_config(folder)
    model = build_decoder(find_family(config).decoder(config), own, torch.float32)
    read, real = [], checkpoint.read_block

    def counting(*asked):
        read.append(real(*asked))
        return read[-1]

    checkpoint.read_block = counting
    load_model(model, saved)
    checkpoint.read_block = real
    weights = [one.detach() for one in model.parameters()]
    loaded = {
        "replica": (own.tensor, own.pipeline),
        "read": sum(one.numel() for one in read),
        "held": sum(one.numel() for one in weights),
        "sha256": sha256(b"".join(one.numpy().tobytes() for one in weights)).hexdigest(),
    }
    return ask(own, model, vision, cases_file), own.gather(loaded)


def run(own, folder, cases_file, out):
    """Import, ask, save; then fill from what one rank saved before, and ask again."""
    model, vision = import_llava(own, folder)
    found = {"imported": ask(own, model, vision, cases_file)}
    saved = out / SAVED.format(own.layout.tensor, own.layout.pipeline)
    if own.rank == 0:
        saved.mkdir()
    own.barrier()
    save_model(model, saved)
    saved = out / SAVED.format(1, 1)
    found["reloaded"], found["loaded"] = reload(own, folder, vision, saved, cases_file)
    if own.last_stage and own.tensor == 0 and own.data == 0:
        torch.save(found, out / f"logits_{own.layout.tensor}x{own.layout.pipeline}")
    own.barrier()


def main():
    """FOLDER CASES OUT TxP ..."""
    folder, cases_file, out = map(Path, sys.argv[1:4])
    layouts = [(*map(int, word.split("x")), "auto") for word in sys.argv[4:]]
    for own in each_layout(layouts):
        run(own, folder, cases_file, out)
