"""Verify finds whatever is done to an export's folder; a seeded part of tests/campaigns/exports.py.

tests/test_verify.py says which check finds which damage to tensors.
"""

import json
import shutil

import models
import pytest
from campaigns.exports import first_finding, make_recipe, run_campaign, sign
from conftest import verifier

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.workdir import store

FOREIGN = (
    "adapter_config.json", "chat_template.jinja", "added_tokens.json", "tokenizer.model",
    "pytorch_model.bin", "modeling_x.py", "model-00002-of-00002.safetensors",
)  # fmt: skip


def copy_exports(works, folder, *formats):
    for name in formats:
        shutil.copytree(works["2x1x1"] / name, folder / name)


def test_no_damage_of_a_seeded_campaign_is_accepted(works, tmp_path):
    formats = ("fp8", "w4a8_awq", "nf4")
    copy_exports(works, tmp_path, *formats)
    with models.single_rank() as own:
        counts = run_campaign(own, tmp_path, formats, 120, seed=1)
    assert counts["stale", True] > 20 and counts["signed", True] > 60
    assert counts["stale", False] + counts["signed", False] == 0
    assert counts["folder", True] > 0


@pytest.fixture
def finding(works, tmp_path):
    """(target, damage of its folder) -> first finding, with a manifest that was signed again."""
    copy_exports(works, tmp_path, "int4_awq")

    def find(target, damage):
        with models.single_rank() as own:
            plan = make_plan(make_recipe(tmp_path, ["int4_awq"]))
            context, (fmt,) = RunContext(plan=plan, parallel=own), plan.formats
            folder = plan.export_folder(fmt, target)
            damage(folder)
            sign(folder)
            return first_finding(context, fmt, target)

    return find


def edit(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_does_not_belong_to_the_export_is_refused(finding, name):
    found = finding("compressed_tensors", lambda folder: (folder / name).write_bytes(b"{}"))
    assert found == f"other files: {name} does not belong to the export; remove it"


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_changed_or_lost_copy_of_a_file_of_the_model_is_refused(finding, name):
    found = finding("hf", lambda folder: (folder / name).write_text("{}"))
    assert found == f"other files: {name} differs from that of the model"
    found = finding("hf", lambda folder: (folder / name).unlink())
    assert found == f"other files: {name} is missing"


GROUP = ("quantization_config", "config_groups", "group_0")


def inner(content, *keys):
    for key in keys:
        content = content[key]
    return content


@pytest.mark.parametrize(
    ("target", "name", "change", "expected"),
    [
        (
            "compressed_tensors", "config.json",
            lambda c: inner(c, *GROUP, "weights").update(actorder="group"),
            "unknown key quantization_config.config_groups.group_0.weights.actorder",
        ),
        (
            "compressed_tensors", "config.json",
            lambda c: c["quantization_config"]["ignore"].append("re:.*up_proj"),
            "quantization_config.ignore is",
        ),
        (
            "compressed_tensors", "config.json", lambda c: c.update(tie_word_embeddings=0),
            "tie_word_embeddings is 0, expected False",
        ),
        (
            "hf", "config.json", lambda c: c["text_config"].pop("rms_norm_eps"),
            "text_config.rms_norm_eps is missing",
        ),
        (
            "hf", "hf_quant_config.json", lambda c: c["quantization"].update(extra=1),
            "unknown key quantization.extra",
        ),
        ("trtllm", "llm/config.json", lambda c: c.update(qk_layernorm=True), "qk_layernorm"),
        ("trtllm", "vision/config.json", lambda c: c.update(vision_feature_layer=-1),
         "vision_feature_layer is -1, expected -2"),
        (
            "hf", "model.safetensors.index.json",
            lambda c: c["weight_map"].popitem(), "weight_map.vision_tower",
        ),
    ],
)  # fmt: skip
def test_every_key_of_a_config_is_known_and_checked(finding, target, name, change, expected):
    found = finding(target, edit(name, change))
    assert found.startswith(f"other files: {name}: ") and expected in found


def test_another_version_of_the_package_may_have_written_a_config(finding):
    change = edit("llm/config.json", lambda c: c["producer"].update(version="9.9"))
    assert finding("trtllm", change) is None


def test_a_verification_that_is_skipped_says_so_and_a_changed_folder_is_not_skipped(
    works, tmp_path, capfd
):
    copy_exports(works, tmp_path, "int4_wo")
    run = verifier(tmp_path, ["int4_wo"], ("hf",))
    run()
    capfd.readouterr()
    run()
    expected = "verify int4_wo: skipped, it passed before and no file has changed since; "
    assert expected in capfd.readouterr().err
    folder = tmp_path / "int4_wo" / "hf"
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"hf files: adapter_config\.json does not belong"):
        run()
    sign(folder)
    with pytest.raises(VerificationError, match=r"adapter_config\.json does not belong"):
        run()
    (folder / "adapter_config.json").unlink()
    sign(folder)
    assert run()["passed"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"passed": true}'])
def test_a_damaged_record_of_an_earlier_verification_is_ignored(tmp_path, text):
    from nemo_vlm_ptq.stages import verify as stage
    from nemo_vlm_ptq.verify.files import is_unchanged

    (tmp_path / "verify.json").write_text(text)
    assert not is_unchanged([], stage._read(tmp_path / "verify.json"), {"hf": "0" * 64})


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ([], UserError, "is not a manifest"),
        ({"config.json": None}, UserError, "is not a manifest"),
        ({"../x": {"sha256": "0"}}, VerificationError, "hf files: "),
    ],
)
def test_a_manifest_of_the_wrong_kind_is_told(works, tmp_path, files, error, match):
    copy_exports(works, tmp_path, "int4_wo")
    folder = tmp_path / "int4_wo" / "hf"
    manifest = store.read_manifest(folder)
    store.write_json(folder / store.MANIFEST, manifest | {"files": files})
    with pytest.raises(error, match=match):
        verifier(tmp_path, ["int4_wo"], ("hf",))()
