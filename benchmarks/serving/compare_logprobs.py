"""Compare vLLM's log-probabilities with those of the package's reader, export by export.

    python benchmarks/serving/compare_logprobs.py read RECIPE [KEY=VALUE ...] [--questions N]
    python benchmarks/serving/compare_logprobs.py ask WORKDIR ... [--factor 2] [--dtype bfloat16]

A served model may load and still compute something else: a scale of another linear, a group in
another order. Answers of a model that was not trained do not show it, distributions do. `read`
needs this package, and a recipe that was run: it computes the distributions [S,V] after each token
of N questions of the calibration data, for the source and for each export that vLLM reads, in
float32, and writes them to WORKDIR/serving. `ask` needs vLLM and a GPU, and not this package: it
loads the same folders one after another, gives each the same questions and images, and prints
Kullback-Leibler divergences per token in nats: of vLLM from the reader of the same folder; of the
reader in bfloat16 from itself in float32, which is how far apart two right implementations are
where activations are rounded; of the export from the source. The exit code is 1 if prompts differ,
or vLLM is farther from the reader than --factor times what bfloat16 is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SOURCE = "source"
MAX_TOKENS = 4096  # of a prompt
HEAD = (
    "model",
    "format",
    "target",
    "tokens",
    "vLLM from reader",
    "reader in bfloat16",
    "export from source",
)


def main() -> None:
    """Run one of the sub-commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    read_parser = commands.add_parser("read")
    read_parser.add_argument("recipe", metavar="RECIPE")
    read_parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    read_parser.add_argument("--questions", type=int, default=3)
    read_parser.set_defaults(run=read)
    ask_parser = commands.add_parser("ask")
    ask_parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR")
    ask_parser.add_argument("--factor", type=float, default=2.0)
    ask_parser.add_argument("--dtype", default="bfloat16")
    ask_parser.set_defaults(run=ask)
    args = parser.parse_args()
    sys.exit(args.run(args))


def read(args: argparse.Namespace) -> int:
    """Write distributions and questions of a finished run."""
    from nemo_vlm_ptq.megatron.parallel_context import parallel_context
    from nemo_vlm_ptq.recipe.loading import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    with parallel_context({"tensor": 1, "pipeline": 1, "data": 1}) as parallel:
        read_run(recipe, parallel, args.questions)
    return 0


def read_run(recipe: Any, parallel: Any, count: int) -> None:
    """Write WORKDIR/serving: questions.json, images, and a file of distributions per folder."""
    from nemo_vlm_ptq.context import RunContext
    from nemo_vlm_ptq.planning.make_plan import make_plan
    from nemo_vlm_ptq.targets.registry import TARGETS
    from nemo_vlm_ptq.verify.model_forms import load_reference_model, reference_logits

    plan = make_plan(recipe)
    context = RunContext(plan=plan, parallel=parallel)
    folder = Path(recipe.workdir) / "serving"
    folder.mkdir(exist_ok=True)
    samples, items = write_questions(recipe, plan, folder, count)
    forms: list[tuple[str, Any]] = [("hf_source", None)]
    forms += [
        (name, fmt)
        for fmt in plan.formats
        for name in plan.readable_targets(fmt)
        if "vLLM" in TARGETS[name].servers.get(fmt.name, ())
    ]
    entries = []
    for form, fmt in forms:
        logs, rounded = (
            [one.float().log_softmax(-1) for one in reference_logits(model, samples)]
            for dtype in (torch.float32, torch.bfloat16)
            for model in [load_reference_model(context, form, fmt, dtype, parallel.device)]
        )
        name = SOURCE if fmt is None else f"{fmt.name}-{form}"
        save_file({str(i): one for i, one in enumerate(logs)}, folder / f"{name}.safetensors")
        path = Path(recipe.model) if fmt is None else plan.export_folder(fmt, form)
        noise = mean_divergence(logs, rounded)
        entries.append({"name": name, "folder": str(path.resolve()), "noise": noise})
    (folder / "questions.json").write_text(json.dumps({"questions": items, "folders": entries}))


def write_questions(
    recipe: Any, plan: Any, folder: Path, count: int
) -> tuple[list[Any], list[Any]]:
    """Write the images of questions of the calibration data; return samples, and text and ids."""
    from nemo_vlm_ptq.data.questions import calibration_questions

    preprocess = plan.family.make_preprocessor(Path(recipe.model), plan.config)
    questions = calibration_questions(recipe.calibration)
    samples, items = [], []
    for item in questions.items[:: max(1, len(questions.items) // count)][:count]:
        images = questions.load_images(item)
        samples.append(preprocess(item.id, item.text, images))
        files = [f"{len(items)}-{number}.png" for number in range(len(images))]
        for image, file in zip(images, files, strict=True):
            image.save(folder / file)
        ids = samples[-1].input_ids.tolist()
        items.append({"text": item.text, "images": files, "ids": ids})
    return samples, items


def ask(args: argparse.Namespace) -> int:
    """Ask vLLM, and print the table."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    failures = 0
    for work in args.workdirs:
        folder = work / "serving"
        record = json.loads((folder / "questions.json").read_text())
        source = load_file(folder / f"{SOURCE}.safetensors")
        for entry in record["folders"]:
            expected = load_file(folder / f"{entry['name']}.safetensors")
            try:
                outputs = ask_folder(entry["folder"], folder, record["questions"], args.dtype)
                row, passed = compare(
                    record["questions"], outputs, expected, source, args.factor * entry["noise"]
                )
                row.insert(2, f"{entry['noise']:.2e}")
            except Exception as error:
                row, passed = [f"{type(error).__name__}: {error}".replace("\n", " ")[-600:]], False
            failures += not passed
            name = entry["name"].partition("-")
            print("| " + " | ".join([work.name, name[0], name[2], *row]) + " |", flush=True)
    return int(failures > 0)


def ask_folder(path: str, folder: Path, questions: list[dict[str, Any]], dtype: str) -> list[Any]:
    """Return vLLM's outputs for the questions, with the distribution after each prompt token."""
    import gc

    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model=path,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=min(MAX_TOKENS, positions(Path(path))),
        max_num_seqs=4,
        max_logprobs=-1,
        kv_cache_memory_bytes=1 << 30,
        gpu_memory_utilization=0.3,
        limit_mm_per_prompt={"image": max(len(item["images"]) for item in questions)},
        mm_processor_cache_gb=0,
        disable_log_stats=True,
        seed=0,
    )
    chats = [
        [
            {
                "role": "user",
                "content": [
                    *(
                        {"type": "image_pil", "image_pil": Image.open(folder / file)}
                        for file in item["images"]
                    ),
                    {"type": "text", "text": item["text"]},
                ],
            }
        ]
        for item in questions
    ]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    try:
        return llm.chat(chats, sampling, use_tqdm=False)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def positions(folder: Path) -> int:
    """Return the number of positions that the model has."""
    config = json.loads((folder / "config.json").read_text())
    return int((config.get("text_config") or config)["max_position_embeddings"])


def compare(
    questions: list[dict[str, Any]],
    outputs: list[Any],
    expected: dict[str, torch.Tensor],
    source: dict[str, torch.Tensor],
    limit: float,
) -> tuple[list[str], bool]:
    """Return the cells of a row, and whether prompts are equal and divergences within the limit."""
    served, lost, tokens = [], [], 0
    for i, (item, output) in enumerate(zip(questions, outputs, strict=True)):
        ids = list(output.prompt_token_ids)
        if len(ids) != len(item["ids"]):
            return [
                f"{len(ids)} tokens for {len(item['ids'])}: {ids[:40]} {item['ids'][:40]}"
            ], False
        logs, own = expected[str(i)].float(), source[str(i)].float()
        theirs = torch.full_like(logs, -1e4)
        for place in range(1, len(ids)):
            for token, value in output.prompt_logprobs[place].items():
                theirs[place - 1, token] = value.logprob
        served.append(divergence(logs, theirs)[:-1])
        lost.append(divergence(own, logs)[:-1])
        tokens += len(ids)
    all_served, all_lost = torch.cat(served), torch.cat(lost)
    mean = all_served.mean().item()
    cells = [f"{tokens}", f"{mean:.2e} (most {all_served.max():.2e})", f"{all_lost.mean():.2e}"]
    return cells, mean <= limit


def mean_divergence(logs: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Return the mean divergence of `others` from `logs` over all tokens but the last ones."""
    pairs = zip(logs, others, strict=True)
    return torch.cat([divergence(one, other)[:-1] for one, other in pairs]).mean().item()


def divergence(logs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence [S] of `others` from `logs`, both [S,V]."""
    return (logs.exp() * (logs - others)).sum(-1)


if __name__ == "__main__":
    main()
