#!/usr/bin/env bash
# The whole road on the embedded sample: sets the project up if needed, trains a small DeBERTa router on recorded answers
# of two local models, fits kNN, linear and matrix-factorisation routers beside it, scores all of them and their
# controls on held-out prompts, and writes one HTML report. CPU, no key, no hub; a few minutes after installation.
# Run it again: what is done is kept. Start anew with `rm -r data/runs/quickstart`.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
"$ROOT/cmd/setup.sh"
. "$ROOT/cmd/env.sh"
cd "$ROOT"
export HF_HUB_OFFLINE=1
out=data/runs/quickstart

echo "1/2 training a small DeBERTa router on data/sample"
python src/train_deberta.py --config configs/train_deberta/quickstart.yaml --output_dir "$out/deberta"

echo "2/2 scoring every router and its controls on the held-out prompts"
python src/evaluate.py --cache data/sample --routers configs/routers/quickstart.yaml --output_dir "$out/report" "$@"

echo
echo "The report: $ROOT/$out/report/report.html"
echo "Next: train on your own recordings with src/import_outcomes.py, or see the tour in README.md."
