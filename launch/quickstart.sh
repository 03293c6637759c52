#!/usr/bin/env bash
# Quantize, export, verify and evaluate the bundled model: all stages, on a laptop CPU.
#
#   launch/quickstart.sh [key=value ...]     overrides of configs/quickstart.yaml
#
# Sets up .venv first. Finished stages are skipped, so a second run takes seconds. Paths in overrides
# are relative to the repository.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

set_up
cd "$root"
exec "$venv/bin/nemo-vlm-ptq" run configs/quickstart.yaml "$@"
