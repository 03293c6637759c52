# shellcheck shell=bash
# Sourced by the scripts in launch/ and slurm/: finds Python and keeps a virtual environment up to
# date.
#
#   set_up [EXTRA]   create the environment and install this repository into it, editable, with the
#                    versions of constraints.txt; a no-op if the installation is up to date
#   require_number NAME VALUE LEAST   fail unless the value is an integer from LEAST, 0 or 1, on
#   check_counts     set $nodes from NNODES; fail if NNODES or GPUS_PER_NODE is not a positive integer
#   count_ranks      set $ranks, the ranks per machine, from GPUS_PER_NODE; divide the CPU cores
#                    among them with OMP_NUM_THREADS
#
# Sets $root to the repository and $venv to the environment. NEMO_VLM_PTQ_VENV selects another folder
# than .venv; pip's PIP_* variables select the package index. With NNODES > 1 nothing is installed,
# because machines that share the folder would install into it at the same time.
#
# Bash evaluates what stands in arithmetic, in [[ -v ]] and in the index of an array, commands in it
# included. Values of others pass require_number, or a pattern, before they stand there.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${NEMO_VLM_PTQ_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

fail() {
    echo "error: $*" >&2
    exit 1
}

require_number() {
    local kind="an integer from $3"
    ((!$3)) || kind="a positive integer"
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        fail "$1 must be $kind, got ${2@Q}"
    fi
}

# Return true if an interpreter has a supported version and can import the named modules.
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

# Print a hash of everything that the installation depends on.
_fingerprint() {
    local file
    {
        echo "$root"
        for file in pyproject.toml setup.py constraints.txt nemo_vlm_ptq/__init__.py; do
            cat "$root/$file"
        done
    } | sha256sum | cut -d ' ' -f 1
}

set_up() {
    require_number NNODES "${NNODES:-1}" 1
    local extra=${1:-} python fingerprint stamp=$venv/.nemo-vlm-ptq # lines "hash extra"
    fingerprint=$(_fingerprint)
    if grep -qsx "$fingerprint ${extra:-base}" "$stamp"; then
        return
    fi
    if ((${NNODES:-1} > 1)); then
        fail "$venv is out of date and cannot be updated with NNODES > 1, because all machines" \
            "would install into it; first run this script on one machine without NNODES," \
            "for example with the arguments: plan RECIPE"
    fi
    if [[ ! -e $venv ]]; then
        python=$(_find_python)
        "$python" -m venv "$venv"
    fi
    _usable "$venv/bin/python" pip ||
        fail "$venv must be a virtual environment with Python 3.11 or 3.12 and pip;" \
            "remove it or set NEMO_VLM_PTQ_VENV to another folder"
    echo "installing into $venv; the first installation takes minutes" >&2
    if ! command -v nvidia-smi >/dev/null && [[ -z ${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-} ]]; then
        echo "no NVIDIA GPU found; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" \
            "installs torch without the CUDA libraries" >&2
    fi
    grep -qs "^$fingerprint " "$stamp" || : >"$stamp"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
        -c "$root/constraints.txt" -e "$root${extra:+[$extra]}"
    printf "$fingerprint %s\n" base ${extra:+"$extra"} >>"$stamp"
}

check_counts() {
    nodes=${NNODES:-1}
    require_number NNODES "$nodes" 1
    require_number GPUS_PER_NODE "${GPUS_PER_NODE:-1}" 1
}

count_ranks() {
    local share gpus='import torch; print(max(1, torch.cuda.device_count()))'
    ranks=${GPUS_PER_NODE:-$("$venv/bin/python" -c "$gpus")}
    require_number "the number of GPUs" "$ranks" 1
    share=$(nproc)
    require_number "what nproc prints" "$share" 1
    share=$((share / ranks))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 0 ? share : 1))}
}
