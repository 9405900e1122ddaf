#!/usr/bin/env bash
# Makes the project ready: creates or reuses .venv and installs requirements.txt. Idempotent; needs no key.
# An active environment (VIRTUAL_ENV) is used as it is and topped up. `--tests` adds what the tests need.
# In the project's own .venv, and only there, `accelerate` becomes a pointer to cmd/bin/accelerate, which says why.
# Takes 2 to 5 minutes and 2.2 GB (CPU build of torch) the first time, a second afterwards.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd -P)"
cd "$ROOT"

files=(requirements.txt)
for word in "$@"; do
    case "$word" in
        --tests) files+=(tests/requirements.txt) ;;
        *) echo "setup.sh: unknown option $word; only --tests is known" >&2; exit 2 ;;
    esac
done

venv="${VIRTUAL_ENV:-$ROOT/.venv}"
if [ ! -x "$venv/bin/python" ]; then
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup.sh: Python 3.11 or newer is needed, $python is $("$python" -V 2>&1); set PYTHON=/path/to/python3.11" >&2
        exit 4
    fi
    echo "creating $venv"
    "$python" -m venv "$venv"
fi

# The stamp holds what was installed: an unchanged list costs nothing.
wanted="$(cat "${files[@]}" | sha256sum | cut -c1-16)"
stamp="$venv/.routewright-$(IFS=+; echo "${files[*]}" | tr '/' '_')"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing ${files[*]} into $venv (a few minutes the first time)"
    # torch first: with it in place nothing else can pull another build.
    torch="$(grep -E '^torch==' requirements.txt)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" 2>&1 | { grep -v "is ignored: it is neither" || true; }
    arguments=()
    for file in "${files[@]}"; do arguments+=(-r "$file"); done
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" 2>&1 | { grep -v "is ignored: it is neither" || true; }
    echo "$wanted" > "$stamp"
fi

# pip writes the library's own again whenever it installs accelerate, so this is looked at in every call.
if [ "$(cd "$venv" && pwd -P)" = "$ROOT/.venv" ] && ! grep -qsF "$ROOT/cmd/bin/accelerate" "$venv/bin/accelerate"; then
    echo "writing $venv/bin/accelerate: it also takes --config rtx4060.yaml before the script (see cmd/bin/accelerate)"
    printf '#!/bin/sh\n# Written by cmd/setup.sh.\nexec "%s" "%s" "$@"\n' "$venv/bin/python" "$ROOT/cmd/bin/accelerate" \
        > "$venv/bin/accelerate.new"
    chmod +x "$venv/bin/accelerate.new"
    mv "$venv/bin/accelerate.new" "$venv/bin/accelerate"
fi
