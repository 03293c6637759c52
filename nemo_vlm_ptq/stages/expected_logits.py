"""What the Megatron models say to a few questions: verify holds the written files against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from nemo_vlm_ptq.context import RunContext
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, evaluation_questions
from nemo_vlm_ptq.families.base import Sample
from nemo_vlm_ptq.formats import QuantFormat
from nemo_vlm_ptq.stages.model_forms import logits_with_and_without_rounding, megatron_logits

SAMPLE_COUNT = 8


@dataclass(frozen=True)
class ExpectedLogits:
    """What the quantized Megatron model says to the samples: logits [S,V] float32 each."""

    samples: list[Sample]
    exact: list[torch.Tensor]  # activations not rounded
    rounded: list[torch.Tensor]  # as it is
    source: list[torch.Tensor]  # the 16 bit model


class LogitsOracle:
    """The models of a job; what all formats share is asked once, by the first that needs it."""

    def __init__(self, job: RunContext) -> None:
        self.job = job

    @cached_property
    def samples(self) -> list[Sample]:
        """Test questions with their images."""
        plan = self.job.plan
        questions = evaluation_questions(plan.recipe.evaluate.data, SAMPLE_COUNT)
        prepare = plan.family.make_preprocessor(plan.folder, plan.config)
        return [
            prepare(item.id, item.text + PROMPT_SUFFIX, questions.image(item.image))
            for item in questions.items
        ]

    @cached_property
    def source(self) -> list[torch.Tensor]:
        """Logits of the 16 bit model (collective)."""
        return megatron_logits(self.job, None, self.samples)

    def in_format(self, fmt: QuantFormat) -> ExpectedLogits:
        """Logits of the quantized model, and of the 16 bit one where they matter (collective)."""
        if fmt.activation is None and self.job.plan.recipe.quantize.kv_cache == "none":
            exact = megatron_logits(self.job, fmt, self.samples)
            return ExpectedLogits(self.samples, exact, exact, exact)
        rounded, exact = logits_with_and_without_rounding(self.job, fmt, self.samples)
        return ExpectedLogits(self.samples, exact, rounded, self.source)
