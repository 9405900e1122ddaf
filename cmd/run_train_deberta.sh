#!/usr/bin/env bash
# Trains a DeBERTa router with torchrun, on 4 GPUs, one GPU or a CPU, from wherever it is called.
#
#   ./cmd/run_train_deberta.sh                                   bare: the shipped sample rows
#   ./cmd/run_train_deberta.sh DATA VAL MODEL NUM_LABELS BATCH LR EPOCHS OUT [--flags of src/train_deberta.py]
#   ./cmd/run_train_deberta.sh --cache data/sample --model_name tiny --learning_rate 1e-3 --epochs 8
#
# Positionals, in this order, "" or left out for the default:
#   DATA        JSONL rows of question, llm_id, label           data/sample_data.jsonl of this repository
#   VAL         rows to validate on                             "": a tenth of DATA, held out by near-duplicate group
#   MODEL       folder, hub id, or tiny                         microsoft/deberta-v3-base; only where its weights cannot be had and
#                                                               no MODEL was named: tiny, with a warning
#   NUM_LABELS  classes of label                                2
#   BATCH       rows per device                                 16
#   LR          peak learning rate                              2e-5
#   EPOCHS                                                      3
#   OUT         router folder                                   data/runs/deberta_checkpoints of this repository
# Environment: NUM_GPUS=auto|N  NUM_PROCESSES=N (CPU ranks over gloo)  PROFILE=auto|4gpu|rtx4060|cpu  DRY_RUN=1 (print the line only);
#              several machines: NUM_NODES, RDZV_ENDPOINT, RDZV_ID (cmd/launch.sh)
# Hardware: DeBERTa-v3-base wants about 8 GB per GPU at batch 16; tiny runs in 0.6 GB on one core.
# Minutes: the bare run with tiny takes under one minute on two CPU cores.
# Exit: 0 done, 2 bad input, 3 stopped half-way (run the same line again to go on), 4 the machine lacks something.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script=train_deberta.py
names=(data val model_name num_labels batch_size learning_rate epochs output_dir)
words="DATA VAL MODEL NUM_LABELS BATCH LR EPOCHS OUT"
paths="data val model_name"
. "$ROOT/cmd/launch.sh"

read_words "$@"
has cache || has config || default data "$ROOT/data/sample_data.jsonl"
has config || default output_dir "$ROOT/data/runs/deberta_checkpoints"
find_devices
# 8 GB: half the rows at a time, the same rows per update. Several GPUs: plain data parallel is right for an encoder.
if [ "$profile" = rtx4060 ]; then
    has batch_size || flags+=(--batch_size 8)
    has global_batch_size || flags+=(--global_batch_size 16)
fi
start
