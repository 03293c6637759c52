"""Prompts by the chat template of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_vlm_ptq.errors import UserError


def render_question(folder: Path, tokenizer: Any, question: str, *, has_image: bool) -> str:
    """Return the prompt of a question, with an image in front of it or not, up to the answer.

    Models that think by default are told not to.

    Raises:
        UserError: the folder has no chat template, or it does not render the question.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder} has no chat template; add the published chat_template.jinja or "
            "chat_template.json, or the key chat_template of tokenizer_config.json"
        )
    content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    try:
        prompt = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # of jinja2, or raised by the template itself
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise UserError(f"{folder}: the chat template cannot render a question: {reason}") from None
    if question not in prompt:
        raise UserError(f"{folder}: the chat template leaves the question out")
    return str(prompt)
