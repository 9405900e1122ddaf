#!/usr/bin/env bash
# Trains a language model as a router (supervised) with torchrun, on 4 GPUs, one GPU or a CPU, from wherever it is called.
#
#   ./cmd/run_train_llm.sh                                       bare: the shipped sample rows
#   ./cmd/run_train_llm.sh DATA MODEL OUT BATCH GLOBAL_BATCH LR EPOCHS MAXLEN [--flags of src/train_llm.py]
#   ./cmd/run_train_llm.sh --data data/sets/mine/alpaca_train.jsonl --model_name Qwen/Qwen2.5-0.5B --lora_r 16
#
# Positionals, in this order, "" or left out for the default:
#   DATA          Alpaca rows, JSONL of instruction, response   data/sample_alpaca_data.jsonl of this repository
#   MODEL         folder or hub id                              Qwen/Qwen2.5-0.5B; only where its weights cannot be had and no
#                                                               MODEL was named: the sample pool's strong model, with a warning
#   OUT           router folder                                 data/runs/sft of this repository
#   BATCH         rows per device and step                      4
#   GLOBAL_BATCH  rows per update, over devices and steps       64
#   LR            peak learning rate                            2e-5, and 2e-4 for LoRA
#   EPOCHS                                                      3
#   MAXLEN        tokens of a row, answer included              512
# Environment: NUM_GPUS=auto|N  NUM_PROCESSES=N (CPU ranks over gloo)  PROFILE=auto|4gpu|rtx4060|cpu  DRY_RUN=1 (print the line only);
#              several machines: NUM_NODES, RDZV_ENDPOINT, RDZV_ID (cmd/launch.sh)
#   4gpu        DeepSpeed ZeRO-2 over the GPUs; auto takes it where there are two or more
#   rtx4060     four-bit weights and LoRA on one 8 GB card (configs/train_llm/rtx4060.yaml); auto takes it below 12 GB
#   cpu         NUM_PROCESSES ranks of plain data parallel
# Exit: 0 done, 2 bad input, 3 stopped half-way (run the same line again to go on), 4 the machine lacks something.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script=train_llm.py
names=(data model_name output_dir batch_size global_batch_size learning_rate epochs max_length)
words="DATA MODEL OUT BATCH GLOBAL_BATCH LR EPOCHS MAXLEN"
paths="data model_name"
. "$ROOT/cmd/launch.sh"

read_words "$@"
if ! has data && ! has config; then
    default data "$ROOT/data/sample_alpaca_data.jsonl"
    default cache "$ROOT/data/sample"  # its card says data/sample, which is so in the repository's root only
fi
has config || default output_dir "$ROOT/data/runs/sft"
find_devices
profile_of_language_models train_llm
start
