"""Verify one exported target: its files, its own rules, its tensors, and its logits.

Everything is read back by the independent reference reader and compared with the 16 bit source, the
solved scales, and the logits of the quantized Megatron model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import load_kv_amax, load_scales
from nemo_vlm_ptq.checkpoints.huggingface import open_source
from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import KV_CACHES, MIN_AMAX, QuantFormat
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.targets.checking import Check, ExpectedQuantization
from nemo_vlm_ptq.targets.registry import TARGETS, load_module
from nemo_vlm_ptq.targets.writing.expected import expected_published
from nemo_vlm_ptq.verify import tensors as checks
from nemo_vlm_ptq.verify.files import check_files, list_files
from nemo_vlm_ptq.verify.model_forms import read_model_form, reference_device, reference_logits
from nemo_vlm_ptq.verify.recomputed import compare_export
from nemo_vlm_ptq.verify.unfolding import Folds, find_folds, unfold

# Mean distance of logits in units of their standard deviation, float32, activations not quantized.
# Weights, pre_quant_scales and wiring are equal, so only the order of sums differs. W4A8 rounds
# int4 values once more, to fp8, where some are ties. Targets with scales in the model's dtype round
# the scales of packed integers, and norms that absorbed a pre_quant_scale, to 16 bit.
TOLERANCE = 1e-3
TOLERANCE_ROUNDED_TWICE = 1e-2
# With activations quantized, two orders of summation part at every value near a rounding boundary,
# so the distance is compared with the effect of quantization itself on the logits. The scales of
# activations are compared exactly.
NOISE_FACTOR = 1.5
# Largest value that a static scale represents, in units of the scale.
INPUT_SCALE_DIVISOR = {"fp8": 448, "int8": 127, "nvfp4": 6 * 448}
KV_SCALE_DIVISOR = {"fp8": 448, "int8": 127, "nvfp4": 448}


@dataclass(frozen=True, kw_only=True)
class ExpectedLogits:
    """Logits [S,V] float32 of the Megatron models for some samples.

    exact: quantized model, activations not quantized; rounded: quantized model as it is served;
    source: 16 bit model.
    """

    samples: list[Sample]
    exact: list[torch.Tensor]
    rounded: list[torch.Tensor]
    source: list[torch.Tensor]


class TargetVerifier:
    """Checks of one target of one format; `results` collects them in order.

    The order is such that the first failure explains later ones.
    """

    def __init__(
        self, context: RunContext, fmt: QuantFormat, target: str, expected: ExpectedLogits
    ) -> None:
        self.context, self.plan, self.fmt = context, context.plan, fmt
        self.target, self.spec, self.expected = target, TARGETS[target], expected
        self.folder = context.plan.export_folder(fmt, target)
        self.scales_folder = context.folder(fmt.name, "scales")
        self.results: list[dict[str, Any]] = []
        self.logits: dict[str, Any] = {}

    def run(self) -> None:
        """Run all checks; damage that a reader cannot handle becomes a finding."""
        quantize = self.plan.recipe.quantize
        expected = ExpectedQuantization(
            fmt=self.fmt, group_size=quantize.group_size, kv=KV_CACHES.get(quantize.kv_cache)
        )
        try:
            self._add("files", check_files(self.folder), "sha256 of every file as written")
            if list_files(self.folder)[1]:
                return  # a link or pipe may lead anywhere, or never end
            self._check_recomputed()
            for check in load_module(self.target, "checks").check(self.folder, self.plan, expected):
                self._add_check(check)
            self._check_content()
        except torch.OutOfMemoryError:
            raise  # not caused by the files
        except Exception as error:  # whatever damage does to a reader is a finding, not a bug
            self._add("readable", [f"{type(error).__name__}: {error}"], "")

    def _add(self, name: str, findings: list[str], about: str) -> None:
        detail = "; ".join(findings[:3]) if findings else about
        name = f"{self.target} {name}"
        self.results.append({"name": name, "passed": not findings, "detail": detail})

    def _add_check(self, check: Check) -> None:
        self._add(check.name, check.findings, check.about)

    def _check_recomputed(self) -> None:
        """Compare with what the writer makes again, for targets that can make parts of it."""
        writer = load_module(self.target, "writer")
        if hasattr(writer, "PUBLISHED"):
            expected = expected_published(self.context, self.fmt, writer.PUBLISHED)
        elif hasattr(writer, "expected"):
            expected = writer.expected(self.context, self.fmt)
        else:
            return
        tensors, beside = compare_export(self.folder, expected)
        self._add("recomputed", tensors, "tensors, bit by bit, from source and scales")
        self._add("other files", beside, "configs key by key, copies byte by byte, no other file")

    def _check_content(self) -> None:
        """Check tensors, scales and logits."""
        plan, fmt = self.plan, self.fmt
        read, vision = read_model_form(self.context, self.target, fmt)
        names = plan.decoder.shapes(plan.parameter_map)
        entries = tuple(entry for entry in plan.parameter_map if entry.is_linear)
        quantized = plan.decoder.shapes(entries)
        self._add("coverage", checks.check_names(read, names), f"{len(names)} tensors")
        findings = checks.check_quantized_set(read, quantized)
        self._add("quantized set", findings, f"{len(quantized)} linears")
        folds = self._find_folds()
        device = reference_device(self.context, torch.float32)
        with open_source(plan.tensors) as source:
            kept = plan.decoder.shapes(tuple(e for e in plan.parameter_map if e.keeps_dtype))
            findings = checks.check_untouched(
                read.plain, source, self.context.dtype, folds.norms, kept
            )
            findings += checks.check_untouched(vision, source, self.context.dtype)
            missing = set(plan.vision_names) - set(vision)
            findings += [f"{name} is missing" for name in sorted(missing)]
            count, scaled = len(read.plain) + len(vision), len(folds.norms)
            about = f"{count - scaled} tensors bit-equal, {scaled} norms scaled"
            self._add("untouched", findings, about)
            linears = unfold(read.linears, folds) if folds.inputs else read.linears
            dtype = self.context.dtype
            findings, worst = checks.check_linears(linears, source, dtype, device)
            self._add("weights", findings, f"at most {worst:.3f} of the rounding error allowed")
        if fmt.activation in INPUT_SCALE_DIVISOR and not self._has_dynamic_inputs():
            scales = self._input_scales()
            findings = checks.check_input_scales(read.linears, scales)
            self._add("input scales", findings, f"{len(scales)} as solved")
        if plan.recipe.quantize.kv_cache != "none":
            pairs = self._kv_scales(folds)
            findings = checks.check_kv_scales(read.kv, pairs)
            self._add("KV scales", findings, f"{len(pairs)} layers as solved")
        model = ReferenceModel(plan.family, plan.config, read, vision, torch.float32, device)
        self._check_logits(model)

    def _has_dynamic_inputs(self) -> bool:
        """Whether the target quantizes W4A8's inputs per token instead of with a static scale."""
        return self.spec.dynamic_w4a8_inputs and self.fmt.second_weight is not None

    def _find_folds(self) -> Folds:
        """Return the factors by which folded scales changed norms and linears."""
        if not self.spec.folds_scales or not self.fmt.uses_pre_quant_scale:
            return Folds()
        layers = []
        for layer in range(self.plan.decoder.layers):
            solved = load_scales(self.scales_folder, layer)
            scales = {name: linear.pre_quant_scale for name, linear in solved.items()}
            layers.append({name: scale for name, scale in scales.items() if scale is not None})
        return find_folds(self.plan.parameter_map, self.plan.decoder, layers)

    def _input_scales(self) -> dict[str, float]:
        """Return Hugging Face linear -> solved scale of its input."""
        assert self.fmt.activation is not None
        scales: dict[str, float] = {}
        for layer in range(self.plan.decoder.layers):
            solved = load_scales(self.scales_folder, layer)
            for entry in self.plan.parameter_map:
                if entry.is_linear and entry.in_layer(layer):
                    amax = solved[entry.module_name].input_amax
                    assert amax is not None
                    scale = _effective(amax) / INPUT_SCALE_DIVISOR[self.fmt.activation]
                    names = entry.for_layer(layer).hf_names
                    scales |= {name.removesuffix(".weight"): scale for name in names}
        return scales

    def _kv_scales(self, folds: Folds) -> list[tuple[float, float]]:
        """Return the solved scales of keys and of values of each layer with attention."""
        divisor = KV_SCALE_DIVISOR[self.plan.recipe.quantize.kv_cache]
        pairs = []
        layers = filter(self.plan.decoder.has_attention, range(self.plan.decoder.layers))
        for position, layer in enumerate(layers):
            solved = [_effective(one) / divisor for one in load_kv_amax(self.scales_folder, layer)]
            key, value = [max(solved)] * 2 if self.spec.shares_kv_scale else solved
            pairs.append((key, value * (folds.values[position] if folds.values else 1.0)))
        return pairs

    def _tolerance(self) -> float:
        """Return the mean distance allowed for logits without activation quantization.

        Dynamic W4A8 rounds group scales to fp8, which the Megatron model does not, and
        SmoothQuant's o_proj is quantized again where query heads come to share a scale: two
        independent samples of the same quantization noise.
        """
        queries = self.plan.decoder.sizes(1).queries_per_kv_head
        requantized = self.fmt.algorithm == "smoothquant" and queries > 1
        requantized &= self.plan.decoder.has_linear_values
        if self._has_dynamic_inputs() or (self.spec.folds_scales and requantized):
            noise = distance(self.expected.exact, self.expected.source)
            return NOISE_FACTOR * noise["mean"]
        packed = self.spec.int_scales_in_model_dtype and self.fmt.weight.startswith("int")
        twice = packed or self.fmt.second_weight is not None
        return TOLERANCE_ROUNDED_TWICE if twice else TOLERANCE

    def _check_logits(self, model: ReferenceModel) -> None:
        """Compare logits without activation quantization, then as they are served."""
        expected, tolerance = self.expected, self._tolerance()
        model.set_activation_quantization(False)
        exact = distance(reference_logits(model, expected.samples), expected.exact)
        line = f"logits differ by {exact['mean']:.1e}, {tolerance:.0e} is allowed"
        self._add("logits", [] if exact["mean"] <= tolerance else [line], line)
        self.logits = exact | {"tolerance_mean": tolerance, "samples": len(expected.samples)}
        if self.fmt.activation is None and model.kv is None:
            return
        model.set_activation_quantization(True)
        rounded = distance(reference_logits(model, expected.samples), expected.rounded)
        noise = distance(expected.rounded, expected.source)
        limit = NOISE_FACTOR * noise["mean"]
        line = (
            f"logits differ by {rounded['mean']:.1e}, quantization itself changes them by "
            f"{noise['mean']:.1e}"
        )
        findings = [] if rounded["mean"] <= limit else [line]
        self._add("logits, activations quantized", findings, line)
        self.logits |= {"mean_rounded": rounded["mean"], "mean_quantization": noise["mean"]}


def _effective(amax: torch.Tensor) -> float:
    """Return the amax that a scale stands for: 1 where the calibration saw zeros alone."""
    return float(amax) if float(amax) > MIN_AMAX else 1.0


def distance(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the worst sample's distance between two lists of logits."""
    pairs = [checks.compare_logits(a, b) for a, b in zip(actual, expected, strict=True)]
    return {
        "largest": max(pair["largest"] for pair in pairs),
        "mean": max(pair["mean"] for pair in pairs),
        "argmax_equal": min(pair["argmax_equal"] for pair in pairs),
    }
