# shellcheck shell=bash
# Sourced by the scripts beside it: finds Python and keeps a virtual environment up to date.
#
#   set_up [EXTRA]   makes the environment and installs this repository into it, editable, with the
#                    versions of constraints.txt; does nothing when that was done before.
#
# Afterwards $root is the repository and $venv the environment. NEMO_VLM_PTQ_VENV names another
# folder for it than .venv; pip's own PIP_* variables choose where packages come from.

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
