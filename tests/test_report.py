"""The report: a table that lines up, a page that escapes, plots that exist, gaps that are named."""

import re
from html.parser import HTMLParser

import PIL.Image
import pytest

from nemo_vlm_ptq.report import page, table

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
        "verdict": "sees: a lot" if sees else "no longer looks: not a lot",
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
            {"layer": layer, "linear": linear, "error": error * (layer + 1), "alpha": None}
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
    """Checks that tags close in order; keeps the text and the images."""

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
    formats[0]["layers"][0]["error"] = 0.0  # left in 16 bit: nothing to draw, nothing broken
    return page.write_report(folder, make_facts(*formats))


def test_table_lines_up_within_100_columns():
    rows = [
        {
            "format": "int8_smoothquant", "gqa_16bit": 100.0, "gqa": 0.0, "sees": False,
            "bytes": 999_400_000_000, "bytes_16bit": 10_000_000_000, "verify": False,
        },
        {"format": "fp8"},
    ]  # fmt: skip
    lines = table.render(rows).splitlines()
    assert max(map(len, lines)) <= 100
    bounds = [match.span() for match in re.finditer("-+", lines[1])]
    assert len(bounds) == len(table.HEADER)
    worst = [lines[2][start:end].strip() for start, end in bounds]
    assert worst == [
        "int8_smoothquant", "100.00 %", "0.00 %", "-100.00", "no longer looks", "999.40 GB",
        "99.94x", "FAILED",
    ]  # fmt: skip
    assert [lines[3][start:end].strip() for start, end in bounds] == ["fp8"] + ["not run"] * 7


def test_table_rows_come_from_the_facts():
    (row,) = table.summarize(make_facts(make_format("fp8")))
    assert table.cells(row) == (
        "fp8", "81.00 %", "77.00 %", "-4.00", "sees", "54.32 kB", "0.54x", "passed",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1.00 MB"), (7 * 10**9, "7.00 GB")],
)
def test_sizes_are_decimal(size, text):
    assert table.size_text(size) == text


def test_page_holds_the_facts_and_escapes_them(report):
    found = read(report)
    for text in (
        "<script>alert(1)</script>", 'folder/"x" & y', "weights & <codes>", "12 found <of> 12",
        "quantize.group_size", "fp8", "77.00 %", "-4.00", "kl 0.001235", "6,912", "75.0 %", "llava",
        "a0, a1, a2, a3, ...", "9 sample ids over 2 data-parallel ranks, 1 seen twice.",
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


def test_page_puts_problems_first(report):
    text = read(report).text
    assert "int4_awq: no longer looks: not a lot." in text
    assert "fp8: loses 4.00 points, its gate allows 0.5." in text
    assert text.index("no longer looks: not a lot") < text.index("GQA 16 bit")


def test_broken_errors_and_failed_proofs_are_problems(tmp_path):
    broken = make_format("fp8", passed=False, error=float("nan"))
    text = read(page.write_report(tmp_path, {"title": "x", "formats": [broken]})).text
    assert "fp8: verification FAILED; do not use this checkpoint." in text
    assert "fp8: the output error of 12 linears is not a number." in text
    assert not (tmp_path / "layers.png").exists()


def test_what_was_not_run_is_said_and_old_plots_go(tmp_path):
    (tmp_path / "accuracy.png").write_bytes(b"old")
    path = page.write_report(tmp_path, {"title": "x", "formats": [{"name": "fp8"}]})
    found = read(path)
    assert not found.images and [entry.name for entry in tmp_path.iterdir()] == ["index.html"]
    for text in ("GQA: not run", "fp8: not run", "Calibration: not run", "Export: not run"):
        assert text in found.text
    assert "No problem was found, but not all was run: fp8." in found.text
