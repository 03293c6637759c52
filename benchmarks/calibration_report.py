"""Format the results of benchmarks/calibration.py as a markdown page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from calibration_common import (
    ALL_FIVE,
    CASE_FORMATS,
    FORWARD,
    IMAGE_TOKENS,
    MODELOPT_PRESETS,
    OBSERVE_MAXIMA,
    OBSERVE_MOMENTS,
    SINGLE_RANK,
    BenchmarkConfig,
)
from calibration_comparison import compare_with_modelopt, goals_table, markdown_table, ratio, wrap
from calibration_results import Line, Medians, Results


def make_report(lines: Sequence[Line]) -> str:
    """Return the page."""
    results = Results(lines)
    sections = [_setup_section(results)]
    if results.configs("package"):
        sections += [
            _lower_bound_section(results),
            *_package_sections(results),
            _layouts_section(results),
            _breakdown_section(results),
        ]
    if results.configs("modelopt"):
        sections.append(_modelopt_section(results))
    if results.configs("package"):
        sections.append(goals_table(results))
    sections += [_profile_section(line) for line in results.of_type("profile")]
    sections.append(_missing_section(results))
    return "\n\n".join(section for section in sections if section)


def _setup_section(results: Results) -> str:
    setup, workload = results.setups[-1], results.workload
    machine = setup["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commands = "\n".join(f"    {one['command']}    # {one['date']}" for one in results.setups)
    hardware = f"""{", ".join(machine["gpus"]) or "no GPU"}; {machine["cores"]} cores,
        {machine["memory"]} GiB; Python {machine["python"]}, {versions}. Files in
        {setup["files"]}."""
    tokens = workload.tokens_per_sample
    description = f"""{"A small decoder" if workload.small else "LLaVA-1.5-7B's decoder"},
        {workload.layers} layers, random bf16 weights; {workload.samples} samples of {tokens}
        tokens ({IMAGE_TOKENS} image tokens), {workload.samples * tokens:,} tokens in total, in
        micro-batches of {workload.micro_batch}. Medians over the listed number of runs after a
        warm-up. Excluded everywhere: vision tower, image processing, loading of models.
        "files" is the time in which only files were processed: statistics reduced and written,
        without the time of layers solved meanwhile; scales written; at TP 2 also waiting for
        prefetched layers. Hashing of the written files for the manifests is excluded."""
    return f"# Calibration benchmark\n\n{commands}\n\n{wrap(hardware)}\n\n{wrap(description)}"


def _peaks(medians: Medians) -> str:
    return " / ".join(f"{peak:.1f}" for peak in medians.peak_gb) or "-"


def _lower_bound_section(results: Results) -> str:
    workload = results.workload
    flop = workload.forward_flop(workload.samples)
    rows = []
    for config in results.configs("package"):
        rates, forward = results.fact(config.name, "rates"), results.medians(config.name, FORWARD)
        if rates is None or forward is None:
            continue
        bound = flop / sum(rates)
        tokens_per_second = workload.samples * workload.tokens_per_sample / forward.seconds
        rows.append(
            (
                config.description,
                " / ".join(f"{rate / 1e12:.2f}" for rate in rates),
                f"{bound:.2f}",
                f"{forward.seconds:.2f}",
                f"{100 * bound / forward.seconds:.0f} %",
                f"{tokens_per_second:,.0f}",
            )
        )
    head = (
        "ranks",
        "bf16 matmul, TFLOP/s",
        "lower bound, s",
        "forward pass, s",
        "utilization",
        "tokens/s",
    )
    note = f"""A forward pass is {flop / 1e15:.3g} PFLOP (linears, and the half of the attention
        that is not masked; observe has no output layer). The lower bound is its duration at the
        rate of a large bf16 matrix multiplication in the same process."""
    return f"## Lower bound\n\n{wrap(note)}\n\n{markdown_table(head, rows)}"


def _package_sections(results: Results) -> list[str]:
    return [
        section
        for samples in results.sample_counts
        for config in results.configs("package")
        if (section := _package_section(results, config, samples))
    ]


def _package_section(results: Results, config: BenchmarkConfig, samples: int) -> str:
    forward = results.medians(config.name, FORWARD, samples)
    if forward is None:
        return ""
    tokens = samples * results.workload.tokens_per_sample
    is_single = config.name == SINGLE_RANK
    rows = []
    for case in (FORWARD, OBSERVE_MAXIMA, OBSERVE_MOMENTS, *CASE_FORMATS):
        medians = results.medians(config.name, case, samples)
        single = results.medians(SINGLE_RANK, case, samples)
        if medians is None:
            continue
        row = [
            f"**{case}**" if case in CASE_FORMATS else case,
            f"{medians.seconds:.2f}",
            f"{medians.file_seconds:.2f}",
            str(medians.runs),
            ratio(medians.seconds, forward),
            f"{tokens / medians.seconds:,.0f}",
            _peaks(medians),
        ]
        if not is_single:
            row.append("-" if single is None else f"{single.seconds / medians.seconds:.2f}")
        rows.append(row)
    head = ["case", "s", "files, s", "runs", "x forward pass", "tokens/s", "peak GB per rank"]
    head += [] if is_single else ["speedup over 1 rank"]
    note = f"""Bold: observe and solve of a format, from a model in memory to scale files, with
        statistics written. "{ALL_FIVE}" is one observe and one solve. Without tensor parallelism,
        layers are solved while statistics are written."""
    if statistics := results.fact(config.name, "statistics"):
        size, passes = statistics
        note += f" Statistics with second moments: {size:.2f} GB, passes over the data: {passes}."
    title = f"## This package, {config.description}, {samples} samples"
    return f"{title}\n\n{wrap(note)}\n\n{markdown_table(head, rows)}"


def _layouts_section(results: Results) -> str:
    """Compare the sha256 of the scales with those of one rank."""
    single = results.fact(SINGLE_RANK, "scales") or {}
    rows = []
    for config in results.configs("package"):
        if config.name == SINGLE_RANK:
            continue
        scales = results.fact(config.name, "scales") or {}
        for label in sorted(single.keys() & scales.keys()):
            is_equal = scales[label] == single[label]
            rows.append((config.description, label, "yes" if is_equal else "no"))
    head = ("ranks", "scales of", "same bytes as on 1 rank")
    return f"## Layouts\n\n{markdown_table(head, rows)}" if rows else ""


def _breakdown_section(results: Results) -> str:
    rows = []
    for config in results.configs("package"):
        forward, maxima, moments = (
            results.medians(config.name, case)
            for case in (FORWARD, OBSERVE_MAXIMA, OBSERVE_MOMENTS)
        )
        if forward is None or maxima is None or moments is None:
            continue
        maxima_seconds = maxima.seconds - maxima.file_seconds
        parts = [
            forward.seconds,
            maxima_seconds - forward.seconds,
            moments.seconds - moments.file_seconds - maxima_seconds,
            moments.file_seconds,
        ]
        cells = (f"{part:.2f} ({100 * part / moments.seconds:.0f} %)" for part in parts)
        rows.append([config.description, *cells])
    head = ("ranks", "forward pass", "maxima and sums", "second moments", "reducing and saving")
    note = wrap(
        """Seconds and share of the total, as differences of medians. Reducing and saving, which
        waits for the slowest rank, is measured directly."""
    )
    title = "## Breakdown of observe with second moments"
    return f"{title}\n\n{note}\n\n{markdown_table(head, rows)}"


def _modelopt_section(results: Results) -> str:
    rows = []
    configs, tokens = results.configs("modelopt"), results.workload.tokens_per_sample
    for config in configs:
        for samples, case in itertools.product(results.sample_counts, (FORWARD, *MODELOPT_PRESETS)):
            medians = results.medians(config.name, case, samples)
            if medians is not None:
                rows.append(
                    (
                        config.description,
                        str(samples),
                        MODELOPT_PRESETS.get(case, case),
                        f"{medians.seconds:.2f}",
                        str(medians.runs),
                        ratio(medians.seconds, results.medians(config.name, FORWARD, samples)),
                        f"{samples * tokens / medians.seconds:,.0f}",
                        _peaks(medians),
                    )
                )
    head = (
        "model",
        "samples",
        "case",
        "s",
        "runs",
        "x its forward pass",
        "tokens/s",
        "peak GB per GPU",
    )
    note = "`mtq.quantize(model, preset, forward_loop)`, same batches, a new model for each run."
    if False in {results.fact(config.name, "CUDA extensions") for config in configs}:
        note += " Its CUDA extensions could not be loaded; it quantizes in plain torch."
    parts = ["## modelopt", wrap(note), markdown_table(head, rows), compare_with_modelopt(results)]
    return "\n\n".join(part for part in parts if part)


def _profile_section(line: Line) -> str:
    rows = [
        (
            f"`{name[:90].replace('|', '/')}`",
            f"{count:,}",
            f"{1e3 * seconds:.1f}",
            f"{100 * seconds / line['total']:.1f} %",
        )
        for name, count, seconds in line["kernels"]
    ]
    note = f"""Wall time {line["wall"]:.2f} s with profiler and files; {line["total"]:.2f} s in
        kernels and copies (on a CPU: in operations)."""
    table = markdown_table(("kernel", "calls", "ms", "share"), rows)
    return f"## Kernels: {line['case']}\n\n{wrap(note)}\n\n{table}"


def _missing_section(results: Results) -> str:
    lines = [
        f"* {line['config']}, {line['case']}: {line['error']}" for line in results.of_type("failed")
    ]
    skipped = {name: why for setup in results.setups for name, why in setup["skipped"].items()}
    lines += [f"* {name} skipped: {reason}" for name, reason in skipped.items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""
