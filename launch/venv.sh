#!/usr/bin/env bash
# Creates .venv, or brings it up to date, with the versions of constraints.txt and this project in it. For `make venv`.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ]; then
    echo "make venv: no python3 found. On Debian: apt-get install python3.11 python3.11-venv" >&2
    exit 1
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "make venv: $python is Python $version, and the pinned versions need 3.11 or later. Set PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "make venv: $python has no venv or ensurepip. On Debian: apt-get install python$version-venv" >&2
    exit 1
fi

if .venv/bin/python -m pip --version >/dev/null 2>&1 &&
    [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ]; then
    echo "make venv: bringing .venv up to date"
else
    echo "make venv: creating .venv with Python $version (a few minutes the first time)"
    "$python" -m venv --clear .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { .venv/bin/python -m pip install -qq --constraint constraints.txt "$@"; }

# The default torch wheel for Linux brings gigabytes of CUDA. Where there is no GPU, take the CPU build: from the configured
# index if it has one, else from torch's own. If neither answers, the default wheel works too.
torch=$(grep '^torch==' constraints.txt)
if ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidia0 ]; then
    echo "make venv: [1/3] $torch for the CPU"
    install "$torch+cpu" 2>/dev/null ||
        .venv/bin/python -m pip install -qq --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu "$torch+cpu" 2>/dev/null ||
        echo "make venv: no CPU build to be had; taking the default one, which is large"
fi
echo "make venv: [2/3] $torch and its dependencies"
install "$torch"
echo "make venv: [3/3] DeepSpeed, the tools and this project"
install --editable '.[dev]'
# By itself: torchtitan asks for datasets before 4.8, which it needs for text that the tests do not read.
install --no-deps torchtitan
echo "make venv: done"
