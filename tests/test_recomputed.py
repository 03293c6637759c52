"""Exports of every family equal what their writers make again, and JSON is compared key by key."""

import os

import models
import pytest
from campaigns.exports import first_finding, make_recipe

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.planning.make_plan import make_plan
from nemo_vlm_ptq.stages import run_stages
from nemo_vlm_ptq.verify.files import check_names, list_files
from nemo_vlm_ptq.verify.recomputed import compare_json


@pytest.mark.parametrize("model", ["tiny-vila", "tiny-phi"])
def test_exports_of_other_families_are_made_again(tmp_path, monkeypatch, model):
    monkeypatch.setattr(models, "TINY_LLAVA", models.ROOT / "assets" / model)
    with models.single_rank() as own:
        plan = make_plan(make_recipe(tmp_path, ["fp8"]))
        context, (fmt,) = RunContext(plan=plan, parallel=own), plan.formats
        run_stages(context, ("observe", "solve", "export"))
        for target in plan.targets(fmt):
            assert first_finding(context, fmt, target) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": {"b": [1, 2]}, "c": false}', []),
        ('{"c": false, "a": {"b": [1, 2]}}', []),
        ('{"a": {"b": [1, 2]}, "c": 0}', ["c is 0, expected False"]),
        ('{"a": {"b": [1.0, 2]}, "c": false}', ["a.b is [1.0, 2], expected [1, 2]"]),
        ('{"a": {"b": [1, 2], "d": 1}, "c": false}', ["unknown key a.d"]),
        ('{"a": {}, "c": false}', ["a.b is missing"]),
        ('{"a": {"b": [1, 2]}, "a": {"b": [1, 2]}, "c": false}', ["key 'a' is not unique"]),
        ('{"a": NaN, "c": false}', ["NaN is not a JSON number"]),
        ("", ["cannot be read"]),
        ("[]", ["is [], expected"]),
    ],
)
def test_json_is_compared_key_by_key(tmp_path, text, expected):
    (tmp_path / "x.json").write_text(text)
    found = compare_json(tmp_path, "x.json", {"a": {"b": [1, 2]}, "c": False})
    assert len(found) == len(expected)
    assert all(part in finding for part, finding in zip(expected, found, strict=True))


def test_links_pipes_and_folders_are_no_files_of_an_export(tmp_path):

    for name in ("own.json", "sub/own.txt", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert check_names(tmp_path, ["own.json", "sub/own.txt"]) == []
    (tmp_path / "link.json").symlink_to(tmp_path / "own.json")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe.safetensors")
    odd = ("dangling", "link.json", "loop", "pipe.safetensors")
    assert list_files(tmp_path) == ({"own.json", "sub/own.txt"}, set(odd))
    found = check_names(tmp_path, ["own.json", "sub/own.txt", "gone.json"])
    assert found == [
        *(f"{name} is not a regular file; remove it or export again" for name in odd),
        "gone.json is missing",
    ]
