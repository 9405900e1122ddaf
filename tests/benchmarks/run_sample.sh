#!/usr/bin/env bash
# The README's table on the shipped sample: the small DeBERTa trained on each of five divisions of the prompts, scored beside
# the light routers and the controls on the same divisions. Needs nothing but the repository; about 6 CPU minutes.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/../.." && pwd)"
"$ROOT/cmd/setup.sh"
. "$ROOT/cmd/env.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1  # sums over two threads round differently, and train to slightly different weights
for seed in 0 1 2 3 4; do
    [ -f "data/runs/sample/deberta-$seed/router.json" ] && continue
    python src/train_deberta.py --config configs/train_deberta/quickstart.yaml --split_seed "$seed" --seed "$seed" \
        --output_dir "data/runs/sample/deberta-$seed"
done
python src/evaluate.py --cache data/sample --routers configs/routers/sample_seeds.yaml --seeds 5 --output_dir data/runs/sample/report "$@"
