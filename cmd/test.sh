#!/usr/bin/env bash
# Passes the tests: sets the project up if needed, then runs the whole suite. Offline, CPU, no key; 9 minutes on
# two cores. Words after it go to pytest: `cmd/test.sh -k stats`, `cmd/test.sh -m "not slow"` (the quick part).
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
"$ROOT/cmd/setup.sh" --tests
. "$ROOT/cmd/env.sh"
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec python -m pytest "$@"
