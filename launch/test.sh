#!/usr/bin/env bash
# All checks, each one run even when one before has failed; fails when any of them did.
#
#   launch/test.sh [pytest argument ...]     linters, types, import rules, tests
#   launch/test.sh --lint                    all of it but the tests
#   launch/test.sh --format                  no checks: repair layout and what ruff can fix itself
#
# Sets up .venv first.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$*")
}

set_up test
cd "$root"
PATH=$venv/bin:$PATH
export HF_HUB_OFFLINE=1

if [[ ${1:-} == --format ]]; then
    ruff check -q --fix . || true # what is left is for --lint to say
    exec ruff format .
fi

check ruff check .
check ruff format --check .
check mypy
check lint-imports
check shellcheck launch/*.sh slurm/*.sh slurm/*.sbatch tests/slurm/*.sh .ci/run
if [[ ${1:-} != --lint ]]; then
    check python -m pytest -q -n logical --maxprocesses 4 --dist loadfile "$@"
fi

for command in "${failed[@]}"; do
    echo "FAILED: $command" >&2
done
exit $((${#failed[@]} > 0))
