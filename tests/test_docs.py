"""Documentation: its commands run, its links and paths exist, and its recipe keys are the recipe's.

Fenced blocks with language `bash` or `python` are run, page by page, in one folder with links to
assets/ and configs/. A block whose first line is `# not run: REASON` is skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from models import ROOT
from pydantic import BaseModel

from nemo_vlm_ptq.recipe import Recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
LANGUAGES = ("bash", "python", "text", "yaml", "json")
NOT_RUN = "# not run: "
TIMEOUT = 240  # seconds for one block
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
PATH = re.compile(
    r"(?:tests|benchmarks|docs|configs|launch|slurm|assets|nemo_vlm_ptq)/[\w./-]*\w/?"
)
KEY = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    language: str
    text: str

    @property
    def runs(self) -> bool:
        """Whether the block is run here."""
        return self.language in ("bash", "python") and not self.text.startswith(NOT_RUN)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(text.count("\n", 0, found.start()) + 1, found[1].strip(), found[2])
        for found in FENCE.finditer(text)
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors_of(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    return {slug(found[1]) for found in re.finditer(r"^#+ (.*)$", text, re.MULTILINE)}


def recipe_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of all keys and sections."""
    keys = set()
    for field_name, field in model.model_fields.items():
        key = prefix + (field.alias or field_name)
        keys.add(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= recipe_keys(field.annotation, f"{key}.")
    return keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the blocks run in."""
    home = tmp_path_factory.mktemp("docs")
    for name in ("assets", "configs"):
        (home / name).symlink_to(ROOT / name)
    return home


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.runs for b in blocks_of(page))],
                         ids=name_of)  # fmt: skip
def test_the_commands_of_a_page_run(page, folder):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    for block in blocks_of(page):
        if not block.runs:
            continue
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language == "python":
            (folder / "block.py").write_text(block.text)
            command = [sys.executable, "block.py"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        place = f"{name_of(page)}:{block.line}"
        assert done.returncode == 0, f"{place}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_every_block_has_a_language_and_none_is_indented(page):
    assert [b for b in blocks_of(page) if b.language not in LANGUAGES] == []
    outside = FENCE.sub("", page.read_text())
    assert re.findall(r"^\n {4,}(?![*\-\d]).*$", outside, re.MULTILINE) == []


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors_of(found), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = {found[0] for found in PATH.finditer(text) if text[found.start() - 1] not in "/.\\w{"}
    made = {"slurm/site.env"}  # by the user
    missing = [name for name in named - made if not (ROOT / name).exists()]
    assert [name for name in missing if not re.search(r"NAME|FOLDER|RECIPE", name)] == []


def test_the_readme_fits_its_first_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []
    before = "\n".join(lines[:20])
    assert "What was not done" in before
    assert any(line.startswith("| `fp8`") for line in lines[:60])


def test_the_recipes_page_has_every_key_and_no_other():
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = text.split("\n## Keys\n")[1].split("\n## ")[0]
    documented = KEY.findall(section)
    assert len(documented) == len(set(documented))
    assert set(documented) == recipe_keys(Recipe)


def test_quoted_messages_are_in_the_code():
    sources = [*(ROOT / "nemo_vlm_ptq").rglob("*.py"), *(ROOT / "slurm").glob("*.sh")]
    joined = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in sources))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    quoted = [part for cell in cells for text in re.findall(r"`([^`]+)`", cell)
              for part in re.split(r"…|'", text)]  # fmt: skip
    assert len(cells) > 25
    assert [part for part in map(str.strip, quoted) if len(part) > 9 and part not in joined] == []


def test_pages_are_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = LINK.findall(FENCE.sub("", page.read_text()))
        waiting += [(page.parent / target).resolve() for target, _ in links if target]
    assert set(PAGES) - reached == set()
