"""Scaled rotary frequencies, against the formulas of Llama 3.1 and YaRN."""

import math

import pytest
from bad_models import said_by
from test_families import load

from nemo_vlm_ptq.families import find_family


def frequencies(family, name):
    """Return the config, the scaled frequencies and those of the base alone."""
    config = load(family, name).config
    decoder = find_family(config).decoder(config)
    count, dim = decoder.head_dim // 2, decoder.head_dim
    plain = [decoder.rope_theta ** (-2 * index / dim) for index in range(count)]
    return decoder, decoder.scaled_rope.frequencies, plain


def test_llama_3_divides_low_frequencies_and_blends_those_between():
    decoder, found, plain = frequencies("smolvlm", "Idefics3-8B-Llama3")
    assert decoder.scaled_rope.attention_factor == 1
    for one, frequency in zip(found, plain, strict=True):
        turns = 8192 * frequency / (2 * math.pi)  # over the original length
        share = min(max((turns - 1) / (4 - 1), 0), 1)
        assert one == pytest.approx(frequency * (share + (1 - share) / 8), rel=1e-5)
    assert found[0] == plain[0] and found[-1] == pytest.approx(plain[-1] / 8, rel=1e-5)


def test_yarn_divides_low_frequencies_along_a_ramp_of_dimensions():
    decoder, found, plain = frequencies("mistral3", "Ministral-3-8B-Instruct-2512-BF16")
    assert decoder.scaled_rope.attention_factor == 1

    def dimension(turns):
        ratio = math.log(16384 / (turns * 2 * math.pi)) / math.log(decoder.rope_theta)
        return decoder.head_dim / 2 * ratio

    low, high = math.floor(dimension(32)), math.ceil(dimension(1))
    for index, (one, frequency) in enumerate(zip(found, plain, strict=True)):
        divided = min(max((index - low) / (high - low), 0), 1)
        assert one == pytest.approx(frequency * (1 - divided + divided / 16), rel=1e-5)
    assert found[0] == plain[0] and found[-1] == pytest.approx(plain[-1] / 16, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_factor": -1.0}, "give frequencies or a scale that are no positive numbers"),
        ({"beta_fast": -1.0}, "cannot be used: "),
        ({"x" * 900: 1, "beta_slow": -1.0}, "cannot be used: "),
    ],
)
def test_settings_that_give_no_frequencies_are_refused_in_one_short_line(changes, reason):
    config = load("mistral3", "Ministral-3-8B-Instruct-2512-BF16").config
    config["text_config"]["rope_parameters"] |= changes
    said = said_by(find_family(config).decoder, config)
    assert said.startswith("mistral3: rope_parameters {") and reason in said and len(said) < 600


def test_other_mistral_decoders_have_plain_frequencies():
    for name in ("Mistral-Small-3.1-24B-Instruct-2503", "pixtral-12b"):
        config = load("mistral3", name).config
        assert find_family(config).decoder(config).scaled_rope is None
