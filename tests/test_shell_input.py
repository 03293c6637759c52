"""What a recipe, an argument or a variable holds is never run by launch/ and slurm/."""

import json
import os
import subprocess

import pytest
import scripts
import yaml
from bad_models import ROOT, TINY, error_message, said_by, write_recipe
from test_slurm import SITE, submit

from nemo_vlm_ptq.errors import UserError, VerificationError, has_control_characters
from nemo_vlm_ptq.recipe import load_recipe, make_recipe

SPRING = "BASH_VERSINFO[$(touch SPRUNG)]"  # run where bash evaluates it as a number or an index


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    return scripts.make_venv(tmp_path_factory.mktemp("venv"))


def rejected(done, folder, *codes):
    """One line of a rejection on stderr; nothing has been run."""
    code, out, err = done
    assert not list(folder.rglob("SPRUNG")), err
    assert (code in codes, out, err.count("\n")) == (True, "", 1), (code, out, err)
    return err


@pytest.mark.parametrize(
    "separator", ["\n", "\r", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"]
)
@pytest.mark.parametrize(
    "tree",
    [
        {"workdir": "w{}x"},
        {"model": "m{}"},
        {"family": "{}llava"},
        {"calibration": {"data": "a{}b"}},
        {"engine": {"vila_path": "a{}b"}},
        {"stages": ["import", "ob{}serve"]},
        {"quantize": {"format": "fp8{}"}},
        {"quantize": {"format": ["int4_awq", "fp8{}"]}},
        {"export": {"targets": ["hf{}"]}},
        {"config": {"text_config": {"a": ["x{}"]}}},
        {"config": {"a{}b": 1}},
    ],
)
def test_control_characters_are_rejected_in_every_string_of_a_recipe(tree, separator):
    def fill(value):
        if isinstance(value, dict):
            return {fill(key): fill(part) for key, part in value.items()}
        if isinstance(value, list):
            return [fill(part) for part in value]
        return value.format(separator) if isinstance(value, str) else value

    with pytest.raises(UserError, match="no control characters") as caught:
        make_recipe({"model": "m", "workdir": "w"} | fill(tree))
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"recipe key '{next(iter(tree))}")


def test_control_characters_of_a_variable_in_a_path_are_rejected(monkeypatch):
    monkeypatch.setenv("PLACE", "a\nb")
    with pytest.raises(UserError, match="'workdir': Input should have no control characters"):
        make_recipe({"model": "m", "workdir": "$PLACE/w"})


def test_letters_of_other_alphabets_spaces_and_quotes_are_accepted():
    name = 'Größe 量化 "it\'s" $;&|'
    assert make_recipe({"model": name.replace("$", ""), "workdir": "w"}).model


def test_a_value_that_holds_itself_is_no_hang(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\nworkdir: w\nconfig: &a {x: *a, y: [*a, *a]}\n")
    said = said_by(load_recipe, str(recipe))
    assert said == f"{recipe} is not YAML: line 3: an alias that holds itself"


@pytest.mark.parametrize("key", ["model", "config", "calibration", "nonsense", "stages"])
def test_aliases_without_end_are_not_written_out(tmp_path, key):
    recipe = tmp_path / "r.yaml"
    levels = [f"  k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)]
    recipe.write_text(f"workdir: w\n{key}:\n  k0: &a0 [x, x]\n{''.join(levels)}")
    said = said_by(load_recipe, str(recipe))
    assert said == f"{recipe} is not YAML: its aliases stand for more than 100,000 values"


def test_aliases_and_merges_of_ordinary_size_work(tmp_path):
    recipe = tmp_path / "r.yaml"
    text = "model: &m m\nworkdir: *m\nconfig: {a: &a {x: 1}, b: {<<: *a, y: 2}, c: [*a, *a]}\n"
    recipe.write_text(text)
    made = load_recipe(str(recipe))
    assert made.workdir == "m"
    assert made.config == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\0b", "a\u2028b", "a\ud800b", "\x1b[31mb"])
@pytest.mark.parametrize("error", [UserError, VerificationError])
def test_names_that_a_message_quotes_do_not_break_its_line(error, text):
    said = str(error(f"tensor {text} is not \u00fc"))
    assert len(said.splitlines()) == 1 and said.endswith("b is not \u00fc")
    assert said.encode() and "\\" in said and not has_control_characters(said)


@pytest.mark.parametrize(
    "words", [("plan", "recipe\n.yaml"), ("status", "work\ndir"),
              ("plan", "quickstart", "model=a\nb"),
              ("logits", "quickstart", "from=hf", "inputs=a\nb", "output=c")],
)  # fmt: skip
def test_control_characters_in_words_of_the_command_are_rejected_in_a_line(words):
    assert "has control characters" in error_message(*words)


@pytest.mark.parametrize("key", ["workdir", "model", "calibration.data", "stages"])
def test_no_line_of_a_recipe_is_run_by_the_submission(venv, tmp_path, key):
    tree = {"model": str(TINY), "workdir": str(tmp_path / "work")}
    value = f"w\nimport observe\n{SPRING}\n{SPRING}\nfp8 {SPRING}"
    if "." in key:
        tree["calibration"] = {"data": value}
    else:
        tree[key] = [value] if key == "stages" else value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = submit(venv, tmp_path, "--dry-run", "recipe.yaml")
    rejected((done.returncode, done.stdout, done.stderr), tmp_path, 2)


@pytest.mark.parametrize("name", ["`touch SPRUNG`; touch SPRUNG", "it's %x `touch SPRUNG`", "-w a"])
def test_a_dry_run_quotes_any_workdir_for_the_shell(venv, tmp_path, name):
    write_recipe(tmp_path)
    folder = tmp_path / name
    done = submit(venv, tmp_path, "--dry-run", "recipe.yaml", f"workdir={json.dumps(str(folder))}")
    assert done.returncode == 0, done.stderr
    (tmp_path / "sbatch").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word" >>told; done\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", done.stdout], cwd=tmp_path, env={"PATH": path}, check=True)
    assert not list(tmp_path.rglob("SPRUNG"))
    told = (tmp_path / "told").read_text()
    assert f"--output={str(folder).replace('%', '%%')}/slurm/%x_%j.log\n" in told


@pytest.mark.parametrize("key", ["NODES", "GPUS_PER_NODE", "GPU_TYPE"])
@pytest.mark.parametrize("value", [SPRING, "99999999999999999999", "-1", "08", "1 2"])
def test_numbers_of_the_site_are_checked_before_bash_computes(venv, tmp_path, key, value):
    write_recipe(tmp_path)
    done = submit(venv, tmp_path, "--dry-run", "recipe.yaml", **{key: f"'{value}'"})
    assert f"{key} in " in rejected((done.returncode, done.stdout, done.stderr), tmp_path, 2)


@pytest.mark.parametrize(
    "script", ["run.sh", "mpirun.sh", "quickstart.sh", "huggingface_example.sh"]
)
@pytest.mark.parametrize("value", [SPRING, "99999999999999999999", "08"])
def test_numbers_in_variables_are_checked_before_bash_computes(venv, tmp_path, script, value):
    words = ("plan", "quickstart")
    if script == "huggingface_example.sh":
        words = ("--model", "m", "--type", "llava", "--quant", "fp8")
    keys = ["NNODES"]
    if script in ("run.sh", "mpirun.sh"):
        keys += ["GPUS_PER_NODE"]
    if script == "run.sh":
        keys += ["NODE_RANK", "SLURM_NODEID", "MASTER_PORT"]
    for key in keys:
        nodes = {} if key in keys[:2] else {"NNODES": "9", "MASTER_ADDR": "here"}
        nodes |= {"NODE_RANK": "0"} if key == "MASTER_PORT" else {}
        done = scripts.run(script, venv, tmp_path, *words, **nodes | {key: value})
        rejected(done, tmp_path, 1)


@pytest.mark.parametrize(
    "words",
    [
        (f"--{SPRING}", "1"),
        ("--a[$(touch SPRUNG)]=1",),
        ("--model", "m", "--type", "llava", "--quant", "fp8", "--input", SPRING),
        ("--model", "m", "--type", "llava", "--quant", "fp8", "--output", SPRING),
        ("--model", "m", "--type", "llava", "--quant", "fp8", "--input", "9" * 20),
        ("--model", "m", "--type", "llava", "--quant", "fp8", "--tasks", SPRING.replace(" ", "")),
    ],
)  # fmt: skip
def test_no_option_of_the_example_script_is_run(venv, tmp_path, words):
    rejected(scripts.run("huggingface_example.sh", venv, tmp_path, *words), tmp_path, 1)


@pytest.mark.parametrize(
    "key", ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "GPUS_PER_NODE"]
)
def test_numbers_of_a_job_are_checked_before_bash_computes(tmp_path, key):
    site = SITE | ({key: f"'{SPRING}'"} if key == "GPUS_PER_NODE" else {})
    (tmp_path / "site.env").write_text("".join(f"{name}={value}\n" for name, value in site.items()))
    variables = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_NNODES": "1"}
    variables |= {"NEMO_VLM_PTQ_SITE": str(tmp_path / "site.env")}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "solve_export.sbatch", ROOT, "fp8", "recipe.yaml"],
        cwd=tmp_path,
        env=os.environ | variables | ({} if key == "GPUS_PER_NODE" else {key: SPRING}),
        capture_output=True,
        text=True,
    )
    assert key in rejected((done.returncode, done.stdout, done.stderr), tmp_path, 1)
