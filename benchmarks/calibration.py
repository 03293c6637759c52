"""Measures calibration against a plain forward and against modelopt's own, on one GPU or the CPU.

    python benchmarks/calibration.py [--layers 32] [--samples 64] [--micro-batch 8] [--repeats 3]
                                     [--ours] [--scratch DIR]

One LLaVA-1.5-7B decoder with random weights in bf16, once as this project's Megatron model and once
as transformers' (--small: the sizes of tiny-llava, to try the script). Samples are 576 image tokens
(random features, no tower) and 64 of text. Everything runs once to warm up, then --repeats times;
medians are printed. modelopt's runs begin each time with a fresh model, whose making is not
counted. --ours leaves modelopt out. Statistics go through files in --scratch. The floor is the FLOP
of the linears over the rate of a large bf16 product in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from random_model import _noise, published_config

from nemo_vlm_ptq.calibrate.collect import reduce_and_save
from nemo_vlm_ptq.calibrate.observe import observe
from nemo_vlm_ptq.calibrate.solve import save_scales, solve_layer
from nemo_vlm_ptq.calibrate.statistics import LINEARS, load_layer
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.families.base import Decoder, Pixels, Sample
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.build import build_decoder
from nemo_vlm_ptq.megatron.checkpoint import fill_from_source
from nemo_vlm_ptq.megatron.forward import collate, forward
from nemo_vlm_ptq.megatron.session import Session, session

IMAGE_TOKENS, TEXT_TOKENS = 576, 64
GROUP = 128
FAMILY = FAMILIES["llava"]
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 512}
MODELOPT = {"fp8": "FP8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG", "int4_awq": "INT4_AWQ_CFG"}


class Weights(dict[str, torch.Tensor]):
    """Tensors by published name, read as a source is."""

    def slices(self, name: str) -> torch.Tensor:
        """The tensor, which can be cut."""
        return self[name]


class Features(torch.nn.Module):
    """In the tower's place: features that were drawn before."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        super().__init__()
        made = torch.randn(IMAGE_TOKENS, hidden, device=device, dtype=torch.bfloat16)
        self.drawn = torch.nn.Parameter(made, requires_grad=False)

    def forward(self, _: Pixels) -> torch.Tensor:
        """[tokens,H] of an image."""
        return self.drawn


def make_samples(count: int, vocabulary: int) -> list[Sample]:
    """Samples of one image and text around it."""
    torch.manual_seed(0)
    length, pixels = IMAGE_TOKENS + TEXT_TOKENS, Pixels(torch.zeros(1, 3, 2, 2))
    is_image = torch.zeros(length, dtype=torch.bool)
    is_image[TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + IMAGE_TOKENS] = True
    ids = [torch.randint(vocabulary, (length,)) for _ in range(count)]
    return [Sample(f"s{i}", one, is_image, pixels) for i, one in enumerate(ids)]


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, act: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, GB at most on the GPU) of an action."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    start = time.perf_counter()
    act()
    wait(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return seconds, peak / 1e9


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 product."""
    side, count = (8192, 20) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds, _ = timed(device, lambda: [a @ b for _ in range(count)])
    return count * 2 * side**3 / seconds


class Ours:
    """This project's model and what is measured of it."""

    def __init__(
        self, own: Session, decoder: Decoder, weights: Weights, options: argparse.Namespace
    ) -> None:
        self.own, self.decoder = own, decoder
        self.model = build_decoder(decoder, own, torch.bfloat16)
        fill_from_source(self.model, own, FAMILY.rows, decoder, weights)  # type: ignore[arg-type]
        self.vision = Features(decoder.hidden, own.device)
        samples, size = make_samples(options.samples, decoder.vocab), options.micro_batch
        self.chunks = [samples[i : i + size] for i in range(0, len(samples), size)]

    def forward(self) -> None:
        """Nothing but the forward."""
        for chunk in self.chunks:
            features = [self.vision.drawn for _ in chunk]
            forward(self.model, self.own, collate(chunk), features)

    def observe(self, moments: bool, folder: Path | None) -> None:
        """All layers in one pass; written when there is a folder."""
        layers = range(self.decoder.layers)
        given = (self.model, self.vision, self.own, self.chunks, list, layers)
        seen = observe(*given, moments=moments)
        if folder is not None:
            reduce_and_save(seen, self.own, folder)

    def solve(self, name: str, folder: Path) -> None:
        """Scales of a format for all layers, from files to files."""
        sizes = self.decoder.sizes(64)
        for index, block in enumerate(self.model.decoder.layers):
            weights = {key: block.get_submodule(path).weight.data for key, path in LINEARS.items()}
            seen = load_layer(folder, index, self.own.device)
            scales = solve_layer(weights, seen, FORMATS[name], GROUP, sizes)
            (folder / name).mkdir(exist_ok=True)
            save_scales(folder / name, index, scales)

    def cases(self, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is measured, in order."""
        yield "plain forward", self.forward
        yield "observe, maxima", lambda: self.observe(False, None)
        yield "observe, second moments", lambda: self.observe(True, None)
        yield "observe, second moments, written", lambda: self.observe(True, folder)
        for name in FORMATS:
            yield f"solve {name}", lambda name=name: self.solve(name, folder)


def build_transformers(config: dict[str, Any], weights: Weights, device: torch.device) -> Any:
    """transformers' decoder with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kept = {key: value for key, value in config.items() if key not in ("architectures", "dtype")}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**kept)).to(torch.bfloat16)
    start = FAMILY.decoder_prefix
    own = {name.removeprefix(start): tensor.clone() for name, tensor in weights.items()}
    head = "model." if not any(name.startswith("model.") for name in own) else ""
    own = {name if name.startswith("lm_head") else head + name: t for name, t in own.items()}
    missing, unexpected = model.load_state_dict(own, strict=False, assign=True)
    assert not missing and not unexpected, (missing, unexpected)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval().requires_grad_(False)


def modelopt_cases(
    config: dict[str, Any], weights: Weights, device: torch.device, options: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], None]]]:
    """(name, what makes a fresh model, what is timed) of modelopt's Hugging Face path."""
    import modelopt.torch.quantization as mtq

    torch.manual_seed(0)
    embedded = [
        torch.randn(options.micro_batch, IMAGE_TOKENS + TEXT_TOKENS, config["hidden_size"])
        for _ in range(-(-options.samples // options.micro_batch))
    ]
    embedded = [one.to(device, torch.bfloat16) for one in embedded]

    @torch.no_grad()
    def run(model: Any) -> None:
        for one in embedded:
            model(inputs_embeds=one, use_cache=False)

    def fresh() -> Any:
        return build_transformers(config, weights, device)

    yield "transformers, plain forward", fresh, run
    for name, preset in MODELOPT.items():
        settings = getattr(mtq, preset)
        yield f"modelopt, {name}", fresh, lambda m, s=settings: mtq.quantize(m, s, run)


def report(name: str, seconds: float, peak: float, tokens: int, plain: float) -> None:
    """One line of the table."""
    rate = f"{tokens / seconds:,.0f}"
    print(f"| {name} | {seconds:.2f} | {seconds / plain:.2f} | {rate} | {peak:.1f} |", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="measures calibration")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()
    config = published_config("llava-1.5-7b-hf")
    config["text_config"] |= {"num_hidden_layers": options.layers} | (
        SMALL if options.small else {}
    )
    decoder = FAMILY.decoder(config)
    with (
        session({"tensor": 1, "pipeline": 1, "data": 1}) as own,
        tempfile.TemporaryDirectory(dir=options.scratch) as scratch,
    ):
        measure(own, decoder, config, options, Path(scratch))


def measure(
    own: Session,
    decoder: Decoder,
    config: dict[str, Any],
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """Both models, one after the other."""
    device, tokens = own.device, options.samples * (IMAGE_TOKENS + TEXT_TOKENS)
    generator = torch.Generator(device).manual_seed(0)
    shapes = decoder.shapes(FAMILY.rows)
    weights = Weights({name: _noise(name, shape, generator) for name, shape in shapes.items()})
    linear = sum(t.numel() for name, t in weights.items() if t.dim() == 2 and "embed" not in name)
    rate = matrix_rate(device)
    floor = 2 * linear * tokens / rate
    print(
        f"{tokens:,} tokens in {options.samples} samples; {linear / 1e9:.2f} G weights in linears;"
    )
    print(f"bf16 product {rate / 1e12:.0f} TFLOP/s, so the floor of a forward is {floor:.2f} s\n")
    print("| what | s | of our plain forward | tokens/s | GB at most |\n" + "| --- " * 5 + "|")
    ours, plain = Ours(own, decoder, weights, options), 0.0
    for name, act in ours.cases(folder):
        act()
        runs = [timed(device, act) for _ in range(options.repeats)]
        seconds = statistics.median(one for one, _ in runs)
        plain = plain or seconds
        report(name, seconds, max(peak for _, peak in runs), tokens, plain)
    del ours, act
    if options.ours:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for name, fresh, calibrate in modelopt_cases(config["text_config"], weights, device, options):
        runs = []
        for turn in range(1 + options.repeats):
            model = fresh()
            runs.append(timed(device, lambda model=model: calibrate(model)))
            del model
            print(f"{name} {turn}: {runs[-1][0]:.2f} s", file=sys.stderr, flush=True)
        seconds = statistics.median(one for one, _ in runs[1:])
        report(name, seconds, max(peak for _, peak in runs), tokens, plain)


if __name__ == "__main__":
    main()
