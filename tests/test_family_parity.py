"""Logits of each family but LLaVA-1.5 against reference models, in every layout."""

from functools import partial

import models
import pytest
import torch
from rank_family_parity import (
    CHECKPOINT,
    CHECKPOINT_FAMILY,
    RELOADED_CASES,
    SAVING_LAYOUTS,
    compute_logits,
    import_model,
    read_cases,
    read_family,
    reload_model,
    run,
    to_samples,
)
from reference_gemma3 import gemma3_cases, write_gemma3
from reference_gemma4 import gemma4_cases, write_gemma4
from reference_internvl import internvl_cases, write_internvl
from reference_llava_next import llava_next_cases, write_llava_next
from reference_llava_onevision import write_llava_onevision
from reference_mistral3 import mistral3_cases, write_mistral3
from reference_phi import phi_cases, write_phi
from reference_qwen import qwen_cases, write_qwen
from reference_smolvlm import smolvlm_cases, write_smolvlm
from reference_vila import vila_cases, write_vila
from references import VOCAB

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors
from nemo_vlm_ptq.reference.files import read_source
from nemo_vlm_ptq.reference.model import ReferenceModel

LAYOUTS = ("1x1", "2x1", "1x2", "4x1", "2x2")  # TP x PP; the rest of 4 ranks is DP
FAMILIES = {
    "vila": (write_vila, vila_cases),
    "phi": (write_phi, phi_cases),
    "llava_next": (write_llava_next, llava_next_cases),
    "mistral3": (write_mistral3, mistral3_cases),
    "ministral3": (partial(write_mistral3, kind="ministral3"), mistral3_cases),
    "pixtral": (partial(write_mistral3, kind="pixtral"), mistral3_cases),
    "llava_onevision": (write_llava_onevision, llava_next_cases),
    "qwen3_vl": (partial(write_qwen, kind="qwen3_vl"), qwen_cases),
    "qwen3_5": (partial(write_qwen, kind="qwen3_5"), qwen_cases),
    "qwen2_vl": (partial(write_qwen, kind="qwen2_vl"), qwen_cases),
    "internvl": (partial(write_internvl, kind="qwen2"), internvl_cases),
    "gemma3": (write_gemma3, gemma3_cases),
    "gemma4": (write_gemma4, gemma4_cases),
    "internvl qwen3": (partial(write_internvl, kind="qwen3"), internvl_cases),
    "smolvlm": (partial(write_smolvlm, kind="idefics3"), smolvlm_cases),
}
CASES = [(family, case) for family in FAMILIES for case in ("images", "text", "padded")]
CASES += [("phi", "short factors"), ("phi", "long factors")]
TOLERANCE = 1e-4  # float32; logits are of the order of 1


def write_home(home, family, **options):
    """Write a model and its cases; return case -> reference logits [S,V] of each question."""
    write, make_cases = FAMILIES[family]
    reference = write(home / "model", 7, **options)
    cases = make_cases(8, reference)
    fields = {name: [vars(question) for question in case] for name, case in cases.items()}
    torch.save(fields, home / "cases")
    return {name: [reference.logits(question) for question in case] for name, case in cases.items()}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """(folder, family -> reference logits); 1x1 runs in this process, the rest in one launch."""
    out = tmp_path_factory.mktemp("families")
    expected = {family: write_home(out / family, family) for family in FAMILIES}
    with models.single_rank() as parallel:
        run(parallel, out)
    code, _, err = models.launch_ranks(
        [*models.main_command("rank_family_parity"), out, *LAYOUTS[1:]], 4
    )
    assert code == 0, err[-3000:]
    return out, expected


def load_logits(home, layout):
    return torch.load(home / f"logits_{layout}")


def assert_logits_close(actual, expected, description=""):
    """Compare logits [B,S,V'], padded in S and V', with reference logits [S,V] of each sample."""
    for padded, reference in zip(actual, expected, strict=True):
        assert reference.std() > 0.3
        logits = padded[: len(reference), :VOCAB]
        print(f"{description}: {float((logits - reference).abs().max()):.1e}")  # pytest -s
        torch.testing.assert_close(logits, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_match_the_reference(homes, family, case, layout):
    out, expected = homes
    logits = load_logits(out / family, layout)["imported"][case]
    assert_logits_close(logits, expected[family][case], f"{family} {layout} {case}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_fused_tensors_loads_in_any_layout(homes, layout):
    logits = load_logits(homes[0] / CHECKPOINT_FAMILY, layout)
    for case in RELOADED_CASES:
        assert torch.equal(logits["reloaded"][case], logits["imported"][case])


def test_a_checkpoint_saved_in_any_layout_loads_on_one_rank(homes):
    home = homes[0] / CHECKPOINT_FAMILY
    expected = load_logits(home, "1x1")["imported"]
    with models.single_rank() as parallel:
        _, vision = import_model(parallel, home / "model")
        for layout in SAVING_LAYOUTS:
            model = reload_model(parallel, home / "model", home / CHECKPOINT.format(layout))
            logits = compute_logits(parallel, home, model, vision, RELOADED_CASES)
            for case in RELOADED_CASES:
                assert torch.equal(logits[case], expected[case]), (layout, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_reference_reader_match(homes, family):
    out, expected = homes
    folder = out / family / "model"
    model_family, config = read_family(folder)
    names = list_tensors(folder, model_family.name_aliases, model_family.subfolders)
    checkpoint = read_source(names)
    vision = {name: checkpoint.plain[name] for name in model_family.vision_shapes(config)}
    model = ReferenceModel(
        model_family, config, checkpoint, vision, torch.float32, torch.device("cpu")
    )
    for case, questions in read_cases(out / family).items():
        samples = to_samples(folder, questions)
        features = [sample.images and model.encode_images(sample.images) for sample in samples]
        logits = [model.logits(*pair) for pair in zip(samples, features, strict=True)]
        assert_logits_close(logits, expected[family][case])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vila", {"order": "row"}),
        ("llava_next", {"text": "llama"}),
        ("llava_onevision", {"tied": True}),
        ("qwen2_vl", {"kind": "qwen2_vl 2.0"}),
        ("qwen2_vl", {"tied": False}),
        ("qwen3_vl", {"tied": False}),
        ("gemma4", {"plain": True}),
        ("gemma4", {"tied": False}),
        ("internvl", {"kind": "qwen2", "tied": True, "large": True}),
        ("internvl", {"kind": "qwen3", "tied": False}),
        ("mistral3", {"kind": "ministral3", "tied": True}),
        ("mistral3", {"kind": "ministral3", "mscale": 2.0}),
        ("smolvlm", {"kind": "smolvlm"}),
        ("smolvlm", {"kind": "smolvlm", "tied": True}),
    ],
    ids=lambda value: str(value),
)
def test_variants_of_a_family_match_their_reference(tmp_path, family, options):
    expected = write_home(tmp_path, family, **options)
    with models.single_rank() as parallel:
        logits = compute_logits(parallel, tmp_path, *import_model(parallel, tmp_path / "model"))
    for case, batch in logits.items():
        assert_logits_close(batch, expected[case])
