#!/usr/bin/env bash
# Run all checks, also after a failure; the exit code is 1 if any check failed.
#
#   launch/test.sh [pytest argument ...]     linters, types, import rules, tests
#   launch/test.sh --lint                    all checks except the tests
#   launch/test.sh --format                  no checks; format and apply ruff's automatic fixes
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
    ruff check -q --fix . || true # remaining findings are reported by --lint
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
