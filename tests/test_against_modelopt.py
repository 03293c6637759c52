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
from observing import observe_options, observe_setup, plan_of, scene_micro_batches
from rank_parity import import_llava
from safetensors.torch import load_file

from nemo_vlm_ptq.calibrate.observe.loop import observe
from nemo_vlm_ptq.calibrate.solve.layer import solve_layer
from nemo_vlm_ptq.calibrate.statistics import LINEARS, assemble_layer, layer_file
from nemo_vlm_ptq.formats import FORMATS
from nemo_vlm_ptq.megatron.forward import collate, encode_images, forward
from nemo_vlm_ptq.targets.megatron import quant_modules, quantizers

GROUP_SIZE = 128
SAMPLE_TOKENS, SAMPLES_WITH_IMAGE = 48, (0, 1, 3, 4, 6)  # of the random samples
NUM_SCENES = 12  # samples of the trained model
BF16_STEP = 2.0**-7  # largest relative distance between neighbouring bfloat16 numbers
MAX_FORMATS = [
    name for name, fmt in FORMATS.items() if fmt.modelopt_preset and fmt.algorithm == "max"
]


@pytest.fixture(scope="module")
def parallel():
    with models.single_rank() as context:
        yield context


def random_micro_batches():
    """Return micro-batches of two samples of equal length, as modelopt counts padding as tokens."""
    lengths = [SAMPLE_TOKENS] * 8
    samples = models.to_samples(models.random_questions(lengths, SAMPLES_WITH_IMAGE, seed=5))
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def observe_model(parallel, folder, dtype, tmp_path_factory):
    """Observe a 16 bit model; return it with all that solve and modelopt's calibration need."""
    plan = plan_of(folder, dtype)
    is_trained = folder == models.TINY_LLAVA
    micro_batches = scene_micro_batches(plan, NUM_SCENES) if is_trained else random_micro_batches()
    model, vision = import_llava(parallel, folder, dtype)
    vision.to(dtype)
    statistics_folder = tmp_path_factory.mktemp("statistics")
    setup = observe_setup(parallel, plan)
    observe(setup, micro_batches, statistics_folder, observe_options(), {})
    features = encode_images(vision, parallel, micro_batches, model.config.hidden_size)

    def run_samples(any_model):
        for micro_batch, image_features in zip(micro_batches, features, strict=True):
            forward(any_model, parallel, collate(micro_batch), image_features)

    return SimpleNamespace(
        model=model,
        statistics=statistics_folder,
        sizes=plan.decoder.sizes(64),
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


def load_statistics(subject, layer, *, whole):
    """Return linear -> statistics of a layer, with whole or sketched second moments."""
    return assemble_layer(load_file(subject.statistics / layer_file(layer)), whole=whole)


def solve(subject, name, *, whole=None):
    """Return (layer, linear) -> solved scales; whole: None takes the format's second moments."""
    modules, solved = find_linears(subject.model), {}
    whole = bool(FORMATS[name].low_rank) if whole is None else whole
    for layer in range(len(subject.model.decoder.layers)):
        weights = {linear: modules[layer, linear].weight.data for linear in LINEARS}
        statistics = load_statistics(subject, layer, whole=whole)
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


def quantize_with_solved_scales(subject, name, *, whole=None):
    """Return (layer, linear) -> module, with modelopt's quantizers set to solved scales."""
    model, fmt, solved = subject.load_model(), FORMATS[name], solve(subject, name, whole=whole)
    quantizers.insert_quantizers(model, fmt, GROUP_SIZE)
    layers = range(model.config.num_layers)
    quantizers.prepare_weights(model, fmt, lambda *key: solved[key], layers)
    quantizers.fill_quantizers(model, fmt, lambda *key: solved[key])
    quantizers.use_custom_backends(model, fmt)
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


def relative_errors(subject, inputs, losses):
    """Return (layer, linear) -> root of the loss divided by the mean over tokens of |x W^T|^2."""
    modules, errors = find_linears(subject.model), {}
    for key, loss in losses.items():
        output_TO = inputs[key].double() @ modules[key].weight.double().T
        errors[key] = (loss / float(output_TO.square().sum(-1).mean())) ** 0.5
    return errors


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
    inputs, solved = collect_inputs(subject), solve(subject, "int4_awq", whole=True)
    quantized = quantize_with_solved_scales(subject, "int4_awq", whole=True)
    replayed = replay_losses(subject, inputs, quantized)
    for key, module in find_linears(subject.model).items():
        moment = load_statistics(subject, key[0], whole=True)[key[1]].moment
        scale = quantized[key].input_quantizer.pre_quant_scale.double()
        delta = quantized[key].weight_quantizer(quantized[key].weight).double() * scale
        delta -= module.weight.double()
        loss = float(torch.trace(delta @ moment.whole_KK.double() @ delta.T))
        assert loss == pytest.approx(replayed[key], rel=1e-4)
    found = {key: scales.error for key, scales in solved.items()}
    assert found == pytest.approx(relative_errors(subject, inputs, replayed), rel=1e-3)


@pytest.mark.parametrize("subject", ["random_float32", "trained_float32"])
def test_errors_from_sketches_are_close_to_those_of_replayed_tokens(subject, request):
    subject = request.getfixturevalue(subject)
    inputs, solved = collect_inputs(subject), solve(subject, "int4_awq")
    replayed = replay_losses(subject, inputs, quantize_with_solved_scales(subject, "int4_awq"))
    found = {key: scales.error for key, scales in solved.items()}
    assert found == pytest.approx(relative_errors(subject, inputs, replayed), rel=0.1)
