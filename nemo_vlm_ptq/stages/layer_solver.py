"""Solve the scales of a layer for several formats, and record the layers that are solved.

Scales are written layer by layer, by the rank that has the layer's statistics. The progress record
of a format's folder lists its layers with their metrics, so that a run resumes behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import (
    ATTENTION_OUTPUT,
    KV_AMAX_KEYS,
    SolveOptions,
    save_scales,
    solve_layer,
    weight_names,
)
from nemo_vlm_ptq.calibrate.solve.scales import round_amax
from nemo_vlm_ptq.calibrate.statistics import assemble_layer, has_sketch, layer_linears
from nemo_vlm_ptq.constants import VOCAB_MULTIPLE
from nemo_vlm_ptq.context import RunContext, on_rank_zero
from nemo_vlm_ptq.families import Decoder
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.sources.decoder_weights import DecoderWeights
from nemo_vlm_ptq.stages.settings import solve_settings
from nemo_vlm_ptq.targets.registry import TARGETS
from nemo_vlm_ptq.workdir import store
from nemo_vlm_ptq.workdir.checked_files import read_hashes

Metrics = dict[str, list[dict[str, Any]]]  # layer -> one entry per linear


def solved_layers(context: RunContext, fmt: QuantFormat) -> Metrics:
    """Return the solved layers of a format whose scales are not finished, from its record."""
    settings = solve_settings(context.plan, context.workdir, fmt)
    folder = context.folder(fmt.name, "scales")
    return store.read_progress(folder, settings) or {} if folder.is_dir() else {}


def unsolved_formats(context: RunContext) -> list[QuantFormat]:
    """Return the formats that lack the scales of a layer, the same on every rank.

    Raises:
        UserError: scales were made with another recipe.
    """
    plan = context.plan

    def find() -> list[bool]:
        lacking = []
        for fmt in plan.formats:
            settings = solve_settings(plan, context.workdir, fmt)
            finished = store.is_finished(context.folder(fmt.name, "scales"), settings)
            solved = 0 if finished else len(solved_layers(context, fmt))
            lacking.append(not finished and solved < plan.decoder.layers)
        return lacking

    chosen = on_rank_zero(context.parallel, find)
    return [fmt for fmt, is_chosen in zip(plan.formats, chosen, strict=True) if is_chosen]


def unscaled_linears(decoder: Decoder, fmt: QuantFormat) -> tuple[str, ...]:
    """Return the linears whose input keeps its scale: where a target would have to fold another.

    The scale of o_proj's input is folded into v_proj, unless a norm of the values undoes that.
    """
    folds = any(spec.folds_scales and fmt.name in spec.formats for spec in TARGETS.values())
    return () if decoder.has_linear_values or not folds else (ATTENTION_OUTPUT,)


class LayerSolver:
    """Solves layers on this rank, and records with the other ranks what is solved (collective).

    Args:
        context: plan and ranks.
        formats: formats to solve.
        weights: the source's decoder.

    Attributes:
        solved: layers that are recorded for all formats.
    """

    def __init__(
        self, context: RunContext, formats: Sequence[QuantFormat], weights: DecoderWeights
    ) -> None:
        self._context, self.formats, self._weights = context, list(formats), weights
        quantize = context.plan.recipe.quantize
        self._options = SolveOptions(
            smoothquant_alpha=quantize.smoothquant_alpha, image_share=quantize.image_share
        )
        self._settings = {
            fmt.name: solve_settings(context.plan, context.workdir, fmt) for fmt in formats
        }
        self._new: dict[str, Metrics] = {fmt.name: {} for fmt in formats}
        self._hashes: dict[str, dict[str, str]] = {fmt.name: {} for fmt in formats}
        self.solved = on_rank_zero(context.parallel, self._begin)

    def _begin(self) -> set[int]:
        """Create the folders of the formats, or keep what an interrupted run solved."""
        records = []
        for name, settings in self._settings.items():
            folder = self._context.folder(name, "scales")
            store.begin_stage(folder, settings)
            if store.read_progress(folder, settings) is None:
                store.write_progress(folder, settings, {})
            records.append(store.read_progress(folder, settings))
        return _in_all(records)

    def consume(self, layer: int, tensors: Mapping[str, torch.Tensor], window: Any) -> None:
        """Solve a layer from the tensors of its statistics file.

        Args:
            layer: index in the whole model.
            tensors: by name.
            window: GPTModel that holds the layer, or None; weights that tensor ranks share are read
                again from the source.
        """
        paths = {name: path for name, path in weight_names(layer).items() if path in self._weights}
        if window is None or self._context.parallel.layout.tensor > 1:
            weights = {linear: self._weights.shard(name) for linear, name in paths.items()}
        else:
            blocks = {block.layer_number - 1: block for block in window.decoder.layers}
            modules = layer_linears(blocks[layer])
            weights = {name: module.weight.data for name, module in modules.items()}
        self._solve(layer, weights, tensors)

    def _solve(
        self, layer: int, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        plan = self._context.plan
        quantize, sizes = plan.recipe.quantize, plan.decoder.sizes(VOCAB_MULTIPLE, layer)
        entries = [entry for entry in plan.parameter_map if entry.in_layer(layer)]
        kinds = {fmt.name: self._takes_whole(fmt, tensors) for fmt in self.formats}
        statistics = {  # the output power is computed once for all formats
            whole: {
                name: linear.with_output_power(weights[name])
                for name, linear in assemble_layer(tensors, whole=whole).items()
            }
            for whole in set(kinds.values())
        }
        kv = None
        if quantize.kv_cache != "none":
            key, value = (tensors[name].cpu() for name in KV_AMAX_KEYS)
            kv = round_amax(key, self._context.dtype), round_amax(value, self._context.dtype)
        for fmt in self.formats:
            scales = solve_layer(
                weights,
                statistics[kinds[fmt.name]],
                fmt,
                quantize.group_size,
                sizes,
                self._options,
                entries,
                unscaled=unscaled_linears(plan.decoder, fmt),
            )
            folder = self._context.folder(fmt.name, "scales")
            on_cpu = {name: linear.to("cpu") for name, linear in scales.items()}
            file = save_scales(folder, layer, on_cpu, kv)
            self._hashes[fmt.name][file] = store.hash_file(folder / file)
            self._new[fmt.name][str(layer)] = [
                {"layer": layer, "linear": name, **linear.metrics()}
                for name, linear in on_cpu.items()
            ]

    def _takes_whole(self, fmt: QuantFormat, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether a format is solved from whole second moments."""
        return self._context.plan.moments_for(fmt) == "whole" or not has_sketch(tensors)

    def commit(self) -> None:
        """Record the layers that the ranks have solved since the last call (collective)."""
        gathered = self._context.parallel.all_gather((self._new, self._hashes))
        self._new = {name: {} for name in self._settings}
        self._hashes = {name: {} for name in self._settings}

        def record() -> set[int]:
            records = []
            for name, settings in self._settings.items():
                folder = self._context.folder(name, "scales")
                layers, hashes = store.read_progress(folder, settings) or {}, read_hashes(folder)
                for metrics, sha256 in gathered:
                    layers |= metrics[name]
                    hashes = hashes | sha256[name]
                store.write_progress(folder, settings, layers, hashes)
                records.append(layers)
            return _in_all(records)

        self.solved = on_rank_zero(self._context.parallel, record)


def _in_all(records: Sequence[Metrics]) -> set[int]:
    """Return the layers that every format's record has."""
    return set.intersection(*({int(layer) for layer in record} for record in records))
