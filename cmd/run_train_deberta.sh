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
# Environment: NUM_GPUS=auto|N  NUM_PROCESSES=N (CPU ranks over gloo)  PROFILE=auto|4gpu|rtx4060|cpu  DRY_RUN=1 (print the line only)
# Hardware: DeBERTa-v3-base wants about 8 GB per GPU at batch 16; tiny runs in 0.6 GB on one core.
# Minutes: the bare run with tiny takes under one minute on two CPU cores.
# Exit: 0 done, 2 bad input, 3 stopped half-way (run the same line again to go on), 4 the machine lacks something.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ROOT="$HERE"
if [ -f "$HERE/cmd/env.sh" ]; then . "$HERE/cmd/env.sh"; fi
case "${1:-}" in -h|--help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac

fail() { echo "error: $2" >&2; exit "$1"; }
# A path as given from the caller's folder; else, as CoBench's users write it, from the repository.
locate() { if [ -n "$1" ] && [ ! -e "$1" ] && [ -e "$ROOT/$1" ]; then echo "$ROOT/$1"; else echo "$1"; fi; }

names=(data val model_name num_labels batch_size learning_rate epochs output_dir)
values=()
while [ $# -gt 0 ] && [ "${#values[@]}" -lt 8 ]; do
    case "$1" in --*) break ;; esac
    values+=("$1"); shift
done
[ $# -eq 0 ] || case "$1" in --*) ;; *) fail 2 "'$1' is a ninth positional; eight are known: DATA VAL MODEL NUM_LABELS BATCH LR EPOCHS OUT" ;; esac

for word in "$@"; do case "$word" in -h|--help) exec "$(command -v python || command -v python3)" "$ROOT/src/train_deberta.py" --help ;; esac; done
given=" $(printf '%s ' "$@" | tr '-' '_')"
flags=()
for i in "${!values[@]}"; do
    value="${values[$i]}"
    [ -n "$value" ] || continue
    case "${names[$i]}" in data|val|model_name) value="$(locate "$value")" ;; esac
    flags+=("--${names[$i]}" "$value")
done
has() { case " ${flags[*]-} " in *" --$1 "*) return 0 ;; esac; case "$given" in *" __$1 "*|*" __$1="*) return 0 ;; esac; return 1; }
if ! has data && ! has cache && ! has config; then flags+=(--data "$ROOT/data/sample_data.jsonl"); fi
if ! has output_dir && ! has config; then flags+=(--output_dir "$ROOT/data/runs/deberta_checkpoints"); fi

# Hardware: GPUs are counted without importing torch.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        if [ -z "$CUDA_VISIBLE_DEVICES" ] || [ "$CUDA_VISIBLE_DEVICES" = "-1" ]; then echo 0; else tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .; fi
    elif command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else echo 0; fi
}
profile="${PROFILE:-auto}"
gpus="${NUM_GPUS:-auto}"
found="$(visible_gpus)"
case "$profile" in
    auto) ;;
    4gpu) [ "$gpus" != auto ] || gpus=4 ;;
    rtx4060) [ "$gpus" != auto ] || gpus=1
             # 8 GB: half the rows at a time, the same rows per update.
             has batch_size || flags+=(--batch_size 8); has global_batch_size || flags+=(--global_batch_size 16) ;;
    cpu) gpus=0; export CUDA_VISIBLE_DEVICES="" ;;
    *) fail 2 "PROFILE=$profile is not one of auto, 4gpu, rtx4060, cpu" ;;
esac
[ "$gpus" != auto ] || gpus="$found"
case "$gpus" in ''|*[!0-9]*) fail 2 "NUM_GPUS=$gpus is neither auto nor a number" ;; esac
if [ "$gpus" -gt "$found" ] && [ -z "${DRY_RUN:-}" ]; then
    fail 4 "$gpus GPUs are asked for (PROFILE=$profile, NUM_GPUS=${NUM_GPUS:-auto}) but $found are visible; use NUM_GPUS=auto or PROFILE=cpu"
fi
cores="$(nproc 2>/dev/null || echo 1)"
if [ "$gpus" -gt 0 ]; then ranks="$gpus"; else
    ranks="${NUM_PROCESSES:-1}"
    case "$ranks" in ''|0|*[!0-9]*) fail 2 "NUM_PROCESSES=$ranks is no number above 0" ;; esac
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores / ranks > 0 ? cores / ranks : 1 ))}"

# `--` keeps torchrun from reading the script's flags as abbreviations of its own.
line=(--standalone "--nproc_per_node=$ranks" -- "$ROOT/src/train_deberta.py" "${flags[@]}" "$@")
if [ -n "${DRY_RUN:-}" ] && [ "$DRY_RUN" != 0 ]; then printf 'torchrun'; printf ' %q' "${line[@]}"; printf '\n'; exit 0; fi

python="$(command -v python || command -v python3)"
# One process checks options, rows and weights first: a mistake shows once, at once, with its own exit code.
log="$(mktemp)"
check=(); has check_only || check=(--check_only true)
WORLD_SIZE="$ranks" "$python" "$ROOT/src/train_deberta.py" "${flags[@]}" "$@" "${check[@]}" 2>"$log" || {
    code=$?; cat "$log" >&2; rm -f "$log"; exit "$code"; }
if has check_only; then cat "$log" >&2; rm -f "$log"; exit 0; fi
rm -f "$log"

# torchrun itself, ending with the exit code of the rank that failed first.
PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m routewright.torchrun "${line[@]}"
