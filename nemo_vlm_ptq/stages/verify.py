"""verify: the written files read back and held against the source, the contract and the model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from nemo_vlm_ptq.calibrate.solve.layer import load_kv, load_scales
from nemo_vlm_ptq.checkpoints.huggingface import open_source
from nemo_vlm_ptq.context import RunContext, on_rank_zero
from nemo_vlm_ptq.distributed.layout import round_robin
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families.llava import full_config
from nemo_vlm_ptq.formats import KV_CACHES, QuantFormat
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.stages.expected_logits import ExpectedLogits, LogitsOracle
from nemo_vlm_ptq.stages.model_forms import read_model_form, reference_device, reference_logits
from nemo_vlm_ptq.targets.compressed_tensors.unfolding import Folds, find_folds, unfold
from nemo_vlm_ptq.targets.nemo2.checks import check_nemo
from nemo_vlm_ptq.targets.trtllm.contract import check_contract
from nemo_vlm_ptq.verify import tensors as checks
from nemo_vlm_ptq.verify.configs import (
    ExpectedQuantization,
    check_compressed_configs,
    check_hf_configs,
    check_trtllm_config,
)
from nemo_vlm_ptq.workdir import store

# Mean distance of logits in units of their standard deviation, float32, activations not rounded:
# weights, prequant scales and wiring are the same, and only the order of sums is left. W4A8 rounds
# int4 values once more, to fp8, and some lie on a tie of that grid. compressed-tensors keeps scales
# of packed integers in 16 bit, and norms that took a scale are rounded again.
TOLERANCE = 1e-3
TOLERANCE_ROUNDED_TWICE = 1e-2
# With activations rounded, two orders of summation part at every value near a rounding boundary,
# and layer by layer approach two draws of the same rounding noise; so the distance is held against
# what the rounding itself does to the logits. The scales of activations are compared exactly.
NOISE_FACTOR = 1.5
# Largest value that a static scale stands for, in units of it; nvfp4: of its e4m3 scales of blocks.
INPUT_SCALE_DIVISOR = {"fp8": 448, "int8": 127, "nvfp4": 6 * 448}
KV_SCALE_DIVISOR = {"fp8": 448, "int8": 127, "nvfp4": 448}


def verify(job: RunContext) -> None:
    """Prove every exported target of every format.

    Raises:
        ProofError: a check failed; names the first finding.
    """
    asked = LogitsOracle(job)
    for fmt in job.plan.formats:
        _verify_format(job, fmt, asked)


def _verify_format(job: RunContext, fmt: QuantFormat, asked: LogitsOracle) -> None:
    begin = time.monotonic()
    parallel, path = job.parallel, job.folder(fmt.name, "verify.json")
    targets = job.plan.targets(fmt)
    for target in targets:
        store.require_manifest(job.folder(fmt.name, target), "export")
    settings = {target: store.hash_manifest(job.folder(fmt.name, target)) for target in targets}
    folders = [job.folder(fmt.name, target) for target in targets]
    if on_rank_zero(parallel, lambda: _still_proven(path, settings, folders)):
        return
    expected = asked.in_format(fmt)
    mine = round_robin(targets, parallel.layout.world, parallel.rank)
    found: dict[str, Any] = {}
    for part in parallel.gather({t: _check_target(job, fmt, t, expected) for t in mine}):
        found |= part
    entries = [check for target in targets for check in found[target]["checks"]]
    failed = [check for check in entries if not check["passed"]]
    result = {
        "settings": settings,
        "passed": not failed,
        "checks": entries,
        "logits": {target: found[target]["logits"] for target in targets},
    }
    if parallel.rank == 0:
        store.write_json(path, result)
        how = "FAILED" if failed else "passed"
        parallel.log(f"verify {fmt.name}: {how} in {time.monotonic() - begin:.1f} s")
    if failed:
        raise VerificationError(f"verify {fmt.name}: {failed[0]['name']}: {failed[0]['detail']}")


def _still_proven(path: Path, settings: dict[str, str], folders: list[Path]) -> bool:
    """It passed before, and every file is still the one that was proven."""
    before = store.read_json(path) if path.is_file() else {}
    if not before.get("passed") or before["settings"] != settings:
        return False
    return not any(_check_files(folder) for folder in folders)


def _check_target(
    job: RunContext, fmt: QuantFormat, target: str, expected: ExpectedLogits
) -> dict[str, Any]:
    """All checks of one target, in an order where the first failure explains the later ones."""
    folder = job.folder(fmt.name, target)
    entries: list[dict[str, Any]] = []

    def note(name: str, problems: list[str], good: str) -> None:
        detail = "; ".join(problems[:3]) if problems else good
        entries.append({"name": f"{target} {name}", "passed": not problems, "detail": detail})

    note("files", _check_files(folder), "sha256 of every file as written")
    if target == "trtllm":
        note("contract", check_contract(folder / "llm"), "names, shapes, dtypes, config")
    logits: dict[str, Any] = {}
    try:
        note("configs", _check_configs(job, fmt, target), "describe the source in this format")
        logits = _check_content(job, fmt, target, expected, note)
    except torch.OutOfMemoryError:
        raise  # says nothing about the files
    except Exception as error:  # whatever damage does to a reader is a finding, not a bug
        note("readable", [f"{type(error).__name__}: {error}"], "")
    return {"checks": entries, "logits": logits}


def _check_configs(job: RunContext, fmt: QuantFormat, target: str) -> list[str]:
    plan, folder = job.plan, job.folder(fmt.name, target)
    kv = KV_CACHES.get(plan.recipe.quantize.kv_cache)
    wanted = ExpectedQuantization(fmt, plan.recipe.quantize.group_size, kv)
    if target == "trtllm":
        return check_trtllm_config(folder / "llm", plan.decoder, wanted, plan.dtype)
    if target == "nemo":
        whole = full_config(plan.config)
        layer = whole.vision_feature_layer
        return check_nemo(folder, plan.decoder, whole.vision_config, layer, plan.dtype)
    check = check_hf_configs if target == "hf" else check_compressed_configs
    home = folder / plan.family.decoder_subfolder
    return check(home, plan.family.decoder_config(plan.export_config), wanted)


def _check_files(folder: Path) -> list[str]:
    wanted = store.require_manifest(folder, "export")["files"]
    found = store.hash_files(folder, [name for name in wanted if (folder / name).is_file()])
    problems = [f"{name} is missing" for name in wanted if name not in found]
    for name, entry in found.items():
        if entry["sha256"] != wanted[name]["sha256"]:
            problems.append(f"{name} was changed after it was written")
    return problems


def _check_content(
    job: RunContext, fmt: QuantFormat, target: str, expected: ExpectedLogits, note: Any
) -> dict[str, Any]:
    plan = job.plan
    read, vision = read_model_form(job, target, fmt)
    decoder_names = plan.decoder.shapes(plan.family.parameter_map)
    linear_rows = tuple(row for row in plan.family.parameter_map if row.is_linear)
    note("coverage", checks.check_names(read, decoder_names), f"{len(decoder_names)} tensors")
    quantized = plan.decoder.shapes(linear_rows)
    note("quantized set", checks.check_quantized_set(read, quantized), f"{len(quantized)} linears")
    folds = _folds(job, fmt, target)
    with open_source(plan.tensors) as source:
        problems = checks.check_untouched(read.plain, source, job.dtype, folds.norms)
        problems += checks.check_untouched(vision, source, job.dtype)
        missing = set(plan.vision_names) - set(vision)
        problems += [f"{name} is missing" for name in sorted(missing)]
        count, scaled = len(read.plain) + len(vision), len(folds.norms)
        note("untouched", problems, f"{count - scaled} tensors bit-equal, {scaled} norms scaled")
        linears = unfold(read.linears, folds) if folds.inputs else read.linears
        device = reference_device(job, torch.float32)
        problems, worst = checks.check_linears(linears, source, job.dtype, device)
        note("weights", problems, f"at most {worst:.3f} of what rounding allows")
    if fmt.activation in INPUT_SCALE_DIVISOR and not _by_token(fmt, target):
        wanted = _input_scales(job, fmt)
        problems = checks.check_input_scales(read.linears, wanted)
        note("input scales", problems, f"{len(wanted)} as solved")
    if plan.recipe.quantize.kv_cache != "none":
        pairs = _kv_scales(job, fmt, folds, together=target == "trtllm")
        note("KV scales", checks.check_kv_scales(read.kv, pairs), f"{len(pairs)} layers as solved")
    runtime = ReferenceModel(plan.family, plan.config, read, vision, torch.float32, device)
    return _check_logits(fmt, runtime, expected, _tolerance(job, fmt, target, expected), note)


def _by_token(fmt: QuantFormat, target: str) -> bool:
    """vLLM's W4A8 has no static scale of inputs: each token brings its own."""
    return target == "compressed_tensors" and fmt.second_weight is not None


def _folds(job: RunContext, fmt: QuantFormat, target: str) -> Folds:
    """Where scales in front of linears went; nowhere, if the target keeps them."""
    if target != "compressed_tensors" or not fmt.pre_quant_scale:
        return Folds()
    layers = []
    for layer in range(job.plan.decoder.layers):
        scales = load_scales(job.folder(fmt.name, "scales"), layer)
        layers.append(
            {
                name: one.pre_quant_scale
                for name, one in scales.items()
                if one.pre_quant_scale is not None
            }
        )
    return find_folds(job.plan.family.parameter_map, job.plan.decoder, layers)


def _tolerance(job: RunContext, fmt: QuantFormat, target: str, expected: ExpectedLogits) -> float:
    """Mean distance that logits may have when activations are not rounded.

    vLLM's W4A8 rounds scales of groups to fp8, which the model does not, and SmoothQuant's o_proj
    is rounded anew where query heads come to share a scale: two draws of the same kind of noise.
    """
    shared = fmt.algorithm == "smoothquant" and job.plan.decoder.sizes(1).queries_per_kv_head > 1
    if _by_token(fmt, target) or (target == "compressed_tensors" and shared):
        return NOISE_FACTOR * _distance(expected.exact, expected.source)["mean"]
    packed = target == "compressed_tensors" and fmt.weight.startswith("int")
    return TOLERANCE_ROUNDED_TWICE if packed or fmt.second_weight is not None else TOLERANCE


def _input_scales(job: RunContext, fmt: QuantFormat) -> dict[str, float]:
    """Hugging Face linear -> scale of its input, as solved."""
    assert fmt.activation is not None
    wanted: dict[str, float] = {}
    for layer in range(job.plan.decoder.layers):
        scales = load_scales(job.folder(fmt.name, "scales"), layer)
        for row in job.plan.family.parameter_map:
            if row.is_linear:
                amax = scales[row.megatron_name.split(".")[-2]].input_amax
                assert amax is not None
                scale = float(amax) / INPUT_SCALE_DIVISOR[fmt.activation]
                wanted |= {
                    name.removesuffix(".weight"): scale for name in row.for_layer(layer).hf_names
                }
    return wanted


def _kv_scales(
    job: RunContext, fmt: QuantFormat, folds: Folds, *, together: bool
) -> list[tuple[float, float]]:
    """Scales of keys and of values of each layer, as solved; `together`: the larger, for both."""
    reach = KV_SCALE_DIVISOR[job.plan.recipe.quantize.kv_cache]
    pairs = []
    for layer in range(job.plan.decoder.layers):
        found = [float(amax) / reach for amax in load_kv(job.folder(fmt.name, "scales"), layer)]
        key, value = [max(found)] * 2 if together else found
        pairs.append((key, value * (folds.values[layer] if folds.values else 1.0)))
    return pairs


def _check_logits(
    fmt: QuantFormat, runtime: ReferenceModel, expected: ExpectedLogits, tolerance: float, note: Any
) -> dict[str, Any]:
    """Logits with activations not rounded, then as they are served."""
    runtime.round_activations(False)
    exact = _distance(reference_logits(runtime, expected.samples), expected.exact)
    found = f"logits are {exact['mean']:.1e} off, {tolerance:.0e} is allowed"
    note("logits", [] if exact["mean"] <= tolerance else [found], found)
    result = exact | {"tolerance_mean": tolerance, "samples": len(expected.samples)}
    if fmt.activation is None and runtime.kv is None:
        return result
    runtime.round_activations(True)
    rounded = _distance(reference_logits(runtime, expected.samples), expected.rounded)
    noise = _distance(expected.rounded, expected.source)
    limit = NOISE_FACTOR * noise["mean"]
    found = f"logits are {rounded['mean']:.1e} off, rounding itself moves them {noise['mean']:.1e}"
    note("logits, activations rounded", [] if rounded["mean"] <= limit else [found], found)
    return result | {"mean_rounded": rounded["mean"], "mean_quantization": noise["mean"]}


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, float]:
    """The worst sample's distance between two lists of logits."""
    found = [checks.compare_logits(a, b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "largest": max(entry["largest"] for entry in found),
        "mean": max(entry["mean"] for entry in found),
        "argmax_equal": min(entry["argmax_equal"] for entry in found),
    }
