# shellcheck shell=bash disable=SC2154
# What the run_train_*.sh launchers share; sourced by them, after they have set ROOT and named
#   script       the training script, under src/
#   names        the options its positionals stand for, in their order, and words, how its users know them
#   paths        those of them that are paths ("auto" and hub ids pass as they are)
# Then: read_words "$@"; defaults of the launcher's own; find_devices; start.
#
# Environment, the same for all of them:
#   PROFILE        auto | 4gpu | rtx4060 | cpu       auto: rtx4060 where the one GPU has less than 12 GB
#   NUM_GPUS       auto | N                          how many of the visible GPUs
#   NUM_PROCESSES  N                                 ranks over gloo, where no GPU is used
#   DRY_RUN        1                                 print the torchrun line and stop
#   NUM_NODES, RDZV_ENDPOINT=HOST:PORT, RDZV_ID      several machines: the same line on each (see cmd/cluster/)
# Exit: 0 done, 2 bad input, 3 stopped half-way (run the same line again to go on), 4 the machine lacks something.

. "$ROOT/cmd/env.sh"

nth=(first second third fourth fifth sixth seventh eighth ninth)
count=(none one two three four five six seven eight)
fail() { echo "error: $2" >&2; exit "$1"; }
# A path as given from the caller's folder; else, as CoBench's users write it, from the repository.
locate() { if [ -n "$1" ] && [ ! -e "$1" ] && [ -e "$ROOT/$1" ]; then echo "$ROOT/$1"; else echo "$1"; fi; }
# The launcher's own head comment.
show_help() { sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$1"; }

# Sets flags (options with their values) from the positionals, and rest (the words from the first --flag on).
read_words() {
    case "${1:-}" in -h|--help) show_help "$0"; exit 0 ;; esac
    local values=() i value word
    while [ $# -gt 0 ] && [ "${#values[@]}" -lt "${#names[@]}" ]; do
        case "$1" in --*) break ;; esac
        values+=("$1"); shift
    done
    case "${1:---}" in --*) ;; *) fail 2 "'$1' is a ${nth[${#names[@]}]} positional; ${count[${#names[@]}]} are known: $words" ;; esac
    for word in "$@"; do case "$word" in -h|--help) exec "$(command -v python || command -v python3)" "$ROOT/src/$script" --help ;; esac; done
    rest=("$@")
    given=" $(printf '%s ' "$@" | tr '-' '_')"
    flags=()
    for i in "${!values[@]}"; do
        value="${values[$i]}"
        [ -n "$value" ] || continue
        case " $paths " in *" ${names[$i]} "*) value="$(locate "$value")" ;; esac
        flags+=("--${names[$i]}" "$value")
    done
}

# Whether an option was given, as a positional or as a flag.
has() { case " ${flags[*]-} " in *" --$1 "*) return 0 ;; esac; case "$given" in *" __$1 "*|*" __$1="*) return 0 ;; esac; return 1; }
# An option of the launcher's own, where the user gave none.
default() { has "$1" || flags+=("--$1" "$2"); }

# GPUs are asked of the driver, without importing torch.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        if [ -z "$CUDA_VISIBLE_DEVICES" ] || [ "$CUDA_VISIBLE_DEVICES" = "-1" ]; then echo 0; else tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .; fi
    elif command -v nvidia-smi >/dev/null 2>&1; then nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else echo 0; fi
}
# MiB of the smallest visible GPU; empty where nobody knows.
gpu_memory() {
    nvidia-smi ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"} --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
        grep -E '^ *[0-9]+ *$' | sort -n | head -1 | tr -d ' ' || true
}

# Sets profile (4gpu, rtx4060, cpu, or auto where a plain run on what is there is meant) and ranks.
find_devices() {
    local gpus="${NUM_GPUS:-auto}" found memory cores
    profile="${PROFILE:-auto}"
    found="$(visible_gpus)"
    case "$profile" in
        auto) ;;
        4gpu) [ "$gpus" != auto ] || gpus=4 ;;
        rtx4060) [ "$gpus" != auto ] || gpus=1 ;;
        cpu) gpus=0; export CUDA_VISIBLE_DEVICES="" ;;
        *) fail 2 "PROFILE=$profile is not one of auto, 4gpu, rtx4060, cpu" ;;
    esac
    [ "$gpus" != auto ] || gpus="$found"
    case "$gpus" in ''|*[!0-9]*) fail 2 "NUM_GPUS=$gpus is neither auto nor a number" ;; esac
    if [ "$gpus" -gt "$found" ] && ! dry; then
        fail 4 "PROFILE=$profile with NUM_GPUS=${NUM_GPUS:-auto} asks for $gpus GPU(s) but $found are visible; use PROFILE=auto with NUM_GPUS=auto, or PROFILE=cpu"
    fi
    if [ "$profile" = auto ] && [ "$gpus" = 1 ]; then
        memory="$(gpu_memory)"
        if [ -n "$memory" ] && [ "$memory" -lt 12000 ]; then
            profile=rtx4060
            echo "one GPU of $memory MiB: PROFILE=rtx4060" >&2
        fi
    fi
    cores="$(nproc 2>/dev/null || echo 1)"
    if [ "$gpus" -gt 0 ]; then ranks="$gpus"; else
        ranks="${NUM_PROCESSES:-1}"
        case "$ranks" in ''|0|*[!0-9]*) fail 2 "NUM_PROCESSES=$ranks is no number above 0" ;; esac
    fi
    [ "$profile" != auto ] || [ "$gpus" -lt 2 ] || profile=4gpu
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores / ranks > 0 ? cores / ranks : 1 ))}"
}

# The settings a profile stands for, for trainers of language models; what the user gave himself wins.
#   $1  the folder of the trainer's settings, configs/$1
profile_of_language_models() {
    case "$profile" in
        rtx4060) default config "$ROOT/configs/$1/rtx4060.yaml" ;;
        4gpu) default trainer.deepspeed "$ROOT/accelerate_configs/deepspeed_zero2.json" ;;
    esac
}

dry() { [ -n "${DRY_RUN:-}" ] && [ "$DRY_RUN" != 0 ]; }

# Checks in one process, then becomes torchrun.
start() {
    local nodes="${NUM_NODES:-1}" meet=(--standalone) options line python log check=() code
    case "$nodes" in ''|0|*[!0-9]*) fail 2 "NUM_NODES=$nodes is no number above 0" ;; esac
    if [ "$nodes" -gt 1 ]; then
        [ -n "${RDZV_ENDPOINT:-}" ] || fail 2 "NUM_NODES=$nodes needs RDZV_ENDPOINT=HOST:PORT, the same on every machine"
        meet=("--nnodes=$nodes" --rdzv_backend=c10d "--rdzv_endpoint=$RDZV_ENDPOINT" "--rdzv_id=${RDZV_ID:-routewright}")
    fi
    options=(${flags[@]+"${flags[@]}"} ${rest[@]+"${rest[@]}"})  # empty lists are errors to bash before 4.4
    # `--` keeps torchrun from reading the script's flags as abbreviations of its own.
    line=("${meet[@]}" "--nproc_per_node=$ranks" -- "$ROOT/src/$script" ${options[@]+"${options[@]}"})
    if dry; then printf 'torchrun'; printf ' %q' "${line[@]}"; printf '\n'; exit 0; fi

    python="$(command -v python || command -v python3)"
    # A mistake shows once, at once, with its own exit code.
    log="$(mktemp)"
    has check_only || check=(--check_only true)
    WORLD_SIZE="$(( nodes * ranks ))" "$python" "${line[@]:${#meet[@]}+2}" ${check[@]+"${check[@]}"} 2>"$log" || {
        code=$?; cat "$log" >&2; rm -f "$log"; exit "$code"; }
    if has check_only; then cat "$log" >&2; rm -f "$log"; exit 0; fi
    rm -f "$log"

    # torchrun itself, ending with the exit code of the rank that failed first.
    PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m routewright.torchrun "${line[@]}"
}
