"""The imported Megatron model says what transformers' LLaVA says, in every layout."""

import models
import pytest
import torch
from rank_parity import SAVED, ask, import_llava, reload, run

from nemo_vlm_ptq.checkpoints.huggingface import list_tensors
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.families.llava import NAME_ALIASES

LAYOUTS = ("1x1", "2x1", "1x2", "4x1", "2x2", "4x2")  # TP x PP; other ranks of 8 are data
CASES = ("images", "text", "padded")
TOLERANCE = 1e-4  # float32; logits are of the order of 1


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    """Folder of logits and checkpoints: one rank in this process, the others in one launch of 8."""
    out = tmp_path_factory.mktemp("parity")
    with models.alone() as own:
        run(own, tiny.float32, tiny.cases, out)
    words = [*models.main_of("rank_parity"), tiny.float32, tiny.cases, out, *LAYOUTS[1:]]
    code, _, err = models.launch(words, 8)
    assert code == 0, err[-3000:]
    return out


def logits(asked, layout):
    return torch.load(asked / f"logits_{layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(asked, tiny, layout, case):
    found = logits(asked, layout)["imported"][case]
    assert found.shape[2] == 512, "vocabulary padded to a multiple of 64"
    for row, expected in zip(found, tiny.expected[case], strict=True):
        own = row[: len(expected), : models.VOCAB]
        assert expected.std() > 0.5
        torch.testing.assert_close(own, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_one_rank_loads_in_any_layout(asked, layout):
    found = logits(asked, layout)
    for case in CASES:
        assert torch.equal(found["reloaded"][case], found["imported"][case])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_ranks_read_a_part_each_and_hold_the_same(asked, layout):
    loaded = logits(asked, layout)["loaded"]
    replicas = {one["replica"]: [] for one in loaded}
    for one in loaded:
        replicas[one["replica"]].append(one)
    for ranks in replicas.values():
        assert len({one["sha256"] for one in ranks}) == 1
        assert sum(one["read"] for one in ranks) == ranks[0]["held"]
        assert len(ranks) == 1 or max(one["read"] for one in ranks) < ranks[0]["held"]


def test_a_checkpoint_of_any_layout_loads_on_one_rank(asked, tiny):
    expected = logits(asked, "1x1")["imported"]
    with models.alone() as own:
        _, vision = import_llava(own, tiny.float32)
        for layout in LAYOUTS:
            saved = asked / SAVED.format(*layout.split("x"))
            found, _ = reload(own, tiny.float32, vision, saved, tiny.cases)
            for case in CASES:
                assert torch.equal(found[case], expected[case]), (layout, case)


def test_what_observe_runs_is_the_model_without_its_head(tiny):
    with models.alone() as own:
        whole, vision = import_llava(own, tiny.float32)
        layers, _ = import_llava(own, tiny.float32, to_observe=True)
        left = {name.split(".")[-2] for name in whole.state_dict().keys() - layers.state_dict()}
        assert left == {"final_layernorm", "output_layer"}
        expected = ask(own, whole, vision, tiny.cases)
        for case, out_SBH in ask(own, layers, vision, tiny.cases).items():
            logits, _ = whole.output_layer(whole.decoder.final_layernorm(out_SBH))
            assert torch.equal(logits.transpose(0, 1), expected[case])


@pytest.mark.parametrize("rename", [models.in_memory, models.in_five])
def test_names_of_any_vintage_give_the_same_model(llava, tiny, tmp_path, rename):
    folder = models.write_llava(llava, tmp_path / "other", torch.float32, rename)
    with models.alone() as own:
        pairs = zip(import_llava(own, tiny.float32), import_llava(own, folder), strict=True)
        for expected, found in pairs:
            expected, found = expected.state_dict(), found.state_dict()
            assert all(torch.equal(expected[n], t) for n, t in found.items() if t is not None)


def test_what_this_transformers_saves_gives_the_same_names(llava, tiny, tmp_path):
    llava.save_pretrained(tmp_path)
    expected, found = (list_tensors(folder, NAME_ALIASES) for folder in (tiny.float32, tmp_path))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}


def test_a_tensor_under_two_names_is_refused(llava, tmp_path):
    folder = models.write_llava(llava, tmp_path / "twice", torch.float32)
    again = {"lm_head.weight": torch.zeros(models.VOCAB, 256)}
    models.save_file(again, folder / "more.safetensors")
    with pytest.raises(UserError, match=r"are both language_model\.lm_head\.weight"):
        list_tensors(folder, NAME_ALIASES)


def test_the_little_trained_model_loads_in_transformers_as_it_is():
    from transformers import LlavaForConditionalGeneration

    folder = models.TINY_LLAVA
    _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
