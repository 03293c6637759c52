"""Damage models, data, recipes and command lines at random: `python tests/campaigns/sources.py`.

A seed gives the same damages; `--only 17` repeats one. Each is tried in a process of its own, with
limits on time and memory: `plan`, and where that passes a small run, whose exports are compared
with those of the undamaged inputs. What needs a look is printed; the exit code is 1 with a defect.

Outcomes: refused (one line, by plan), late (refused by the run), vague (the line names nothing of
what was damaged), harmless (the exports are the same), changed (accepted, the exports are others,
which some kinds may; logits of other weights and configs are transformers' own where it has a
class for them), accepted (recipes), defect (anything else).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}  # as the command does

import nemo_vlm_ptq  # noqa: F401  before torch, which it has settings for

# isort: split
import processors
from campaigns.cases import Case, Damage
from campaigns.children import LIMITS, command, in_child
from campaigns.folder_damages import FOLDER_DAMAGES
from campaigns.input_damages import INPUT_DAMAGES
from campaigns.parity import differs_from_transformers
from campaigns.tensor_damages import TENSOR_DAMAGES
from PIL import Image
from safetensors import safe_open

from nemo_vlm_ptq.data.images import open_image

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODELS = ("tiny-llava", "tiny-vila", "tiny-phi", "qwen3_vl", "qwen2_vl")
PREFIX = "nemo-vlm-ptq: error: "
RECIPES = frozenset(
    ("change_recipe", "override", "damage_recipe", "replace_recipe", "change_words")
)
# Accepted, the exports must be those of the undamaged folder.
STRICT = frozenset(
    ("truncate", "append", "replace", "remove_tensor", "rename_tensor", "reshape_tensor",
     "add_tensor", "spoil_tensor", "change_index", "double_weights", "flip_header")
)  # fmt: skip
# Accepted, the folder is another model: its logits must be those of transformers.
OTHER_MODELS = frozenset(
    ("change_config", "remove_config_key", "add_config_key", "scale_tensor", "flip_weights",
     "retype_tensor")
)  # fmt: skip
DAMAGES: dict[str, Damage] = {
    damage.__name__: damage for damage in (*FOLDER_DAMAGES, *TENSOR_DAMAGES, *INPUT_DAMAGES)
}


@cache
def _templates(kind: str, work: Path) -> Path:
    """Return an undamaged folder with a model and data."""
    folder = work / "whole" / kind
    if not folder.exists():
        folder.mkdir(parents=True)
        if kind.startswith("tiny-"):
            shutil.copytree(ASSETS / kind, folder / "model")
        else:
            _, reason = in_child(lambda: processors.WRITERS[kind](folder / "model"))
            assert not reason, reason
        (folder / "data" / "images").mkdir(parents=True)
        entries = {}
        for number in range(2):
            image = Image.effect_noise((60 + 8 * number, 48), 90).convert("RGB")
            image.save(folder / "data" / "images" / f"i{number}.png")
            entry = {"imageId": f"i{number}", "question": "What is it?", "answer": "red"}
            entries[f"q{number}"] = entry | {"isBalanced": True, "types": {"detailed": "color"}}
        (folder / "data" / "questions.json").write_text(json.dumps(entries))
    return folder


def make_case(kind: str, work: Path, folder: Path) -> Case:
    """Copy an undamaged model and its data into a folder."""
    whole = _templates(kind, work)
    folder.mkdir(parents=True)
    for part in ("model", "data"):
        shutil.copytree(whole / part, folder / part)
    return Case(
        folder,
        {
            "model": str(folder / "model"),
            "workdir": str(folder / "work"),
            "stages": ["observe", "solve", "export"],
            "quantize": {"format": ["fp8"]},
            "calibration": {"data": str(folder / "data"), "samples": 2, "micro_batch": 1},
            "export": {"targets": ["hf"]},
        },
    )


def exported(work: Path) -> dict[str, Any]:
    """Return what the exports of a work folder hold: file, or file and tensor -> content."""
    found: dict[str, Any] = {}
    for path in sorted(work.glob("fp8/hf/**/*")):
        name = str(path.relative_to(work))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(key).contiguous()
                    content = tensor.reshape(-1).view(torch_uint8()).numpy().tobytes()
                    digest = hashlib.sha256(content).hexdigest()
                    found[f"{name} {key}"] = [str(tensor.dtype), list(tensor.shape), digest]
        elif path.is_file() and path.name != "manifest.json":
            text = path.read_bytes()
            try:
                found[name] = json.loads(text.decode(), parse_constant=_not_json)
            except ValueError:
                assert path.suffix != ".json", f"{name} is not JSON"
                found[name] = hashlib.sha256(text).hexdigest()
    return found


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)


def torch_uint8() -> Any:
    """Return the dtype of bytes."""
    import torch

    return torch.uint8


def compare_images(case: Case) -> str:
    """Return which image is not what transformers' load_image makes of it."""
    from transformers.image_utils import load_image

    for path in sorted((case.data / "images").glob("i*.*")):
        own = open_image(case.data, path.stem)
        if own.tobytes() != load_image(str(path)).tobytes():
            return f"{path} is another image in transformers"
    return ""


def try_damage(kind: str, damage: str, seed: str, work: Path) -> tuple[str, str]:
    """Damage a copy and return (outcome, what happened); "none" where nothing was damaged."""
    folder = work / f"case{os.getpid()}"
    case = make_case(kind, work, folder)
    try:
        done = DAMAGES[damage](random.Random(seed), case)
        if done is None:
            return "none", ""
        if not os.path.lexists(case.recipe) and damage != "replace_recipe":
            case.recipe.write_text(json.dumps(case.tree))
        outcome, said = judge(kind, damage, done, case, work)
        return outcome, f"{done} -> {said}"
    finally:
        shutil.rmtree(folder)


def judge(kind: str, damage: str, done: str, case: Case, work: Path) -> tuple[str, str]:
    """Plan and run a damaged case; return the outcome and what was said."""
    words = [str(case.recipe), *case.overrides]
    for name in (case.command, "run"):
        step = [name, *words]
        result, reason = in_child(lambda step=step: command(step, case.folder / "log"))
        if reason or result["trace"]:
            return "defect", f"{name}: {reason or result['trace']}"
        code, lines = result["code"], result["err"].splitlines()
        said = lines[-1] if lines else ""
        if code == 2:
            return refusal(name, f"{done} {case.model} {case.data}", lines)
        if code != 0:
            return "defect", f"{name}: exit code {code}: {result['err'][-2000:]}"
        if case.command != "plan":
            return "accepted", said
    if damage in RECIPES:
        return "accepted", ""
    return compare(kind, damage, case, work)


def compare(kind: str, damage: str, case: Case, work: Path) -> tuple[str, str]:
    """Compare the exports of an accepted case with those of an undamaged one."""
    if damage == "change_image":
        wrong, reason = in_child(lambda: compare_images(case))
        if wrong or reason:
            return "defect", wrong or reason
    before = baseline(kind, work)
    try:
        after = exported(case.folder / "work")
    except AssertionError as error:
        return "defect", str(error)
    different = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    if not different:
        return "harmless", ""
    outcome, wrong = "defect" if damage in STRICT else "changed", ""
    if damage in OTHER_MODELS:
        differs, reason = in_child(lambda: differs_from_transformers(case.model, case.data))
        outcome, wrong = ("defect", differs or reason) if differs or reason else (outcome, "")
    return outcome, f"{wrong} {len(different)} differ, first {different[:3]}".strip()


def refusal(name: str, done: str, lines: list[str]) -> tuple[str, str]:
    """Return the outcome of a command that ended with exit code 2."""
    said = lines[-1] if lines else ""
    if not said.startswith(PREFIX) or (name == "plan" and len(lines) > 1):
        usage = lines[:1] and lines[0].startswith("usage: ")
        return ("refused", said) if usage else ("defect", "\n".join(lines)[-2000:])
    if any(word in said for word in ("annot allocate", "an't allocate", "MemoryError")):
        return "defect", said
    named = any(word.strip(":,'") in said for word in done.split() if len(word) > 3)
    if not named and "recipe" not in done:
        return "vague", said
    return ("late" if name == "run" else "refused"), said


@cache
def baseline(kind: str, work: Path) -> dict[str, Any]:
    """Return what the exports of an undamaged case hold."""
    folder = work / "baseline"
    shutil.rmtree(folder, ignore_errors=True)
    case = make_case(kind, work, folder)
    case.recipe.write_text(json.dumps(case.tree))
    result, reason = in_child(lambda: command(["run", str(case.recipe)], folder / "log"), 600)
    assert not reason and result["code"] == 0, (reason, result)
    for name in result["modules"]:  # once, for all children to come
        with contextlib.suppress(Exception):
            import_module(name)
    return exported(folder / "work")


def run_campaign(
    count: int, seed: int, work: Path, only: int | None = None, names: Iterable[str] = DAMAGES
) -> Counter[tuple[str, str]]:
    """Try damages, each kind in turn; return counts of (kind of damage, outcome)."""
    counts, names = Counter[tuple[str, str]](), list(names)
    baseline(MODELS[0], work)
    for number in range(count) if only is None else (only,):
        damage, outcome, attempt = names[number % len(names)], "none", 0
        while outcome == "none" and attempt < 5:
            key = f"{seed} {number} {attempt}"
            kind = random.Random(key).choice(MODELS)
            outcome, said = try_damage(kind, damage, key, work)
            attempt += 1
        counts[damage, outcome] += 1
        if only is not None or outcome not in ("refused", "harmless", "none"):
            print(f"{outcome.upper()} {number} {kind} {damage}: {said}", flush=True)
    return counts


def main() -> int:
    """Run a campaign and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of a damage to repeat")
    parser.add_argument("--kinds", help="kinds of damage, separated by commas")
    parser.add_argument("--seconds", type=float, default=60, help="for one command")
    parser.add_argument("--work", type=Path, help="folder of the copies, kept")
    arguments = parser.parse_args()
    LIMITS["seconds"] = arguments.seconds
    names = arguments.kinds.split(",") if arguments.kinds else list(DAMAGES)
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        counts = run_campaign(arguments.count, arguments.seed, work, arguments.only, names)
    outcomes = sorted({outcome for _, outcome in counts})
    print(f"{'':20}", *(f"{outcome:>9}" for outcome in outcomes))
    for name in [*dict.fromkeys(names), None]:
        rows = [key for key in counts if name in (key[0], None)]
        sums = [sum(counts[key] for key in rows if key[1] == one) for one in outcomes]
        print(f"{name or 'all':20}", *(f"{number:9}" for number in sums))
    return int(any(outcome == "defect" for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
