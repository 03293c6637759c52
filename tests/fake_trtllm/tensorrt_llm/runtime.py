"""Fake runtime: logits return the inputs, and features are the index of their image token."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch

GENERATED = (7, 8, 1, 9)  # 1 is the end token of the tiny models


class TensorInfo:
    """Name, dtype and shape of a tensor."""

    def __init__(self, name, dtype, shape):
        self.name, self.dtype, self.shape = name, dtype, shape


class Session:
    """Vision engine whose features of image token i are all i."""

    def __init__(self, tokens, hidden):
        self.shape = (tokens, hidden)

    @classmethod
    def from_serialized_engine(cls, engine):
        return cls(*json.loads(engine))

    def infer_shapes(self, inputs):
        (info,) = inputs
        assert (info.name, info.dtype) == ("input", "half") and info.shape[1] == 3
        shape = (info.shape[0], *self.shape)
        return [SimpleNamespace(name="encoder_output", dtype=torch.float16, shape=shape)]

    def run(self, inputs, outputs, stream):
        assert inputs["input"].dtype == torch.float16 and stream == 0
        outputs["encoder_output"][:] = torch.arange(self.shape[0])[:, None]
        return True


class ModelRunnerCpp:
    """Runner whose logits [S,2] are (id, 0), or (sum of features, -1) for image tokens."""

    def __init__(self, config):
        self.vocab = config["pretrained_config"]["vocab_size"]
        self.limits = config["build_config"]

    @classmethod
    def from_dir(cls, *, engine_dir, rank, kv_cache_free_gpu_memory_fraction):
        assert rank == 0 and 0 < kv_cache_free_gpu_memory_fraction < 1
        if "FAKE_START_FAILURE" in os.environ:
            raise RuntimeError("engine was built for another GPU")
        return cls(json.loads((Path(engine_dir) / "config.json").read_text()))

    def generate(
        self,
        batch_input_ids,
        *,
        prompt_table,
        prompt_tasks,
        max_new_tokens,
        end_id,
        pad_id,
        top_k,
        output_sequence_lengths,
        return_dict,
    ):
        assert len(batch_input_ids) <= self.limits["max_batch_size"] and end_id == pad_id
        assert top_k == 1 and output_sequence_lengths and return_dict
        count = len(batch_input_ids)
        longest = max(map(len, batch_input_ids))
        tasks = [int(task) for task in prompt_tasks.split(",")] if prompt_tasks else []
        ids = torch.full((count, 1, longest + max_new_tokens), end_id)
        logits = torch.zeros(count, longest, 2)
        ends = torch.zeros(count, 1, dtype=torch.int32)
        for row, prompt in enumerate(batch_input_ids):
            assert prompt.dtype == torch.int32 and prompt.min() >= 0
            new = GENERATED[:max_new_tokens]
            ids[row, 0, : len(prompt) + len(new)] = torch.tensor([*prompt.tolist(), *new])
            ends[row] = len(prompt) + len(new)
            for position, token in enumerate(prompt.tolist()):
                if token < self.vocab:
                    logits[row, position] = torch.tensor((token, 0))
                else:
                    features = prompt_table[tasks[row]][token - self.vocab]
                    logits[row, position] = torch.tensor((features.sum(), -1))
        out = {"output_ids": ids, "sequence_lengths": ends}
        return out | ({"context_logits": logits} if self.limits["gather_context_logits"] else {})
