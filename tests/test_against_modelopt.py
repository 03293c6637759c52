"""Scales solved from statistics against modelopt's own calibration, on one rank, same samples.

modelopt runs its calibration loop over the same micro-batches through the same Megatron model. Its
max and SmoothQuant scales are met exactly; its AWQ and SVDQuant are met or beaten in the loss that
they minimize.
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
from nemo_vlm_ptq.targets.megatron import quant_modules as modules
from nemo_vlm_ptq.targets.megatron import quantizers

GROUP = 128
LENGTH, LOOKING = 48, (0, 1, 3, 4, 6)  # tokens of a random sample, and who has a picture
SCENES = 12  # samples of the trained model
BF16_STEP = 2.0**-7  # largest relative distance of neighbours in bfloat16
PRESETS = {name: row for name, row in FORMATS.items() if row.modelopt_preset}
MAX = [name for name, row in PRESETS.items() if row.algorithm == "max"]


@pytest.fixture(scope="module")
def own():
    with models.alone() as parallel:
        yield parallel


def random_chunks():
    """Micro-batches of two samples of one length: modelopt would count padding as tokens."""
    samples = models.to_samples(models.random_questions([LENGTH] * 8, LOOKING, seed=5))
    return [samples[i : i + 2] for i in range(0, len(samples), 2)]


def scene_chunks(config, family):
    """Micro-batches of one sample of the built-in scenes."""
    questions = load_questions("scenes", "calibration", SCENES)
    ready = family.make_preprocessor(models.TINY_LLAVA, config)
    return [
        [ready(item.id, item.text + PROMPT_SUFFIX, questions.image(item.image), item.answer)]
        for item in questions.items
    ]


def prepare(own, folder, dtype, out):
    """The 16 bit model observed; everything that solving and modelopt's calibration need."""
    config = read_config(folder)
    family = find_family(config)
    trained = folder == models.TINY_LLAVA
    chunks = scene_chunks(config, family) if trained else random_chunks()
    model, vision = import_llava(own, folder, dtype)
    vision.to(dtype)
    observe(
        ObserveSetup(model, vision, own, models.ready),
        chunks,
        out,
        ObserveOptions(moments=True),
        {},
    )
    features = encode_images(vision, own, chunks, model.config.hidden_size)

    def run(any_model):
        for chunk, chunk_features in zip(chunks, features, strict=True):
            forward(any_model, own, collate(chunk), chunk_features)

    return SimpleNamespace(
        model=model,
        statistics=out,
        sizes=family.decoder(config).sizes(64),
        fresh=lambda: import_llava(own, folder, dtype)[0],
        run=run,
    )


@pytest.fixture(scope="module")
def exact(own, tiny, tmp_path_factory):
    """The model in float32."""
    return prepare(own, tiny.float32, torch.float32, tmp_path_factory.mktemp("statistics"))


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    """The little trained model, in float32."""
    out = tmp_path_factory.mktemp("statistics")
    return prepare(own, models.TINY_LLAVA, torch.float32, out)


@pytest.fixture(scope="module")
def rounded(own, tiny, tmp_path_factory):
    """The model in bfloat16."""
    return prepare(own, tiny.bfloat16, torch.bfloat16, tmp_path_factory.mktemp("statistics"))


def linears(model):
    """(layer, name) -> module."""
    return {
        (layer, name): block.get_submodule(path)
        for layer, block in enumerate(model.decoder.layers)
        for name, path in LINEARS.items()
    }


def statistics(subject, layer):
    return load_layer(subject.statistics, layer, torch.device("cpu"))


def solve(subject, name):
    """(layer, linear) -> our scales."""
    own = linears(subject.model)
    solved = {}
    for layer in range(len(subject.model.decoder.layers)):
        weights = {linear: own[layer, linear].weight.data for linear in LINEARS}
        seen = statistics(subject, layer)
        found = solve_layer(weights, seen, FORMATS[name], GROUP, subject.sizes)
        solved |= {(layer, linear): entry for linear, entry in found.items()}
    return solved


def modelopts_preset(name):
    """Its preset; on a CPU it has to round nvfp4 with our code."""
    modules.register_backends()
    preset = copy.deepcopy(getattr(mtq, FORMATS[name].modelopt_preset))
    for entry in preset["quant_cfg"]:
        if FORMATS[name].weight == "nvfp4" and "cfg" in entry:
            entry["cfg"]["backend"] = modules.NVFP4_ON_CPU
    return preset


def calibrate_with_modelopt(subject, name):
    """(layer, linear) -> module, quantized and calibrated by modelopt alone."""
    if FORMATS[name].low_rank:
        return calibrate_plain_linears(subject, name)
    model = subject.fresh()
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, modelopts_preset(name), subject.run)
    quantizers.disable_activation_quantizers(model)
    return linears(model)


def calibrate_plain_linears(subject, name):
    """The same with torch's linears for Megatron's, to which modelopt cannot add a branch."""
    given, own = inputs(subject), linears(subject.model)
    plain = torch.nn.ModuleDict()
    for (layer, linear), module in own.items():
        rows, columns = module.weight.shape
        plain[f"{layer} {linear}"] = one = torch.nn.Linear(columns, rows, bias=False)
        one.weight.data.copy_(module.weight)

    def run(_):
        for (layer, linear), x in given.items():
            for part in x.split(LENGTH):
                plain[f"{layer} {linear}"](part)

    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        mtq.quantize(plain, modelopts_preset(name), run)
    quantizers.disable_activation_quantizers(plain)
    return {at: lambda x, at=at: (plain[f"{at[0]} {at[1]}"](x).detach(), None) for at in own}


def quantize_with_ours(subject, name):
    """(layer, linear) -> module, with modelopt's quantizers filled from our scales."""
    model, solved = subject.fresh(), solve(subject, name)
    quantizers.insert_quantizers(model, FORMATS[name], GROUP)
    layers = range(model.config.num_layers)
    quantizers.prepare_weights(model, FORMATS[name], lambda *at: solved[at], layers)
    quantizers.fill_quantizers(model, FORMATS[name], lambda *at: solved[at])
    quantizers.use_custom_backends(model, FORMATS[name])
    quantizers.disable_activation_quantizers(model)
    return linears(model)


def same(found, expected):
    return torch.equal(found.float().flatten(), expected.float().flatten())


@pytest.mark.parametrize("name", MAX)
@pytest.mark.parametrize("subject", ["exact", "rounded"])
def test_max_scales_are_modelopts(name, subject, request):
    subject = request.getfixturevalue(subject)
    theirs, ours = calibrate_with_modelopt(subject, name), solve(subject, name)
    for at, module in theirs.items():
        assert same(ours[at].weight_amax, module.weight_quantizer.amax), at
        given = module.input_quantizer.amax
        assert (ours[at].input_amax is None) == (given is None), at
        assert given is None or same(ours[at].input_amax, given), at


@pytest.mark.parametrize("subject", ["exact", "rounded"])
def test_smoothquant_scales_are_modelopts(subject, request):
    """In bfloat16 ours divides the weight by the scale as it is stored, modelopt by a finer one."""
    tolerance = 0.0 if subject == "exact" else BF16_STEP
    subject = request.getfixturevalue(subject)
    theirs, ours = calibrate_with_modelopt(subject, "int8_sq"), solve(subject, "int8_sq")
    for at, module in theirs.items():
        assert same(ours[at].pre_quant_scale, module.input_quantizer.pre_quant_scale), at
        assert same(ours[at].input_amax, module.input_quantizer.amax), at
        expected = module.weight_quantizer.amax.float().flatten()
        assert len(expected) == len(module.weight), "one a channel"
        torch.testing.assert_close(ours[at].weight_amax, expected, rtol=tolerance, atol=0)


def inputs(subject):
    """(layer, linear) -> every input [T,K] that the 16 bit model gives it on the samples."""
    seen, handles = {}, []
    for at, module in linears(subject.model).items():
        pieces = seen.setdefault(at, [])

        def keep(_, args, pieces=pieces):
            pieces.append(args[0].flatten(0, 1).clone())

        handles.append(module.register_forward_pre_hook(keep))
    subject.run(subject.model)
    for handle in handles:
        handle.remove()
    return {at: torch.cat(pieces) for at, pieces in seen.items()}


def replay(subject, given, modules):
    """(layer, linear) -> mean over all tokens of |x W^T - what the quantized module says|^2."""
    losses = {}
    for at, module in linears(subject.model).items():
        change = modules[at](given[at][:, None])[0] - module(given[at][:, None])[0]
        losses[at] = float(change.double().square().sum(-1).mean())
    return losses


def compare_losses(name, label, subject, capsys):
    """(layer, linear) -> ours over modelopt's, and that of their sums; both without rounded inputs,
    which neither search looks at."""
    given = inputs(subject)
    ours = replay(subject, given, quantize_with_ours(subject, name))
    theirs = replay(subject, given, calibrate_with_modelopt(subject, name))
    with capsys.disabled():
        print(f"\n{name + ' ' + label:<20} {'ours':>10} {'modelopt':>10}  ratio")
        for (layer, linear), loss in ours.items():
            other = theirs[layer, linear]
            print(f"{layer} {linear:<18} {loss:10.4g} {other:10.4g} {loss / other:6.3f}")
    ratios = {at: loss / theirs[at] for at, loss in ours.items()}
    return ratios, sum(ours.values()) / sum(theirs.values())


@pytest.mark.parametrize("subject", ["exact", "trained"])
@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
def test_awq_loses_no_more_than_modelopts(name, subject, request, capsys):
    ratios, total = compare_losses(name, subject, request.getfixturevalue(subject), capsys)
    assert max(ratios.values()) <= 1.01
    assert total < 1


@pytest.mark.parametrize("subject", ["exact", "trained"])
def test_awq_of_nvfp4_loses_as_much_as_modelopts(subject, request, capsys):
    """There are no maxima to search, which is where ours gains in int4."""
    ratios, total = compare_losses("nvfp4_awq", subject, request.getfixturevalue(subject), capsys)
    assert max(ratios.values()) <= 1.01
    assert total < 1


@pytest.mark.parametrize("subject", ["exact", "trained"])
def test_svdquant_loses_no_more_than_modelopts(subject, request, capsys):
    """Random weights have no strongest directions, so the iteration may miss some of the last."""
    name = "nvfp4_svdquant"
    ratios, total = compare_losses(name, subject, request.getfixturevalue(subject), capsys)
    assert max(ratios.values()) <= (1.01 if subject == "trained" else 1.02)
    assert total < 0.97


@pytest.mark.parametrize("subject", ["exact", "trained"])
def test_the_loss_from_second_moments_is_that_of_replaying_every_token(subject, request):
    """Both as solve minimizes it, tr(dW H dW^T), and as it tells it, relative to the output."""
    subject = request.getfixturevalue(subject)
    given, solved = inputs(subject), solve(subject, "int4_awq")
    modules = quantize_with_ours(subject, "int4_awq")
    replayed = replay(subject, given, modules)
    for (layer, linear), module in linears(subject.model).items():
        at, moment = (layer, linear), statistics(subject, layer)[linear].moment.double()
        back = modules[at].input_quantizer.pre_quant_scale.double()
        change = modules[at].weight_quantizer(modules[at].weight).double() * back
        change -= module.weight.double()
        loss = float(torch.trace(change @ moment @ change.T))
        assert loss == pytest.approx(replayed[at], rel=1e-4)
        size = float((given[at].double() @ module.weight.double().T).square().sum(-1).mean())
        assert solved[at].error == pytest.approx((replayed[at] / size) ** 0.5, rel=1e-3)
