"""Observe outside of a stage: plans of model folders, windows, and what is gathered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from models import identity_preprocess

from nemo_vlm_ptq.calibrate.observe.loop import ObserveOptions, ObserveSetup
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import load_from_source
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.planning.windows import stage_windows
from nemo_vlm_ptq.recipe import Recipe
from nemo_vlm_ptq.sources.decoder_weights import open_weights, read_vision


def plan_of(folder: Path, dtype: torch.dtype = torch.float32):
    """Return the plan of a model folder whose weights are read in `dtype`."""
    plan = make_plan(Recipe(model=str(folder), workdir="nowhere"))
    return replace(plan, dtype=str(dtype).removeprefix("torch."))


def observe_setup(parallel, plan, window: int | None = None):
    """Return the ObserveSetup for preprocessed samples, in windows of at most `window` layers."""
    layers, dtype = plan.decoder.layers, getattr(torch, plan.dtype)

    def build_window(layers):
        model = build_decoder(plan.decoder, parallel, dtype, window=layers, for_calibration=True)
        with open_weights(plan, parallel.device) as weights:
            load_from_source(model, parallel, weights, for_calibration=True)
        return model

    def build_vision():
        return plan.family.build_vision(plan.config, read_vision(plan), parallel.device, dtype)

    sizes = layers, parallel.layout.pipeline, parallel.pipeline_rank, window or layers
    return ObserveSetup(
        parallel=parallel,
        windows=stage_windows(*sizes),
        build_window=build_window,
        feature_width=plan.decoder.feature_width,
        build_vision=build_vision,
        preprocess=identity_preprocess,
    )


def observe_options(**options):
    """Return ObserveOptions that gather all that a format can need."""
    return ObserveOptions(moments=("sketch", "whole"), **options)


def scene_micro_batches(plan, count):
    """Return micro-batches of one sample of the built-in scenes."""
    questions = load_questions("scenes", "calibration", count)
    preprocess = plan.family.make_preprocessor(plan.folder, plan.config)

    def make_sample(item):
        image = questions.load_images(item)
        return preprocess(item.id, item.text + PROMPT_SUFFIX, image, item.answer)

    return [[make_sample(item)] for item in questions.items]
