# shellcheck shell=bash
# Sourced by every launcher, and by you (`. cmd/env.sh`) for a shell in which `python`, `torchrun` and `accelerate`
# are the project's own. Sets ROOT, finds the virtual environment, and exports what the libraries need to behave.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
export ROOT

# An environment that is active already is used as it is (cmd/setup.sh tops it up); else the project's .venv.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$ROOT/.venv/bin/activate" ]; then
    . "$ROOT/.venv/bin/activate"
fi

# `accelerate launch --config rtx4060.yaml ...` as people type it: cmd/bin/accelerate stands before the library's own.
case "$PATH" in "$ROOT/cmd/bin:"*) ;; *) export PATH="$ROOT/cmd/bin:$PATH" ;; esac

# Waiting OpenMP threads sleep instead of spinning, which makes a busy machine many times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# A restarted worker must not meet the store of the job before it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# litellm: no price list from the network at import, no .env read behind our back.
export LITELLM_LOCAL_MODEL_COST_MAP="${LITELLM_LOCAL_MODEL_COST_MAP:-True}"
export LITELLM_MODE="${LITELLM_MODE:-PRODUCTION}"
# W&B without a key records locally instead of stopping.
if [ -z "${WANDB_MODE:-}" ] && [ -z "${WANDB_API_KEY:-}" ] && ! grep -qs "api.wandb.ai" "$HOME/.netrc"; then
    export WANDB_MODE=offline
fi
