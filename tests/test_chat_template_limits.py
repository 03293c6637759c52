"""A chat template cannot hold up a plan, or fill the memory."""

import time
from pathlib import Path

import pytest
from bad_models import TINY, copy_model, plan_error, said_by

from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.families import chat_template
from nemo_vlm_ptq.families.chat_template import prompt_renderer
from nemo_vlm_ptq.families.folder_files import load_tokenizer

GOOD = "USER: {{ messages[0].content }} ASSISTANT:"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = (
    "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
WITHOUT_IMAGE = "{% if '<image>' not in messages[0].content %}" + LOOP + "{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(chat_template, "TRIAL_SECONDS", 1)
    monkeypatch.setattr(chat_template, "_tried", set())


def with_template(folder: Path, text: str) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        LOOP,
        WITHOUT_IMAGE,
        "{% for i in range(99999) %}" * 4 + "x" + "{% endfor %}" * 4,
        DOUBLE,
        "{{ 'a' * 10 ** 11 }}",
        "{{ ('a' * 10 ** 9).replace('a', 'bbbb') | length }}",
        "{{ ([0] * 10 ** 10) | length }}",
        "{{ 7 ** 3000000000 }}",
    ],
)
def test_a_template_that_takes_any_time_or_memory_is_refused(tmp_path, tokenizer, text):
    start = time.monotonic()
    said = said_by(
        prompt_renderer, with_template(tmp_path, GOOD + text), tokenizer, None, "<image>"
    )
    assert said == (
        f"{tmp_path}/chat_template.jinja: the chat template cannot be used: for a short question "
        "it takes over 1 s or 1 GiB"
    )
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "text", ["{{ 'a' * 10 ** 7 }}", "{% for i in range(99999) %}ab{% endfor %}"]
)
def test_a_template_that_makes_a_book_of_a_question_is_refused(tmp_path, tokenizer, text):
    folder = with_template(tmp_path, GOOD + text)
    said = said_by(prompt_renderer, folder, tokenizer, None, "<image>")
    assert "the chat template fails: it makes " in said and "characters of a question" in said


def test_plan_refuses_an_endless_template(tmp_path):
    model = with_template(copy_model(tmp_path / "model"), LOOP)
    assert "chat_template.jinja: the chat template cannot be used: for a" in plan_error(
        tmp_path, model
    )


def test_a_template_is_tried_once_and_before_there_are_ranks(tmp_path, tokenizer, monkeypatch):
    trials = []
    monkeypatch.setattr(chat_template, "ends_within", lambda *_: trials.append(1) or True)
    folder = with_template(tmp_path, GOOD)
    for _ in range(2):
        render = prompt_renderer(folder, tokenizer, None, "<image>")
    assert render("Why?", True, "") == "USER: <image>\nWhy? ASSISTANT:" and len(trials) == 1
    chat_template._tried.clear()
    monkeypatch.setenv(launcher.PLANNED_VARIABLE, "1")
    prompt_renderer(folder, tokenizer, None, "<image>")
    assert len(trials) == 1


def test_long_questions_are_rendered(tmp_path, tokenizer):
    render = prompt_renderer(with_template(tmp_path, GOOD), tokenizer, None, "<image>")
    assert len(render("x" * 10**6, False, "")) > 10**6
