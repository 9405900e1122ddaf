#!/usr/bin/env bash
# The README's table of language-model routers on the shipped sample: a decision model and a difficulty model by supervised
# fine-tuning, the first trained further by DPO, and a probe, each on three divisions of the prompts, scored beside the cheap model's own
# scores and the controls. Needs nothing but the repository. A part that is there already is not made again.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/../.." && pwd)"
"$ROOT/cmd/setup.sh"
. "$ROOT/cmd/env.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1  # sums over two threads round differently, and train to slightly different weights
runs=data/runs/sample
for seed in 0 1 2; do
    set_of="data/sets/sample-$seed"
    [ -f "$set_of/dpo_dev_data.card.json" ] ||
        python src/build_sets.py --config configs/build_sets/sample.yaml --split_seed "$seed" --output_dir "$set_of"
    [ -f "$set_of-difficulty/alpaca_dev.card.json" ] ||
        python src/build_sets.py --config configs/build_sets/sample_difficulty.yaml --split_seed "$seed" --output_dir "$set_of-difficulty"
    python src/train_llm.py --config configs/train_llm/sample.yaml --data "$set_of/alpaca_train.jsonl" --seed "$seed" \
        --output_dir "$runs/sft-$seed"
    python src/train_llm.py --config configs/train_llm/sample.yaml --data "$set_of-difficulty/alpaca_train.jsonl" --seed "$seed" \
        --output_dir "$runs/sft-difficulty-$seed"
    python src/train_dpo.py --config configs/train_dpo/sample.yaml --data "$set_of/dpo_train_data.json" --seed "$seed" \
        --warm_start "$runs/sft-$seed" --output_dir "$runs/dpo-$seed"
    [ -f "$runs/probe-$seed/router.json" ] ||
        python src/train_probe.py --config configs/train_probe/sample.yaml --split_seed "$seed" --seed "$seed" \
            --output_dir "$runs/probe-$seed"
done
python src/evaluate.py --cache data/sample --routers configs/routers/language.yaml --seeds 3 --output_dir "$runs/language" "$@"
