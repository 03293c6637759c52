"""Render prompts with the chat template of a model folder, as its servers do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_vlm_ptq.checkpoints.huggingface import read_json_object
from nemo_vlm_ptq.distributed.launcher import planned_by_parent
from nemo_vlm_ptq.errors import UserError
from nemo_vlm_ptq.input_files import one_line, read_text
from nemo_vlm_ptq.utils.limits import ends_within

# (question, number of its images, answer or "") -> prompt, followed by the answer
Render = Callable[[str, int, str], str]

PROBE = "QUESTION"
TRIAL_SECONDS = 10  # of CPU time
TRIAL_BYTES = 1 << 30
MAX_EXTRA_CHARACTERS = 100_000  # of a prompt beyond the question

_tried: set[str] = set()  # templates that ended within the limits of the trial


def prompt_renderer(folder: Path, tokenizer: Any, default: str | None, image: str) -> Render:
    """Return the function that renders the prompt of a question.

    Args:
        folder: the model folder.
        tokenizer: its tokenizer.
        default: prompt with {image} and {question}, for folders without a chat template; None if
            there must be one.
        image: placeholder of the image.

    Raises:
        UserError: the folder's chat template is missing, or does not render a question about an
            image.
    """
    name, template = _find_template(folder, tokenizer)
    if template is None and default is None:
        raise UserError(
            f"{folder} has no chat template; add the published chat_template.jinja or "
            "chat_template.json, or the key chat_template of tokenizer_config.json"
        )

    def render(question: str, images: int, answer: str) -> str:
        if template is None:
            text = str(default).format(image=f"{image}\n" * images, question=question)
        else:
            text = _apply(tokenizer, template, style(question, image, images))
        if not answer:
            return text
        return text + answer if text[-1:].isspace() else f"{text} {answer}"

    if template is not None:
        style = _find_style(f"{folder}/{name}", tokenizer, template, image)
    return render


def tokenize_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a prompt, with the beginning of sequence once, as transformers adds it."""
    bos = tokenizer.bos_token
    begins = bool(bos) and text.startswith(bos)
    return tokenizer(text, add_special_tokens=not begins)["input_ids"]


def _find_template(folder: Path, tokenizer: Any) -> tuple[str, str | None]:
    """Return the file and the text of the chat template, in the order of transformers."""
    template = None
    for name in ("processor_config.json", "chat_template.json"):
        if template is None and (folder / name).exists():
            template, source = read_json_object(folder / name).get("chat_template"), name
    if template is None and (folder / "chat_template.jinja").exists():
        template, source = read_text(folder / "chat_template.jinja"), "chat_template.jinja"
    if template is None:
        template, source = tokenizer.chat_template, "tokenizer_config.json"
    if isinstance(template, dict):
        template = template.get("default", template)
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"{folder}/{source}: chat_template must be one template, or have one named default"
        )
    return source, template


def _find_style(where: str, tokenizer: Any, template: str, image: str) -> Callable[..., Any]:
    """Return the form of a message's content that a template expects.

    Raises:
        UserError: with none the rendered text has the image and the question once, or the template
            takes too much time or memory.
    """
    _try_within_limits(where, tokenizer, template, image)
    reason = f"a question about an image has not {image} and the question once"
    for style in STYLES:
        try:
            text = _apply(tokenizer, template, style(PROBE, image, 1))
        except UserError as error:
            reason = str(error)
            continue
        if text.count(PROBE) == 1 and text.count(image) == 1 and "'type'" not in text:
            return style
    raise UserError(f"{where}: the chat template cannot be used: {reason}")


def _try_within_limits(where: str, tokenizer: Any, template: str, image: str) -> None:
    """Render all forms of a message in a process of its own, once, before there are ranks.

    Raises:
        UserError: the template takes too much time or memory.
    """

    def render_all() -> None:
        for style in STYLES:
            for images in (2, 1, 0):
                with suppress(UserError):
                    _apply(tokenizer, template, style(PROBE, image, images))

    if template in _tried or planned_by_parent():
        return
    if not ends_within(render_all, TRIAL_SECONDS, TRIAL_BYTES):
        raise UserError(
            f"{where}: the chat template cannot be used: for a short question it takes over "
            f"{TRIAL_SECONDS} s or {TRIAL_BYTES >> 30} GiB"
        )
    _tried.add(template)


def _apply(tokenizer: Any, template: str, content: Any) -> str:
    """Render a conversation of one message, up to the answer; models that may think do not."""
    messages = [{"role": "user", "content": content}]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a template raises
        raise UserError(f"the chat template fails: {one_line(error)}") from None
    if len(text) > len(str(content)) + MAX_EXTRA_CHARACTERS:
        raise UserError(f"the chat template fails: it makes {len(text):,} characters of a question")
    return text


def _parts(question: str, image: str, images: int) -> list[dict[str, str]]:
    """Return a list of images and a text; the template writes the placeholders."""
    return [{"type": "image"}] * images + [{"type": "text", "text": question}]


def _text_with_images(question: str, image: str, images: int) -> str:
    return f"{image}\n" * images + question


def _text(question: str, image: str, images: int) -> str:
    """Return the question; the template writes the placeholder for every message."""
    return question


STYLES = (_parts, _text_with_images, _text)
