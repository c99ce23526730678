#!/usr/bin/env bash
# Fills .gpu/wheels with the Python packages that the GPU machine lacks (it reaches no network). For `make gpu-wheels`.
# It has Python 3.12, torch, numpy and what else DeepSpeed needs (einops, msgpack, ninja, packaging, psutil,
# py-cpuinfo, tqdm); `make gpu` installs these wheels there, in a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=.gpu/wheels
largest_mb=40
packages=(hjson pydantic pydantic_core annotated-types typing-inspection typing_extensions pytorch_optimizer)
python=${PYTHON:-.venv/bin/python}
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done

pinned() { # pinned NAME: NAME==VERSION, as constraints.txt has it
    grep -i "^$1==" constraints.txt || {
        echo "make gpu-wheels: constraints.txt has no version of $1" >&2
        exit 1
    }
}

rm -rf "$folder"
mkdir -p "$folder"
export PIP_DISABLE_PIP_VERSION_CHECK=1
wanted=()
for package in "${packages[@]}"; do
    wanted+=("$(pinned "$package")")
done
# DeepSpeed is published as source. Without its CUDA extensions it is a wheel of Python alone, right for any machine.
deepspeed=$(pinned deepspeed)
DS_BUILD_OPS=0 "$python" -m pip wheel -qq --no-deps --wheel-dir "$folder" "$deepspeed"
"$python" -m pip download -qq --no-deps --only-binary :all: --implementation cp --python-version 3.12 "${platforms[@]}" \
    --dest "$folder" "${wanted[@]}"

wrong=$(find "$folder" -type f ! -name '*-none-any.whl' ! -name '*-cp312-cp312-*x86_64.whl' ! -name '*-abi3-*x86_64.whl')
if [ -n "$wrong" ]; then
    echo "make gpu-wheels: no wheel for CPython 3.12 on x86-64: $wrong" >&2
    exit 1
fi
bytes=$(cat "$folder"/* | wc -c)
ls -l "$folder" | awk 'NR > 1 { printf "%8.2f MB  %s\n", $5 / 1e6, $9 }'
printf '%8.2f MB  in %s\n' "$(awk "BEGIN { print $bytes / 1e6 }")" "$folder"
if [ "$bytes" -gt $((largest_mb * 1000000)) ]; then
    echo "make gpu-wheels: more than the $largest_mb MB that travel to the GPU machine" >&2
    exit 1
fi
