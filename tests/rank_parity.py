"""Ranks of test_parity: import the tiny model, run it and save it, layout by layout."""

import sys
from hashlib import sha256
from pathlib import Path

import torch
from models import TokenizedQuestion, parallel_contexts, to_samples
from observing import plan_of

from nemo_vlm_ptq.families import find_family, read_config
from nemo_vlm_ptq.megatron import checkpoint
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source, load_model, save_model
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision

CHECKPOINT_NAME = "saved_{}x{}"  # TP size, PP size


def import_llava(parallel, folder, dtype=torch.float32, for_calibration=False):
    """Return (decoder, vision module) of a model folder, with the shards of this rank."""
    plan = plan_of(folder, dtype)
    model = build_decoder(plan.decoder, parallel, dtype, for_calibration=for_calibration)
    with open_weights(plan, parallel.device) as weights:
        load_from_source(model, parallel, weights, for_calibration=for_calibration)
    return model, plan.family.build_vision(plan.config, read_vision(plan))


def compute_logits(parallel, model, vision, cases_file):
    """Return case -> logits [B,S,V] of its samples as one padded batch; None off the last stage."""
    logits = {}
    for name, case in torch.load(cases_file).items():
        samples = to_samples(TokenizedQuestion(**question) for question in case)
        (features,) = encode_images(vision, parallel, [samples], model.config.hidden_size)
        logits[name] = forward(model, parallel, collate(samples), features)
    return logits


def reload(parallel, folder, vision, saved, cases_file):
    """Compute logits with a model loaded from a torch_dist checkpoint.

    Returns:
        (logits, what each rank read from files and holds afterwards)
    """
    config = read_config(folder)
    model = build_decoder(find_family(config).decoder(config), parallel, torch.float32)
    blocks, read_block = [], checkpoint.read_block

    def recording_read_block(*args):
        blocks.append(read_block(*args))
        return blocks[-1]

    checkpoint.read_block = recording_read_block
    load_model(model, saved)
    checkpoint.read_block = read_block
    weights = [parameter.detach() for parameter in model.parameters()]
    loaded = {
        "replica": (parallel.tensor_rank, parallel.pipeline_rank),
        "read": sum(block.numel() for block in blocks),
        "held": sum(weight.numel() for weight in weights),
        "sha256": sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest(),
    }
    return compute_logits(parallel, model, vision, cases_file), parallel.all_gather(loaded)


def run_layout(parallel, folder, cases_file, out):
    """Save logits of the imported model, and of the checkpoint that a single rank saved."""
    model, vision = import_llava(parallel, folder)
    found = {"imported": compute_logits(parallel, model, vision, cases_file)}
    tensor, pipeline = parallel.layout.tensor, parallel.layout.pipeline
    saved = out / CHECKPOINT_NAME.format(tensor, pipeline)
    if parallel.rank == 0:
        saved.mkdir()
    parallel.barrier()
    save_model(model, saved)
    saved = out / CHECKPOINT_NAME.format(1, 1)
    found["reloaded"], found["loaded"] = reload(parallel, folder, vision, saved, cases_file)
    if parallel.last_stage and parallel.tensor_rank == 0 and parallel.data_rank == 0:
        torch.save(found, out / f"logits_{tensor}x{pipeline}")
    parallel.barrier()


def main():
    """Run the layouts given as arguments: FOLDER CASES OUT TPxPP ..."""
    folder, cases_file, out = map(Path, sys.argv[1:4])
    layouts = [(*map(int, layout.split("x")), "auto") for layout in sys.argv[4:]]
    for parallel in parallel_contexts(layouts):
        run_layout(parallel, folder, cases_file, out)
