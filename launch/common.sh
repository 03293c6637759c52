# shellcheck shell=bash
# Sourced by the scripts beside it: finds Python and keeps a virtual environment up to date.
#
#   set_up [EXTRA]   makes the environment and installs this repository into it, editable, with the
#                    versions of constraints.txt; does nothing when that was done before.
#   check_counts     sets $nodes by NNODES, and refuses it or GPUS_PER_NODE if it is no number.
#   count_ranks      sets $ranks, those of a machine, by GPUS_PER_NODE, and shares out its cores.
#
# Afterwards $root is the repository and $venv the environment. NEMO_VLM_PTQ_VENV names another
# folder for it than .venv; pip's own PIP_* variables choose where packages come from. Where NNODES
# is more than 1 nothing is installed: machines that share a folder would do it at once.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${NEMO_VLM_PTQ_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

fail() {
    echo "error: $*" >&2
    exit 1
}

# True for an interpreter of a supported version that can import the named modules.
_usable() {
    local python=$1
    shift
    "$python" - "$@" >/dev/null 2>&1 <<'PYTHON'
import importlib, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON
}

_find_python() {
    local python
    for python in python3 python3.12 python3.11; do
        if _usable "$python" venv ensurepip; then
            echo "$python"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with the modules venv and ensurepip on PATH" \
        "(on Debian and Ubuntu: apt install python3-venv)"
}

# Whatever the installed result depends on, in one hash.
_wanted() {
    local file
    {
        echo "$root"
        for file in pyproject.toml setup.py constraints.txt nemo_vlm_ptq/__init__.py; do
            cat "$root/$file"
        done
    } | sha256sum | cut -d ' ' -f 1
}

set_up() {
    local extra=${1:-} python wanted stamp=$venv/.nemo-vlm-ptq # lines "hash extra"
    wanted=$(_wanted)
    if grep -qsx "$wanted ${extra:-base}" "$stamp"; then
        return
    fi
    if ((${NNODES:-1} > 1)); then
        fail "$venv is not up to date, and several machines must not install into it at once;" \
            "run this script once on one of them without NNODES, say with the words plan RECIPE"
    fi
    if [[ ! -e $venv ]]; then
        python=$(_find_python)
        "$python" -m venv "$venv"
    fi
    _usable "$venv/bin/python" pip ||
        fail "$venv is no virtual environment of Python 3.11 or 3.12 with pip;" \
            "remove it, or set NEMO_VLM_PTQ_VENV to another folder"
    echo "installing into $venv: minutes the first time, nothing once it is up to date" >&2
    if ! command -v nvidia-smi >/dev/null && [[ -z ${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-} ]]; then
        echo "no NVIDIA GPU here: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" \
            "gets torch without gigabytes of CUDA" >&2
    fi
    grep -qs "^$wanted " "$stamp" || : >"$stamp"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    printf "$wanted %s\n" base ${extra:+"$extra"} >>"$stamp"
}

check_counts() {
    nodes=${NNODES:-1}
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$nodes is no number of machines"
    [[ ${GPUS_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] ||
        fail "GPUS_PER_NODE=$GPUS_PER_NODE is no number of ranks"
}

count_ranks() {
    local share gpus='import torch; print(max(1, torch.cuda.device_count()))'
    ranks=${GPUS_PER_NODE:-$("$venv/bin/python" -c "$gpus")}
    share=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
}
