"""VILA, Phi-3-vision and LLaVA-NeXT say what models that are not ours say, in every layout."""

import models
import pytest
import torch
from rank_family_parity import (
    LOADED_CASES,
    SAVED,
    SAVES,
    SAVING_LAYOUTS,
    ask,
    import_model,
    read_cases,
    read_family,
    reload_model,
    run,
    to_samples,
)
from reference_llava_next import llava_next_cases, write_llava_next
from reference_phi import phi_cases, write_phi
from reference_vila import vila_cases, write_vila
from references import VOCAB

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors
from nemo_vlm_ptq.reference.model import ReferenceModel
from nemo_vlm_ptq.targets.hf.reader import read_source

LAYOUTS = ("1x1", "2x1", "1x2", "4x1", "2x2", "4x2")  # TP x PP; other ranks of 8 are data
FAMILIES = {
    "vila": (write_vila, vila_cases),
    "phi": (write_phi, phi_cases),
    "llava_next": (write_llava_next, llava_next_cases),
}
CASES = [(family, case) for family in FAMILIES for case in ("images", "text", "padded")]
CASES += [("phi", "short factors"), ("phi", "long factors")]
TOLERANCE = 1e-4  # float32; logits are of the order of 1


def write_home(home, family, **options):
    """A model, its cases, and what its reference says: case -> logits [S,V] of each question."""
    write, cases_of = FAMILIES[family]
    reference = write(home / "model", 7, **options)
    cases = cases_of(8, reference)
    torch.save({name: [vars(one) for one in case] for name, case in cases.items()}, home / "cases")
    return {name: [reference.ask(one) for one in case] for name, case in cases.items()}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """(folder, family -> expected): one rank in this process, the others in one launch of 8."""
    out = tmp_path_factory.mktemp("families")
    expected = {family: write_home(out / family, family) for family in FAMILIES}
    with models.alone() as own:
        run(own, out)
    code, _, err = models.launch([*models.main_of("rank_family_parity"), out, *LAYOUTS[1:]], 8)
    assert code == 0, err[-3000:]
    return out, expected


def logits(home, layout):
    return torch.load(home / f"logits_{layout}")


def check(found, expected, what=""):
    """Rows [B,S,V'] are those of the reference where it has any."""
    for own, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.3
        own = own[: len(theirs), :VOCAB]
        print(f"{what}: {float((own - theirs).abs().max()):.1e}")  # pytest -s
        torch.testing.assert_close(own, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_are_those_of_the_reference(homes, family, case, layout):
    out, expected = homes
    found = logits(out / family, layout)["imported"][case]
    check(found, expected[family][case], f"{family} {layout} {case}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_fused_rows_loads_in_any_layout(homes, layout):
    found = logits(homes[0] / SAVES, layout)
    for case in LOADED_CASES:
        assert torch.equal(found["reloaded"][case], found["imported"][case])


def test_a_checkpoint_of_fused_rows_of_other_layouts_loads_on_one_rank(homes):
    home = homes[0] / SAVES
    expected = logits(home, "1x1")["imported"]
    with models.alone() as own:
        _, vision = import_model(own, home / "model")
        for layout in SAVING_LAYOUTS:
            model = reload_model(own, home / "model", home / SAVED.format(layout))
            found = ask(own, home, model, vision, LOADED_CASES)
            for case in LOADED_CASES:
                assert torch.equal(found[case], expected[case]), (layout, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_independent_runtime_says_the_same(homes, family):
    out, expected = homes
    folder = out / family / "model"
    kind, config = read_family(folder)
    read = read_source(list_tensors(folder, kind.name_aliases, kind.subfolders))
    vision = {name: read.plain[name] for name in kind.vision_shapes(config)}
    runtime = ReferenceModel(kind, config, read, vision, torch.float32, torch.device("cpu"))
    for case, questions in read_cases(out / family).items():
        samples = to_samples(folder, questions)
        features = [one.pixels and runtime.encode(one.pixels) for one in samples]
        found = [runtime.logits(*pair) for pair in zip(samples, features, strict=True)]
        check(found, expected[family][case])


@pytest.mark.parametrize(
    ("family", "options"),
    [("vila", {"order": "row"}), ("llava_next", {"text": "llama"})],
    ids=["vila that reads along rows", "llava_next on a llama"],
)
def test_other_forms_of_a_family_say_what_their_reference_says(tmp_path, family, options):
    expected = write_home(tmp_path, family, **options)
    with models.alone() as own:
        found = ask(own, tmp_path, *import_model(own, tmp_path / "model"))
    for case, rows in found.items():
        check(rows, expected[case])
