"""Scales solved from statistics against modelopt's own calibration, on one rank.

modelopt runs its calibration loop over the same micro-batches through the same Megatron model. Its
max and SmoothQuant scales are matched exactly. Its AWQ and SVDQuant scales are matched or improved
on in the loss that they minimize.
"""

import contextlib
import copy
import io
from types import SimpleNamespace

import modelopt.torch.quantization as mtq
import models
import pytest
import torch
from rank_parity import import_llava

from nemo_vlm_ptq.calibrate.observe.loop import ObserveOptions, ObserveSetup, observe
from nemo_vlm_ptq.calibrate.solve.layer import solve_layer
from nemo_vlm_ptq.calibrate.statistics import LINEARS, load_layer
from nemo_vlm_ptq.data.questions import PROMPT_SUFFIX, load_questions
from nemo_vlm_ptq.families import find_family, read_config
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward
from nemo_vlm_ptq.targets.megatron import quant_modules, quantizers

GROUP_SIZE = 128
SAMPLE_TOKENS, SAMPLES_WITH_IMAGE = 48, (0, 1, 3, 4, 6)  # of the random samples
NUM_SCENES = 12  # samples of the trained model
BF16_STEP = 2.0**-7  # largest relative distance between neighbouring bfloat16 numbers
PRESETS = {name: fmt for name, fmt in FORMATS.items() if fmt.modelopt_preset}
MAX_FORMATS = [name for name, fmt in PRESETS.items() if fmt.algorithm == "max"]


@pytest.fixture(scope="module")
def parallel():
    with models.single_rank() as context:
        yield context


def random_micro_batches():
    """Return micro-batches of two samples of equal length, as modelopt counts padding as tokens."""
    questions = models.random_questions([SAMPLE_TOKENS] * 8, SAMPLES_WITH_IMAGE, seed=5)
    samples = models.to_samples(questions)
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def scene_micro_batches(config, family):
    """Return micro-batches of one sample of the built-in scenes."""
    questions = load_questions("scenes", "calibration", NUM_SCENES)
    preprocess = family.make_preprocessor(models.TINY_LLAVA, config)

    def make_sample(item):
        image = questions.load_image(item.image)
        return preprocess(item.id, item.text + PROMPT_SUFFIX, image, item.answer)

    return [[make_sample(item)] for item in questions.items]


def observe_model(parallel, folder, dtype, tmp_path_factory):
    """Observe a 16 bit model; return it with all that solve and modelopt's calibration need."""
    config = read_config(folder)
    family = find_family(config)
    is_trained = folder == models.TINY_LLAVA
    micro_batches = scene_micro_batches(config, family) if is_trained else random_micro_batches()
    model, vision = import_llava(parallel, folder, dtype)
    vision.to(dtype)
    statistics_folder = tmp_path_factory.mktemp("statistics")
    observe(
        ObserveSetup(model, vision, parallel, models.identity_preprocess),
        micro_batches,
        statistics_folder,
        ObserveOptions(second_moments=True),
        {},
    )
    features = encode_images(vision, parallel, micro_batches, model.config.hidden_size)

    def run_samples(any_model):
        for micro_batch, image_features in zip(micro_batches, features, strict=True):
            forward(any_model, parallel, collate(micro_batch), image_features)

    return SimpleNamespace(
        model=model,
        statistics=statistics_folder,
        sizes=family.decoder(config).sizes(64),
        load_model=lambda: import_llava(parallel, folder, dtype)[0],
        run_samples=run_samples,
    )


@pytest.fixture(scope="module")
def random_float32(parallel, tiny, tmp_path_factory):
    """The random model in float32."""
    return observe_model(parallel, tiny.float32, torch.float32, tmp_path_factory)


@pytest.fixture(scope="module")
def random_bfloat16(parallel, tiny, tmp_path_factory):
    """The random model in bfloat16."""
    return observe_model(parallel, tiny.bfloat16, torch.bfloat16, tmp_path_factory)


@pytest.fixture(scope="module")
def trained_float32(parallel, tmp_path_factory):
    """The small trained model in float32."""
    return observe_model(parallel, models.TINY_LLAVA, torch.float32, tmp_path_factory)


def find_linears(model):
    """Return (layer, name) -> module."""
    return {
        (layer, name): block.get_submodule(path)
        for layer, block in enumerate(model.decoder.layers)
        for name, path in LINEARS.items()
    }


def load_statistics(subject, layer):
    return load_layer(subject.statistics, layer, torch.device("cpu"))


def solve(subject, name):
    """Return (layer, linear) -> scales solved by this project."""
    modules = find_linears(subject.model)
    solved = {}
    for layer in range(len(subject.model.decoder.layers)):
        weights = {linear: modules[layer, linear].weight.data for linear in LINEARS}
        statistics = load_statistics(subject, layer)
        scales = solve_layer(weights, statistics, FORMATS[name], GROUP_SIZE, subject.sizes)
        solved |= {(layer, linear): linear_scales for linear, linear_scales in scales.items()}
    return solved


def modelopt_preset(name):
    """Return modelopt's preset, with this project's nvfp4 backend, which also runs on a CPU."""
    quant_modules.register_backends()
    preset = copy.deepcopy(getattr(mtq, FORMATS[name].modelopt_preset))
    for entry in preset["quant_cfg"]:
        if FORMATS[name].weight == "nvfp4" and "cfg" in entry:
            entry["cfg"]["backend"] = quant_modules.NVFP4_CPU_BACKEND
    return preset


def calibrate_with_modelopt(subject, name):
    """Return (layer, linear) -> module, quantized and calibrated by modelopt alone."""
    if FORMATS[name].low_rank:
        return calibrate_torch_linears(subject, name)
    model = subject.load_model()
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, modelopt_preset(name), subject.run_samples)
    quantizers.disable_activation_quantizers(model)
    return find_linears(model)


def calibrate_torch_linears(subject, name):
    """Calibrate torch.nn.Linear modules with modelopt, which has no low-rank branch for Megatron's.

    Returns (layer, linear) -> function with the return value of a Megatron linear.
    """
    inputs, modules = collect_inputs(subject), find_linears(subject.model)
    plain = torch.nn.ModuleDict()
    for (layer, linear), module in modules.items():
        rows, width = module.weight.shape
        plain[f"{layer} {linear}"] = copied = torch.nn.Linear(width, rows, bias=False)
        copied.weight.data.copy_(module.weight)

    def run_inputs(_):
        for (layer, linear), x in inputs.items():
            for part in x.split(SAMPLE_TOKENS):
                plain[f"{layer} {linear}"](part)

    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(plain, modelopt_preset(name), run_inputs)
    quantizers.disable_activation_quantizers(plain)
    return {at: lambda x, at=at: (plain[f"{at[0]} {at[1]}"](x).detach(), None) for at in modules}


def quantize_with_solved_scales(subject, name):
    """Return (layer, linear) -> module, with modelopt's quantizers set to solved scales."""
    model, solved = subject.load_model(), solve(subject, name)
    quantizers.insert_quantizers(model, FORMATS[name], GROUP_SIZE)
    layers = range(model.config.num_layers)
    quantizers.prepare_weights(model, FORMATS[name], lambda *key: solved[key], layers)
    quantizers.fill_quantizers(model, FORMATS[name], lambda *key: solved[key])
    quantizers.use_custom_backends(model, FORMATS[name])
    quantizers.disable_activation_quantizers(model)
    return find_linears(model)


def equal_values(found, expected):
    return torch.equal(found.float().flatten(), expected.float().flatten())


@pytest.mark.parametrize("name", MAX_FORMATS)
@pytest.mark.parametrize("subject", ["random_float32", "random_bfloat16"])
def test_max_scales_equal_modelopts(name, subject, request):
    subject = request.getfixturevalue(subject)
    expected, found = calibrate_with_modelopt(subject, name), solve(subject, name)
    for key, module in expected.items():
        assert equal_values(found[key].weight_amax, module.weight_quantizer.amax), key
        input_amax = module.input_quantizer.amax
        assert (found[key].input_amax is None) == (input_amax is None), key
        assert input_amax is None or equal_values(found[key].input_amax, input_amax), key


@pytest.mark.parametrize("subject", ["random_float32", "random_bfloat16"])
def test_smoothquant_scales_equal_modelopts(subject, request):
    """In bfloat16 solve divides the weight by the stored scale, modelopt by the unrounded one."""
    tolerance = 0.0 if subject == "random_float32" else BF16_STEP
    subject = request.getfixturevalue(subject)
    expected, found = calibrate_with_modelopt(subject, "int8_sq"), solve(subject, "int8_sq")
    for key, module in expected.items():
        scales, weight_amax = found[key], module.weight_quantizer.amax.float().flatten()
        assert equal_values(scales.pre_quant_scale, module.input_quantizer.pre_quant_scale), key
        assert equal_values(scales.input_amax, module.input_quantizer.amax), key
        assert len(weight_amax) == len(module.weight), "one per output channel"
        torch.testing.assert_close(scales.weight_amax, weight_amax, rtol=tolerance, atol=0)


def collect_inputs(subject):
    """Return (layer, linear) -> all inputs [T,K] in the 16 bit model over the samples."""
    collected, handles = {}, []
    for key, module in find_linears(subject.model).items():
        parts = collected.setdefault(key, [])

        def hook(_, args, parts=parts):
            parts.append(args[0].flatten(0, 1).clone())

        handles.append(module.register_forward_pre_hook(hook))
    subject.run_samples(subject.model)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in collected.items()}


def replay_losses(subject, inputs, quantized):
    """Return (layer, linear) -> mean over tokens of |change of the output|^2 by quantization."""
    losses = {}
    for key, module in find_linears(subject.model).items():
        delta = quantized[key](inputs[key][:, None])[0] - module(inputs[key][:, None])[0]
        losses[key] = float(delta.double().square().sum(-1).mean())
    return losses


def compare_losses(name, label, subject, capsys):
    """Return (layer, linear) -> loss relative to modelopt's, and the ratio of the total losses.

    Inputs are not quantized, as neither search takes that into account.
    """
    inputs = collect_inputs(subject)
    losses = replay_losses(subject, inputs, quantize_with_solved_scales(subject, name))
    modelopt_losses = replay_losses(subject, inputs, calibrate_with_modelopt(subject, name))
    with capsys.disabled():
        print(f"\n{name + ' ' + label:<28} {'solve':>10} {'modelopt':>10}  ratio")
        for (layer, linear), loss in losses.items():
            other = modelopt_losses[layer, linear]
            print(f"{layer} {linear:<26} {loss:10.4g} {other:10.4g} {loss / other:6.3f}")
    ratios = {key: loss / modelopt_losses[key] for key, loss in losses.items()}
    return ratios, sum(losses.values()) / sum(modelopt_losses.values())


@pytest.mark.parametrize("subject", ["random_float32", "trained_float32"])
@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq", "nvfp4_awq"])
def test_awq_losses_do_not_exceed_modelopts(name, subject, request, capsys):
    """The gain is largest in int4, where solve also clips; nvfp4 has no amax to clip."""
    ratios, total = compare_losses(name, subject, request.getfixturevalue(subject), capsys)
    assert max(ratios.values()) <= 1.01
    assert total < 1


@pytest.mark.parametrize("subject", ["random_float32", "trained_float32"])
def test_svdquant_losses_do_not_exceed_modelopts(subject, request, capsys):
    """Random weights have no dominant directions, so the iteration may miss some of the last."""
    name = "nvfp4_svdquant"
    ratios, total = compare_losses(name, subject, request.getfixturevalue(subject), capsys)
    assert max(ratios.values()) <= (1.01 if subject == "trained_float32" else 1.02)
    assert total < 0.97


@pytest.mark.parametrize("subject", ["random_float32", "trained_float32"])
def test_losses_from_second_moments_equal_those_of_replayed_tokens(subject, request):
    """Both the minimized loss, tr(dW E[x x^T] dW^T), and the reported relative error."""
    subject = request.getfixturevalue(subject)
    inputs, solved = collect_inputs(subject), solve(subject, "int4_awq")
    quantized = quantize_with_solved_scales(subject, "int4_awq")
    replayed = replay_losses(subject, inputs, quantized)
    for key, module in find_linears(subject.model).items():
        layer, linear = key
        second_moment = load_statistics(subject, layer)[linear].second_moment.double()
        scale = quantized[key].input_quantizer.pre_quant_scale.double()
        delta = quantized[key].weight_quantizer(quantized[key].weight).double() * scale
        delta -= module.weight.double()
        loss = float(torch.trace(delta @ second_moment @ delta.T))
        assert loss == pytest.approx(replayed[key], rel=1e-4)
        output = inputs[key].double() @ module.weight.double().T
        output_power = float(output.square().sum(-1).mean())
        assert solved[key].error == pytest.approx((replayed[key] / output_power) ** 0.5, rel=1e-3)
