"""The command: its help, its words, its exit codes, and commands that must stop."""

import contextlib
import json
import re
import subprocess
import sys
from unittest import mock

import pytest
from bad_models import (
    PREFIX,
    ROOT,
    TINY,
    copy_model,
    damage,
    error_message,
    running,
    write_recipe,
)

from nemo_vlm_ptq import __version__, cli, commands
from nemo_vlm_ptq.constants import STAGES
from nemo_vlm_ptq.data.questions import load_questions
from nemo_vlm_ptq.errors import VerificationError
from nemo_vlm_ptq.families import FAMILIES
from nemo_vlm_ptq.formats import FORMATS

HEAVY = ("torch", "transformers", "megatron", "modelopt", "numpy", "pydantic")
DOWN = "language_model.model.layers.{}.mlp.down_proj.weight"


def call(capsys, *words):
    """(exit code, stdout, stderr) of the command in this process."""
    with (
        mock.patch.object(sys, "argv", ["nemo-vlm-ptq", *map(str, words)]),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_help_prints_the_usage_and_imports_nothing_heavy():
    script = (
        "import os, runpy, sys\n"
        "sys.argv = ['nemo_vlm_ptq', '--help']\n"
        "def leave(code):\n"
        f"    print([name for name in {HEAVY} if name in sys.modules], code, flush=True)\n"
        "os._exit = leave\n"  # how the command ends
        "runpy.run_module('nemo_vlm_ptq', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == cli.USAGE + "[] 0\n"


@pytest.mark.parametrize(
    "words", [[], ["-h"], ["--help"], ["help"], ["run", "--help"], ["plan", "quickstart", "-h"]]
)
def test_help_is_given_wherever_it_is_asked_for(capsys, words):
    assert call(capsys, *words) == (0, cli.USAGE, "")


def test_version_is_that_of_the_package(capsys):
    assert call(capsys, "--version") == (0, f"nemo-vlm-ptq {__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "calibrate", "plan", "logits", *STAGES])
def test_every_command_of_the_usage_takes_a_recipe_and_overrides(command):
    assert command in cli.USAGE
    chosen = cli.parse([command, "quickstart", "a=1", "b.c=[x, y]"])
    assert (chosen.command, chosen.recipe) == (command, "quickstart")
    assert chosen.overrides == ["a=1", "b.c=[x, y]"]


@pytest.mark.parametrize("place", range(5))
def test_debug_may_stand_anywhere_among_the_words(place):
    words = ["plan", "quickstart", "a=1", "b=2"]
    chosen = cli.parse([*words[:place], "--debug", *words[place:]])
    assert (chosen.command, chosen.recipe) == ("plan", "quickstart")
    assert chosen.debug and chosen.overrides == ["a=1", "b=2"]


def test_an_unknown_command_and_a_missing_recipe_are_rejected(capsys):
    code, out, err = call(capsys, "quantise", "quickstart")
    assert (code, out) == (2, "")
    assert "invalid choice: 'quantise' (choose from" in err and "Traceback" not in err
    assert error_message("run") == "run needs a recipe: a YAML file or a shipped name"


@pytest.mark.parametrize(("what", "table"), [("families", FAMILIES), ("formats", FORMATS)])
def test_the_support_matrix_lists_every_row_as_text_and_as_json(capsys, what, table):
    code, out, err = call(capsys, what)
    assert (code, err) == (0, "")
    rows = out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in rows[2:] if line[0] != " "] == list(table)
    assert max(map(len, out.splitlines())) <= 100
    code, out, err = call(capsys, what, "--json")
    assert (code, err) == (0, "")
    assert [next(iter(row.values())) for row in json.loads(out)] == list(table)


def test_overrides_reach_the_plan(tmp_path, capsys):
    recipe = write_recipe(tmp_path, TINY, quantize={"format": ["fp8", "int8_sq"]})
    code, out, err = call(capsys, "plan", recipe, "quantize.format=int4_awq", "export.tensor=2")
    assert (code, err) == (0, "")
    assert "int4_awq" in out and "fp8" not in out and "int8_sq" not in out
    assert "; TensorRT-LLM ranks: TP 2 x PP 1\n" in out


def test_debug_shows_where_an_error_came_from_and_keeps_its_code(tmp_path, capsys):
    recipe = write_recipe(tmp_path, tmp_path / "none")
    code, out, err = call(capsys, "plan", recipe, "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback") and "model_folder" in err
    assert err.splitlines()[-1] == f"{PREFIX}model folder {tmp_path / 'none'} does not exist"


def test_a_failed_verification_ends_with_3_and_a_bug_with_its_traceback(monkeypatch, capsys):
    def fail(*_, **__):
        raise VerificationError("logits differ")

    monkeypatch.setattr(commands, "run_command", fail)
    assert call(capsys, "verify", "quickstart") == (3, "", f"{PREFIX}logits differ\n")
    monkeypatch.setattr(commands, "run_command", lambda *_, **__: 1 // 0)
    with (
        mock.patch.object(sys, "argv", ["nemo-vlm-ptq", "run", "quickstart"]),
        pytest.raises(ZeroDivisionError),
    ):
        cli.main()


def test_again_makes_verify_forget_what_has_passed(tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    for name in ("fp8", "int8_sq", "nf4"):
        (work / name).mkdir(parents=True)
        (work / name / "verify.json").write_text("{}")
    monkeypatch.setattr(commands, "_run_here", lambda *_: 0)
    words = ("quickstart", f"workdir={work}", "quantize.format=[fp8, int8_sq]", "parallel.tensor=1")
    assert call(capsys, "verify", *words)[0] == 0
    assert len(list(work.glob("*/verify.json"))) == 3
    assert call(capsys, "verify", *words, "--again")[0] == 0
    assert [path.parent.name for path in work.glob("*/verify.json")] == ["nf4"]
    code, _, err = call(capsys, "run", *words, "--again")
    assert code == 2 and "--again is an option of verify: verify RECIPE --again" in err


@pytest.mark.parametrize("word", ["from", "inputs", "dtype"])
def test_an_option_of_logits_without_a_value_is_rejected(tmp_path, word):
    recipe = write_recipe(tmp_path)
    with mock.patch.object(commands, "_start_ranks", return_value=0):
        assert word in error_message("logits", recipe, word)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Real commands that must stop, started together: by name, a `Command` each."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("nan", "overflow", "torchrun")}
    recipes = {}
    for name, folder in folders.items():
        model = copy_model(folder / "model")
        if name == "nan":  # the last input of a row-parallel linear: tensor rank 1 alone reads it
            damage(model, lambda tensors: tensors[DOWN.format(2)][-1, -1:].fill_(float("nan")))
        if name == "overflow":
            damage(model, lambda tensors: tensors[DOWN.format(1)].fill_(3e38))
            (folder / "work" / "megatron").mkdir(parents=True)
            (folder / "work" / "megatron" / "left-over").touch()
            (folder / "work" / ".megatron.being-written").touch()
        recipes[name] = write_recipe(folder, model, calibration={"samples": 3})
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = {
        "nan": ["nemo_vlm_ptq", "import", recipes["nan"], "parallel.tensor=2"],
        "overflow": ["nemo_vlm_ptq", "run", recipes["overflow"], "stages=[import, observe]"],
        "torchrun": [*torchrun, "-m", "nemo_vlm_ptq", "import", recipes["torchrun"],
                     "paralel.tensor=2"],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(running(folder, *words[name]))
            for name, folder in folders.items()
        }


def test_a_usage_error_inside_ranks_of_torchrun_ends_them_with_2_and_a_line_each(started):
    code, lines = started["torchrun"].end()
    assert code != 0  # torchrun has a code of its own, and tells those of its ranks
    text = "\n".join(lines)
    ended = [line.split()[2] for line in lines if line.strip().startswith("exitcode")]
    assert "2" in ended and set(ended) <= {"2", "-15"}, text  # it may end the slower rank itself
    line = f"{PREFIX}unknown recipe key 'paralel'; did you mean 'parallel'?"
    assert line in text and text.count(PREFIX) in (1, 2), text  # two ranks share one stream
    assert f'File "{ROOT}/nemo_vlm_ptq' not in text
    assert not (started["torchrun"].folder / "work").exists()


def test_nan_in_a_weight_is_told_once_though_one_rank_of_two_has_read_it(started):
    code, lines = started["nan"].end()
    assert code == 2, lines
    assert lines[-1] == f"{PREFIX}tensor {DOWN.format(2)} holds NaN or Inf"
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
    assert not (started["nan"].folder / "work" / "megatron" / "manifest.json").exists()


def test_nan_in_an_activation_is_told_with_its_layer_and_sample(started):
    code, lines = started["overflow"].end()
    assert code == 2, lines
    (first, *_) = load_questions("scenes", "calibration", 3).items
    found = re.fullmatch(
        rf"{PREFIX}activation holds NaN or Inf: layer (\d), input of (\w+), "
        rf"(?:text|image|text and image) tokens of sample {first.id}",
        lines[-1],
    )
    assert found and found.groups() == ("2", "linear_qkv"), lines[-1]  # what layer 1 gave
    assert not [line for line in lines[:-1] if "Traceback" in line or "rror" in line]
    work = started["overflow"].folder / "work"
    assert not (work / "statistics" / "manifest.json").exists()


def test_an_interrupted_stage_is_redone_and_what_it_left_is_gone(started):
    started["overflow"].end()
    work = started["overflow"].folder / "work"
    assert (work / "megatron" / "manifest.json").is_file()
    assert not (work / "megatron" / "left-over").exists()
    assert not (work / ".megatron.being-written").exists()
