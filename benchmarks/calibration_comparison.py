"""Comparison tables of benchmarks/calibration.py: with modelopt, the forward pass and the goals."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calibration_common import ALL_FIVE, FORWARD, MODELOPT_PRESETS, SINGLE_RANK, BenchmarkConfig
from calibration_results import Medians, Results


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Largest accepted duration of a case.

    case: formats that are calibrated together.
    max_forward_ratio: duration over that of the forward pass on the same ranks.
    min_modelopt_speedup: speedup over modelopt's fastest config; None without a goal.
    """

    case: str
    max_forward_ratio: float
    min_modelopt_speedup: float | None = None


GOALS = (
    Goal(case="fp8", max_forward_ratio=1.15, min_modelopt_speedup=5.0),
    Goal(case="int8_sq", max_forward_ratio=1.15, min_modelopt_speedup=5.0),
    Goal(case="int4_awq", max_forward_ratio=3.0, min_modelopt_speedup=15.0),
    Goal(case=ALL_FIVE, max_forward_ratio=4.0),
)
MIN_TWO_GPU_SPEEDUP = 1.9


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def wrap(text: str) -> str:
    """Return a paragraph wrapped to 110 columns."""
    return textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False)


def ratio(seconds: float, base: Medians | None) -> str:
    """Return a duration relative to a base, or "-" without one."""
    return "-" if base is None or not base.seconds else f"{seconds / base.seconds:.2f}"


def compare_with_modelopt(results: Results) -> str:
    """Return a table of the formats that both packages calibrated; "" if there are none."""
    configs, rows = results.configs("package"), []
    for samples in results.sample_counts:
        for name in MODELOPT_PRESETS:
            best = _fastest_modelopt(results, name, samples)
            if best is None or not configs:
                continue
            best_config, best_medians = best
            row = [name, str(samples), f"{best_medians.seconds:.2f} ({best_config.description})"]
            for config in configs:
                medians = results.medians(config.name, name, samples)
                if medians is None:
                    row.append("-")
                else:
                    speedup = best_medians.seconds / medians.seconds
                    row.append(f"{medians.seconds:.2f} ({speedup:.1f} x faster)")
            rows.append(row)
    head = ["format", "samples", "fastest modelopt config, s"]
    head += [f"this package, {config.description}, s" for config in configs]
    return f"Formats that both packages calibrate:\n\n{markdown_table(head, rows)}" if rows else ""


def _fastest_modelopt(
    results: Results, name: str, samples: int
) -> tuple[BenchmarkConfig, Medians] | None:
    """Return modelopt's fastest config for a format."""
    measured = [
        (config, medians)
        for config in results.configs("modelopt")
        if (medians := results.medians(config.name, name, samples)) is not None
    ]
    return min(measured, key=lambda pair: pair[1].seconds) if measured else None


def goals_table(results: Results) -> str:
    """Return a table with a row per goal and number of samples and a column per config."""
    configs, rows = results.configs("package"), []
    for samples in results.sample_counts:
        for goal in GOALS:
            rows += _goal_rows(results, configs, goal, samples)
        for name in ("fp8", "int4_awq", ALL_FIVE):
            single = results.medians(SINGLE_RANK, name, samples)
            cells = [
                _speedup_cell(
                    results.medians(config.name, name, samples), single, MIN_TWO_GPU_SPEEDUP
                )
                if config.world_size == 2
                else "-"
                for config in configs
            ]
            text = f"two GPUs at least {MIN_TWO_GPU_SPEEDUP:g} x as fast as one"
            rows.append([f"{name}, {samples} samples: {text}", *cells])
    head = ["goal", *(config.description for config in configs)]
    note = "Measured values; in parentheses without file I/O."
    return f"## Goals\n\n{note}\n\n{markdown_table(head, rows)}"


def _goal_rows(
    results: Results, configs: Sequence[BenchmarkConfig], goal: Goal, samples: int
) -> list[list[str]]:
    case, limit, speedup = goal.case, goal.max_forward_ratio, goal.min_modelopt_speedup
    label = f"{case}, {samples} samples: at most {limit:g} x the forward pass"
    rows = [[label, *(_forward_cell(results, c, case, samples, limit) for c in configs)]]
    best = _fastest_modelopt(results, case, samples)
    if speedup is not None and best is not None:
        label = f"{case}, {samples} samples: {speedup:g} x faster than modelopt"
        medians = [results.medians(config.name, case, samples) for config in configs]
        rows.append([label, *(_speedup_cell(one, best[1], speedup) for one in medians)])
    return rows


def _forward_cell(
    results: Results, config: BenchmarkConfig, name: str, samples: int, limit: float
) -> str:
    medians = results.medians(config.name, name, samples)
    forward = results.medians(config.name, FORWARD, samples)
    if medians is None or forward is None:
        return "-"
    without_files = ratio(medians.seconds - medians.file_seconds, forward)
    verdict = _verdict(medians.seconds <= limit * forward.seconds)
    return f"{ratio(medians.seconds, forward)} ({without_files}) {verdict}"


def _speedup_cell(medians: Medians | None, base: Medians | None, goal: float) -> str:
    if medians is None or base is None:
        return "-"
    speedup = base.seconds / medians.seconds
    return f"{speedup:.2f} {_verdict(speedup >= goal)}"


def _verdict(reached: bool) -> str:
    return "met" if reached else "**missed**"
