#!/usr/bin/env bash
# Makes .venv in the project root and installs what is asked for; a second call with nothing changed is instant.
#
#   bash scripts/setup.sh              # requirements.txt
#   bash scripts/setup.sh dev          # requirements-dev.txt: also ruff, pytest and what the tests talk to
#   bash scripts/setup.sh serve        # .venv-serve, an environment of its own for vLLM (scripts/serve.sh calls it)
#   bash scripts/setup.sh serve-dev    # the same, with what tests/serve/ needs
#
# PYTHON chooses the interpreter (default python3; 3.11 or newer). SERVE_DEVICE=gpu or cpu chooses vLLM's build (default:
# gpu where nvidia-smi finds one).
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-run}
venv=.venv
case "$what" in
    run) files=(requirements.txt) ;;
    dev) files=(requirements.txt requirements-serve-dev.txt requirements-dev.txt) ;;
    serve | serve-dev)
        venv=.venv-serve
        device=${SERVE_DEVICE:-$(if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)}
        case "$device" in
            cpu) files=(requirements-serve-base.txt requirements-serve-cpu.txt) ;;
            gpu) files=(requirements-serve-base.txt requirements-serve.txt) ;;
            *) echo "error: SERVE_DEVICE is '$device'; it is gpu or cpu" >&2 && exit 2 ;;
        esac
        if [ "$what" = serve-dev ]; then files+=(requirements-serve-dev.txt); fi
        ;;
    *) echo "error: '$what' is nothing to set up; there are dev, serve and serve-dev, or nothing" >&2 && exit 2 ;;
esac

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; '$python' is $("$python" --version 2>&1 || true). Set PYTHON to another one." >&2
    exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

pip() { "$venv/bin/python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"; }

# A package that asks for what is not wanted here is named by a line "# apart: package but not: names" of a requirements
# file: it is installed without its requirements, and those without the ones whose names begin so.
install_apart() {
    local package=$1 left_out=$2 list=$venv/apart.txt
    pip install --no-deps "$package" </dev/null
    "$venv/bin/python" - "$package" $left_out >"$list" <<'PYTHON'
import re
import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

package, *left_out = sys.argv[1:]
for requirement in map(Requirement, requires(re.match(r"[\w-]+", package)[0])):
    wanted = not requirement.marker or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.lower().startswith(tuple(left_out)):
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        print(f"{requirement.name}{extras}{requirement.specifier}")
PYTHON
    # pip notes that what was left out is missing or newer; that is meant, so its words are shown only where it fails.
    if ! pip install -r "$list" </dev/null >"$venv/apart.log" 2>&1; then
        cat "$venv/apart.log" >&2
        return 1
    fi
}

# What is installed is known by the files that ask for it.
wanted=$(cat "${files[@]}" pyproject.toml scripts/setup.sh | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
stamp=$venv/installed-${files[-1]}
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "installing $(printf '%s ' "${files[@]}")into $venv (several minutes the first time)"
    requirements=()
    for file in "${files[@]}"; do requirements+=(-r "$file"); done
    pip install "${requirements[@]}"
    while IFS='|' read -r package left_out; do
        install_apart "$package" "$left_out"
    done < <(sed -n 's/^# apart: \(.*\) but not: \(.*\)/\1|\2/p' "${files[@]}")
    pip install --no-deps --editable . --config-settings editable_mode=compat
    echo "$wanted" >"$stamp"
fi
