"""The numbers of benchmarks/calibration.py as a page of markdown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from calibration_aims import against, aims, markdown, prose, ratio
from calibration_setting import (
    ALL,
    ASKED,
    FORWARD,
    IMAGE_TOKENS,
    MAXIMA,
    MOMENTS,
    POINTS,
    PRESETS,
    Point,
)
from calibration_table import ONE, Figure, Line, Table


def report(lines: Sequence[Line]) -> str:
    """The whole page."""
    table = Table(lines)
    parts = [_setup(table)]
    if table.points("ours"):
        parts += [_floor(table), *_ours(table), _same(table), _split(table)]
    if table.points("modelopt"):
        parts.append(_modelopt(table))
    if table.points("ours"):
        parts.append(aims(table))
    parts += [_profile(line) for line in table.of_kind("profile")]
    parts.append(_missing(table))
    return "\n\n".join(part for part in parts if part)


def _setup(table: Table) -> str:
    setup, setting = table.setup[-1], table.setting
    found = setup["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    commands = "\n".join(f"    {one['command']}    # {one['date']}" for one in table.setup)
    where = f"""{", ".join(found["gpus"]) or "no GPU"}; {found["cores"]} cores, {found["memory"]}
        GiB; Python {found["python"]}, {versions}. Files in {setup["files"]}."""
    what = f"""A decoder of LLaVA-1.5-7B's shape{" made small" if setting.small else ""},
        {setting.layers} layers, random bf16 weights; {setting.samples} samples of {setting.length}
        tokens ({IMAGE_TOKENS} of an image), {setting.samples * setting.length:,} together, in
        micro-batches of {setting.micro_batch}. Medians of as many runs as are told, warm. Tower,
        image processing and the loading of models are left out on all sides. "Files" are the
        seconds in which nothing but files went on: statistics put together and written, less what
        was solved meanwhile; scales written; at TP 2 also waiting for what is read. The sha256 of
        what is written, which goes into the stages' manifests, is left out."""
    return f"# Calibration, measured\n\n{commands}\n\n{prose(where)}\n\n{prose(what)}"


def _peaks(figure: Figure) -> str:
    return " / ".join(f"{peak:.1f}" for peak in figure.peaks) or "-"


def _floor(table: Table) -> str:
    flop = table.setting.flop(table.setting.samples)
    rows = []
    for point in table.points("ours"):
        rates, plain = table.fact(point.name, "rates"), table.figure(point.name, FORWARD)
        if rates is None or plain is None:
            continue
        floor = flop / sum(rates)
        tokens = table.setting.samples * table.setting.length / plain.seconds
        rows.append(
            (
                point.about,
                " / ".join(f"{rate / 1e12:.2f}" for rate in rates),
                f"{floor:.2f}",
                f"{plain.seconds:.2f}",
                f"{100 * floor / plain.seconds:.0f} %",
                f"{tokens:,.0f}",
            )
        )
    head = ("ranks", "bf16 product, TFLOP/s", "floor, s", "plain forward, s", "reached", "tokens/s")
    about = f"""A plain forward is {flop / 1e15:.3g} PFLOP (linears, and the half of the
        attention that is not masked; observe has no head); the floor is that at the rate of a
        large bf16 product in the same process."""
    return f"## The floor\n\n{prose(about)}\n\n{markdown(head, rows)}"


def _ours(table: Table) -> list[str]:
    return [
        text
        for samples in table.counts
        for point in table.points("ours")
        if (text := _ours_on(table, point, samples))
    ]


def _ours_on(table: Table, point: Point, samples: int) -> str:
    plain, tokens = table.figure(point.name, FORWARD, samples), samples * table.setting.length
    rows = []
    for what in (FORWARD, MAXIMA, MOMENTS, *ASKED):
        figure, alone = table.figure(point.name, what, samples), table.figure(ONE, what, samples)
        if figure is not None:
            row = [
                f"**{what}**" if what in ASKED else what,
                f"{figure.seconds:.2f}",
                f"{figure.files:.2f}",
                str(figure.runs),
                ratio(figure.seconds, plain),
                f"{tokens / figure.seconds:,.0f}",
                _peaks(figure),
            ]
            if point.name != ONE:
                row.append("-" if alone is None else f"{alone.seconds / figure.seconds:.2f}")
            rows.append(row)
    if plain is None:
        return ""
    head = ["what", "s", "files, s", "runs", "x forward", "tokens/s", "GB a rank"]
    head += ["x 1 rank"] if point.name != ONE else []
    about = f"""In bold what a user asks for: observe and solve of a format, from files of the
        model in memory to files of scales, statistics written. "{ALL}" is one observe and one
        solve. Where ranks hold whole weights, layers are solved while statistics are written."""
    if found := table.fact(point.name, "statistics"):
        about += f" Statistics with second moments are {found[0]:.2f} GB, from {found[1]} pass(es)."
    title = f"## Ours, {point.about}, {samples} samples"
    return f"{title}\n\n{prose(about)}\n\n{markdown(head, rows)}"


def _same(table: Table) -> str:
    """Whose scales have the bytes of those of one rank."""
    alone = table.fact(ONE, "scales") or {}
    rows = []
    for point in table.points("ours"):
        found = table.fact(point.name, "scales") or {}
        both = sorted(alone.keys() & found.keys()) if point.name != ONE else []
        said = {about: "yes" if found[about] == alone[about] else "no" for about in both}
        rows += [(point.about, about, answer) for about, answer in said.items()]
    head = ("ranks", "scales of", "same bytes as on 1 rank")
    return f"## Layouts\n\n{markdown(head, rows)}" if rows else ""


def _split(table: Table) -> str:
    rows = []
    for point in table.points("ours"):
        plain, maxima, moments = (
            table.figure(point.name, what) for what in (FORWARD, MAXIMA, MOMENTS)
        )
        if plain is None or maxima is None or moments is None:
            continue
        statistic = maxima.seconds - maxima.files - plain.seconds
        second = moments.seconds - moments.files - (maxima.seconds - maxima.files)
        parts = [plain.seconds, statistic, second, moments.files]
        rows.append(
            [point.about, *(f"{part:.2f} ({100 * part / moments.seconds:.0f} %)" for part in parts)]
        )
    head = ("ranks", "forward", "maxima and sums", "second moments", "reduced and saved")
    title = "## Where the time of observe with second moments goes"
    about = prose(
        """Seconds, and the share of the whole; by subtraction. Saving, which waits for the slowest
        rank, is by the clock."""
    )
    return f"{title}\n\n{about}\n\n{markdown(head, rows)}"


def _modelopt(table: Table) -> str:
    rows = []
    for point in table.points("modelopt"):
        for samples, what in itertools.product(table.counts, (FORWARD, *PRESETS)):
            figure = table.figure(point.name, what, samples)
            if figure is not None:
                rows.append(
                    (
                        point.about,
                        str(samples),
                        PRESETS.get(what, what),
                        f"{figure.seconds:.2f}",
                        str(figure.runs),
                        ratio(figure.seconds, table.figure(point.name, FORWARD, samples)),
                        f"{samples * table.setting.length / figure.seconds:,.0f}",
                        _peaks(figure),
                    )
                )
    loaded = {table.fact(point.name, "CUDA extensions") for point in table.points("modelopt")}
    note = " Its CUDA extensions could not be loaded, so it rounds in plain torch."
    head = ("path", "samples", "what", "s", "runs", "x its forward", "tokens/s", "GB a GPU")
    about = "`mtq.quantize(model, preset, forward_loop)`, same batches, a fresh model for each run."
    parts = ["## modelopt", prose(about + (note if False in loaded else "")), markdown(head, rows)]
    return "\n\n".join(part for part in (*parts, against(table)) if part)


def _profile(line: Line) -> str:
    rows = [
        (f"`{name[:90].replace('|', '/')}`", f"{count:,}", f"{1e3 * seconds:.1f}", share)
        for name, count, seconds in line["rows"]
        for share in [f"{100 * seconds / line['total']:.1f} %"]
    ]
    about = f"""{line["wall"]:.2f} s by the clock, under the profiler and with files;
        {line["total"]:.2f} s in kernels and copies (on a CPU: in operations)."""
    table = markdown(("kernel", "times", "ms", "share"), rows)
    return f"## Kernels: {line['what']}\n\n{prose(about)}\n\n{table}"


def _missing(table: Table) -> str:
    lines = [
        f"* {POINTS[line['point']].name}, {line['what']}: {line['failed']}"
        for line in table.of_kind("failed")
    ]
    left = {name: why for setup in table.setup for name, why in setup["left"].items()}
    lines += [f"* {name} was left out: {why}" for name, why in left.items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""
