#!/usr/bin/env bash
# Trains a router on preference pairs (offline DPO) with torchrun, on 4 GPUs, one GPU or a CPU, from wherever it is called.
#
#   ./cmd/run_train_dpo.sh                                       bare: pairs of the shipped sample cache
#   ./cmd/run_train_dpo.sh DATA MODEL OUT [--flags of src/train_dpo.py]
#   ./cmd/run_train_dpo.sh --data data/sets/mine/dpo_train_data.json --epochs 2
#
# Positionals, in this order, "" or left out for the default:
#   DATA   preference pairs, JSON of prompt, chosen, rejected   "": made in memory from the cache (--cache, data/sample)
#   MODEL  folder or hub id                                     Qwen/Qwen2.5-1.5B-Instruct; only where its weights cannot be had and
#                                                               no MODEL was named: the sample pool's strong model, with a warning
#   OUT    router folder                                        data/runs/dpo of this repository
# To begin with a router of run_train_llm.sh add --warm_start data/runs/sft
# Environment: NUM_GPUS=auto|N  NUM_PROCESSES=N (CPU ranks over gloo)  PROFILE=auto|4gpu|rtx4060|cpu  DRY_RUN=1 (print the line only);
#              several machines: NUM_NODES, RDZV_ENDPOINT, RDZV_ID (cmd/launch.sh)
#   4gpu        DeepSpeed ZeRO-2 over the GPUs; auto takes it where there are two or more
#   rtx4060     four-bit weights and LoRA on one 8 GB card (configs/train_dpo/rtx4060.yaml); auto takes it below 12 GB
#   cpu         NUM_PROCESSES ranks of plain data parallel
# The same on one card through accelerate: accelerate launch --config rtx4060.yaml src/train_dpo.py
# Exit: 0 done, 2 bad input, 3 stopped half-way (run the same line again to go on), 4 the machine lacks something.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script=train_dpo.py
names=(data model_name output_dir)
words="DATA MODEL OUT"
paths="data model_name"
. "$ROOT/cmd/launch.sh"

read_words "$@"
has data || has config || default cache "$ROOT/data/sample"
has config || default output_dir "$ROOT/data/runs/dpo"
find_devices
profile_of_language_models train_dpo
start
