"""No damage to models, data or recipes ends in a traceback or in silence.

A seeded part of tests/campaigns/sources.py, which says what it counts.
"""

import sys

import torch
from bad_models import TINY
from campaigns.parity import differs_from_transformers
from models import ROOT
from PIL import Image


def test_no_damage_of_a_seeded_campaign_is_a_defect(tmp_path):
    import subprocess

    command = [sys.executable, str(ROOT / "tests" / "campaigns" / "sources.py")]
    words = ["--count", "40", "--seed", "1", "--seconds", "300", "--work", str(tmp_path)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *_, last = done.stdout.splitlines()
    assert last.split()[0] == "all" and sum(map(int, last.split()[1:])) == 40


def test_logits_unlike_those_of_transformers_are_found(tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText

    def load(*arguments, **options):
        model = read(*arguments, **options)
        with torch.no_grad():
            model.model.language_model.layers[1].input_layernorm.weight.mul_(1.02)
        return model

    (tmp_path / "images").mkdir()
    Image.effect_noise((60, 48), 90).save(tmp_path / "images" / "i0.png")
    assert differs_from_transformers(TINY, tmp_path) == ""
    read = AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    assert "with an image differ by" in differs_from_transformers(TINY, tmp_path)
