"""Report: table alignment, HTML escaping, plots, and facts that are missing."""

import re
from html.parser import HTMLParser
from unittest import mock

import PIL.Image
import pytest

from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.report import page, plots, table

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def make_score(accuracy):
    by_kind = {"colorQuery": [30, 40], "exist": [9, 10]}
    interval = [accuracy - 2, accuracy + 2]
    return {
        "rule": "llava", "total": 50, "correct": 39, "accuracy": accuracy, "interval": interval,
        "by_kind": by_kind,
    }  # fmt: skip


def make_format(name, *, sees=True, passed=True, error=0.01):
    return {
        "name": name, "about": "weights & <codes>", "targets": ["trtllm", "hf"], "bytes": 54_321,
        "accuracy": make_score(77.0), "swapped": make_score(40.0), "sees": sees,
        "verdict": "sees: large gap" if sees else "ignores images: small gap",
        "comparison": {
            "total": 50, "lost": 3, "gained": 1, "difference": -4.0, "interval": [-9.0, 1.0],
            "p_value": 0.62, "gate": {"limit": 0.5, "passed": False},
        },
        "verify": {
            "passed": passed,
            "checks": [{"name": "names", "passed": passed, "detail": "12 found <of> 12"}],
            "logits": {"kl": 0.00123456},
        },
        "layers": [
            {
                "layer": layer, "linear": linear, "error": error * (layer + 1), "alpha": None,
                "image_share": 0.25 * layer, "error_text": 3 * error, "error_image": error / 2,
            }
            for layer in range(3)
            for linear in LINEARS
        ],
    }  # fmt: skip


def make_facts(*formats):
    return {
        "title": "<script>alert(1)</script>", "model": "folder/\"x\" & y", "date": "2026-01-02",
        "layout": "TP 2 x PP 1 x DP 2", "versions": {"torch": "2.13.0"},
        "recipe": {"quantize": {"format": ["fp8"], "group_size": 128}, "limit": None},
        "formats": list(formats),
        "baseline": {"accuracy": make_score(81.0), "swapped": make_score(41.0), "bytes": 100_000},
        "calibration": {
            "samples": 12, "tokens": {"image": 6912, "text": 300}, "data": "scenes",
            "seconds": 3.25, "ids_per_rank": [[f"a{i}" for i in range(6)], ["b0", "b1", "a0"]],
        },
        "timings": [{"stage": "observe", "seconds": 3.25}],
    }  # fmt: skip


class Reader(HTMLParser):
    """HTML parser that checks the nesting of tags and collects text and images."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images, self.tags = [], "", [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    formats = (make_format("fp8"), make_format("int4_awq", sees=False, error=0.1))
    formats[0]["layers"][0]["error"] = 0.0  # kept in 16 bit: not plotted and not reported as broken
    return page.write_report(folder, make_facts(*formats))


def test_table_is_aligned_within_100_columns():
    rows = [
        {
            "format": max(FORMATS, key=len), "gqa": 100.0, "change": -100.0, "p_value": 1e-30,
            "interval": (-100.0, -100.0), "sight": "ignores images", "ratio": 99.94,
            "verify": False,
        },
        {"format": "fp8"},
        {"format": "16 bit", "baseline": True},
    ]  # fmt: skip
    lines = table.render(rows).splitlines()
    assert max(map(len, lines)) <= 100
    bounds = [match.span() for match in re.finditer("-+", lines[1])]
    assert len(bounds) == len(table.HEADER)
    worst = [lines[2][start:end].strip() for start, end in bounds]
    assert worst == [
        max(FORMATS, key=len), "100.00 %", "-100.00", "-100.00 to -100.00", "<0.001",
        "ignores images", "99.94x", "FAILED",
    ]  # fmt: skip
    assert [lines[3][start:end].strip() for start, end in bounds] == ["fp8"] + ["not run"] * 7
    assert lines[4].split() == ["16", "bit", "not", "run"]


def test_table_rows_come_from_the_facts():
    first, row = table.summarize(make_facts(make_format("fp8")))
    assert table.cells(first) == ("16 bit", "81.00 %", "", "", "", "", "", "")
    assert table.cells(row) == (
        "fp8", "77.00 %", "-4.00", "-9.00 to +1.00", "0.620", "sees", "0.54x", "passed",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1.00 MB"), (7 * 10**9, "7.00 GB")],
)
def test_sizes_are_decimal(size, text):
    assert table.size_text(size) == text


def test_page_shows_the_facts_escaped(report):
    found = read(report)
    for text in (
        "<script>alert(1)</script>", 'folder/"x" & y', "weights & <codes>", "12 found <of> 12",
        "quantize.group_size", "fp8", "77.00 %", "-4.00", "kl 0.001235", "6,912", "75.0 %", "llava",
        "a0, a1, a2, a3, ...", "9 sample ids on 2 data-parallel ranks, 1 duplicated.",
    ):  # fmt: skip
        assert text in found.text
    assert "not run" not in found.text


def test_page_is_self_contained(report):
    found = read(report)
    assert "script" not in found.tags and "link" not in found.tags
    assert "http" not in report.read_text()
    assert found.images == ["accuracy.png", "bytes.png", "layers.png"]
    for name in found.images:
        with PIL.Image.open(report.parent / name) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_page_shows_problems_first(report):
    text = read(report).text
    assert "int4_awq: ignores images: small gap." in text
    assert "fp8: GQA accuracy drops by 4.00 points, the gate allows 0.5." in text
    assert text.index("ignores images: small gap") < text.index("95 % interval")


def test_nan_errors_and_failed_verification_are_problems(tmp_path):
    broken = make_format("fp8", passed=False, error=float("nan"))
    text = read(page.write_report(tmp_path, {"title": "x", "formats": [broken]})).text
    assert "fp8: verification FAILED; do not use this checkpoint." in text
    assert "fp8: the output error of 12 linears is NaN or infinite." in text
    assert not (tmp_path / "layers.png").exists()


def test_missing_facts_are_shown_as_not_run_and_old_plots_are_removed(tmp_path):
    (tmp_path / "accuracy.png").write_bytes(b"old")
    path = page.write_report(tmp_path, {"title": "x", "formats": [{"name": "fp8"}]})
    found = read(path)
    assert not found.images and [entry.name for entry in tmp_path.iterdir()] == ["index.html"]
    for text in ("GQA: not run", "fp8: not run", "Calibration: not run", "Export: not run"):
        assert text in found.text
    assert "No problems found, but not all checks were run: fp8." in found.text


def test_page_shows_the_error_of_every_linear(report):
    found = read(report)
    assert "details" in found.tags
    for layer in range(3):  # of int4_awq
        line = "\n".join([str(layer), *[f"{0.1 * (layer + 1):.4f}"] * 4])
        assert line in found.text
    assert "fp8: 12 linears" in found.text and "int4_awq: 12 linears" in found.text
    worst = found.text.index("The 3 linears with the largest error")
    assert worst < found.text.index("All linears")


def test_every_layer_is_shown_once_for_an_odd_number_of_layers(tmp_path):
    layers = [
        {"layer": layer, "linear": linear, "error": layer + 0.5, "alpha": None}
        for layer in range(33)
        for linear in LINEARS
    ]
    item = make_format("fp8") | {"layers": layers[:-1]}  # the last linear has no error
    page.write_report(tmp_path, make_facts(item))
    text = read(tmp_path / "index.html").text.split("All linears")[1].split("Verification")[0]
    shown = re.findall(r"^(\d+\.\d{4})$", text, flags=re.MULTILINE)
    assert sorted(map(float, shown)) == sorted(entry["error"] for entry in layers[:-1])
    assert "32\n" + "32.5000\n" * 3 + "none" in text


def test_modalities_are_compared_if_both_were_observed(report, tmp_path):
    text = read(report).text.split("Error by modality")[1].split("Medians")[0]
    assert text.split() == [
        "format", "linears", "image", "share", "error,", "text", "tokens", "error,", "image",
        "tokens", "fp8", "12", "0.25", "0.0300", "0.0050", "int4_awq", "12", "0.25", "0.3000",
        "0.0500",
    ]  # fmt: skip
    item = make_format("fp8")
    for entry in item["layers"]:
        entry["error_image"] = None
    text = read(page.write_report(tmp_path, make_facts(item))).text
    assert "Error by modality" not in text


@pytest.mark.parametrize("cache", ["none", "fp8"])
def test_the_kv_cache_format_is_shown(tmp_path, cache):
    facts = make_facts(make_format("fp8")) | {"kv_cache": cache}
    text = read(page.write_report(tmp_path, facts)).text
    assert ("KV cache: fp8, in all formats." in text) == (cache == "fp8")


@pytest.mark.parametrize("images", [0, 6912])
def test_calibration_on_text_only_is_flagged(tmp_path, images):
    facts = make_facts(make_format("fp8"))
    facts["calibration"]["tokens"] = {"text": 300, "image": images}
    text = read(page.write_report(tmp_path, facts)).text
    assert f"image tokens\n{images:,}\n" in text.replace("\n\n", "\n")
    assert ("No image tokens: calibrated on text only." in text) == (images == 0)


def test_many_formats_have_distinct_styles_in_the_plot(tmp_path):
    from matplotlib.axes import Axes

    names = list(FORMATS)
    drawn = []
    with mock.patch.object(Axes, "plot", lambda *_, **style: drawn.append(style)):
        plots.plot_layers({"formats": [make_format(name) for name in names]}, tmp_path / "x.png")
    styles = {(s["label"], s["color"], s["marker"], s["linestyle"]) for s in drawn}
    assert sorted(style[0] for style in styles) == sorted(names)
    assert len({style[1:] for style in styles}) == len(names) > len(plots.SERIES)
