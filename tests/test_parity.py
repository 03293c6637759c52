"""The imported Megatron model computes transformers' logits of LLaVA in every layout."""

import models
import pytest
import torch
from rank_parity import CHECKPOINT_NAME, compute_logits, import_llava, reload, run_layout

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.llava import NAME_ALIASES

LAYOUTS = ("1x1", "2x1", "1x2", "4x1", "2x2", "4x2")  # TP x PP; the rest of 8 ranks is DP
CASES = ("images", "text", "padded")
TOLERANCE = 1e-4  # float32; logits are of the order of 1


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory):
    """Folder of logits and checkpoints of all layouts: one rank here, others in a launch of 8."""
    out = tmp_path_factory.mktemp("parity")
    with models.single_rank() as parallel:
        run_layout(parallel, tiny.float32, tiny.cases, out)
    arguments = [*models.main_command("rank_parity"), tiny.float32, tiny.cases, out, *LAYOUTS[1:]]
    code, _, err = models.launch_ranks(arguments, 8)
    assert code == 0, err[-3000:]
    return out


def load_outputs(outputs, layout):
    return torch.load(outputs / f"logits_{layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(outputs, tiny, layout, case):
    logits = load_outputs(outputs, layout)["imported"][case]
    assert logits.shape[2] == 512, "vocabulary padded to a multiple of 64"
    for row, expected in zip(logits, tiny.expected[case], strict=True):
        found = row[: len(expected), : models.VOCAB]
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_of_one_rank_loads_in_any_layout(outputs, layout):
    found = load_outputs(outputs, layout)
    for case in CASES:
        assert torch.equal(found["reloaded"][case], found["imported"][case])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_ranks_read_disjoint_parts_and_hold_identical_weights(outputs, layout):
    loaded = load_outputs(outputs, layout)["loaded"]
    replicas = {rank["replica"]: [] for rank in loaded}
    for rank in loaded:
        replicas[rank["replica"]].append(rank)
    for ranks in replicas.values():
        assert len({rank["sha256"] for rank in ranks}) == 1
        assert sum(rank["read"] for rank in ranks) == ranks[0]["held"]
        assert len(ranks) == 1 or max(rank["read"] for rank in ranks) < ranks[0]["held"]


def test_checkpoint_of_any_layout_loads_on_one_rank(outputs, tiny):
    expected = load_outputs(outputs, "1x1")["imported"]
    with models.single_rank() as parallel:
        _, vision = import_llava(parallel, tiny.float32)
        for layout in LAYOUTS:
            saved = outputs / CHECKPOINT_NAME.format(*layout.split("x"))
            found, _ = reload(parallel, tiny.float32, vision, saved, tiny.cases)
            for case in CASES:
                assert torch.equal(found[case], expected[case]), (layout, case)


def test_calibration_model_is_the_model_without_output_layer(tiny):
    with models.single_rank() as parallel:
        full, vision = import_llava(parallel, tiny.float32)
        headless, _ = import_llava(parallel, tiny.float32, for_calibration=True)
        removed = {name.split(".")[-2] for name in full.state_dict().keys() - headless.state_dict()}
        assert removed == {"final_layernorm", "output_layer"}
        expected = compute_logits(parallel, full, vision, tiny.cases)
        hidden_states = compute_logits(parallel, headless, vision, tiny.cases)
        for case, hidden_SBH in hidden_states.items():
            logits, _ = full.output_layer(full.decoder.final_layernorm(hidden_SBH))
            assert torch.equal(logits.transpose(0, 1), expected[case])


@pytest.mark.parametrize("rename", [models.transformers4_name, models.transformers5_name])
def test_tensor_names_of_any_transformers_release_give_the_same_model(
    llava, tiny, tmp_path, rename
):
    folder = models.write_llava(llava, tmp_path / "renamed", torch.float32, rename)
    with models.single_rank() as parallel:
        pairs = zip(
            import_llava(parallel, tiny.float32), import_llava(parallel, folder), strict=True
        )
        for expected, found in pairs:
            expected, found = expected.state_dict(), found.state_dict()
            assert all(torch.equal(expected[n], t) for n, t in found.items() if t is not None)


def test_save_pretrained_of_installed_transformers_gives_the_same_names(llava, tiny, tmp_path):
    llava.save_pretrained(tmp_path)
    expected, found = (list_tensors(folder, NAME_ALIASES) for folder in (tiny.float32, tmp_path))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}


def test_two_tensors_with_the_same_published_name_are_rejected(llava, tmp_path):
    folder = models.write_llava(llava, tmp_path / "duplicate", torch.float32)
    (folder / models.WEIGHTS).rename(folder / "first.safetensors")  # read alone under its name
    duplicate = {"lm_head.weight": torch.zeros(models.VOCAB, 256)}
    models.save_file(duplicate, folder / "more.safetensors")
    with pytest.raises(UserError, match=r"have the same name language_model\.lm_head\.weight"):
        list_tensors(folder, NAME_ALIASES)


def test_trained_tiny_model_loads_in_transformers():
    from transformers import LlavaForConditionalGeneration

    folder = models.TINY_LLAVA
    _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
