# shellcheck shell=bash
# What the launchers share; each sources it first. It finds Python, sets what every rank needs, and tells what is run.
set -euo pipefail

# What is told of the environment, and taken along to other nodes.
told=(
    OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME DS_ACCELERATOR TORCH_DEVICE_BACKEND_AUTOLOAD
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE TORCH_EXTENSIONS_DIR ADAFISHER_KERNEL
)
# The folder of the launchers.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launcher=$(basename "${BASH_SOURCE[-1]}")
dry_run=""

# Prints the comment at the top of the launcher.
usage() {
    awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "${BASH_SOURCE[-1]}"
}

# die WHAT REMEDY
die() {
    echo "$launcher: $1" >&2
    echo "$launcher: $2" >&2
    exit 2
}

# need NAME VALUE…: an option has its value.
need() {
    [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value." "See $launcher --help."
}

# need_count NAME VALUE: it is a whole number, at least 1.
need_count() {
    need "$@"
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1 should be a whole number, at least 1, and is '$2'." "See $launcher --help."
}

# The Python that has this project: $PYTHON, an active environment (a venv or conda's), the project's own .venv, or the
# first on the path.
# Its folder goes to the front of the path, for torchrun, deepspeed and mpirun.
find_python() {
    local found=${PYTHON:-} active=${VIRTUAL_ENV:-} candidate
    # Conda's base is active wherever conda is: nobody has chosen it.
    [ -n "$active" ] || [ "${CONDA_DEFAULT_ENV:-base}" = base ] || active=${CONDA_PREFIX:-}
    local candidates=(${active:+"$active/bin/python"} "$(dirname "$here")/.venv/bin/python" "$(command -v python3 || true)")
    for candidate in "${candidates[@]}"; do
        [ -n "$found" ] || ! [ -x "$candidate" ] || found=$candidate
    done
    [ -n "$found" ] || die "no python3 found." "Install Python 3.10 or later, or set PYTHON=/path/to/python."
    python=$(command -v "$found") || die "PYTHON is $found, and there is no such program." "Set PYTHON=/path/to/python."
    PATH="$(cd "$(dirname "$python")" && pwd):$PATH"
    export PATH
    need_module torch "'.[train]'"
    need_module adafisher_dist "'.[train]'"
}

# need_module NAME WHAT: this Python can find a module; WHAT to install for it.
need_module() {
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" ||
        die "$python has no module $1." "Install it: $python -m pip install $2"
}

# need_script SCRIPT…: what is to be run is there.
need_script() {
    [ $# -ge 1 ] || die "there is no script to run." "Give one, as in: $launcher launch/train.py --config configs/zero2.json"
    [ -f "$1" ] || die "$1: no such file in $(pwd)." "Give the script's path from there, or the whole path."
}

# check_config ARGUMENT…: a DeepSpeed config that the script is given is there.
check_config() {
    local before="" word
    for word in "$@"; do
        case $word in
            --config=* | --deepspeed=* | --deepspeed_config=*) before=${word%%=*} word=${word#*=} ;;
        esac
        case $before in
            --config | --deepspeed | --deepspeed_config)
                [[ $word != *.json ]] || [ -f "$word" ] ||
                    die "$before $word: no such file in $(pwd)." "Give the DeepSpeed config's path from there, or the whole path."
                ;;
        esac
        before=$word
    done
}

# GPUs that torch sees here: with CUDA_VISIBLE_DEVICES those alone.
gpus_here() {
    "$python" -c 'import torch; print(torch.accelerator.device_count())'
}

# Ranks for this machine, if not told: as many as GPUs, or one.
ranks_here() {
    local gpus
    gpus=$(gpus_here)
    [ "$gpus" -ge 1 ] && echo "$gpus" || echo 1
}

# use_interface NAME: what gloo and NCCL talk over, unless the user has chosen.
use_interface() {
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$1} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$1}
}

# check_hostfile FILE: it has lines of the form HOST slots=N, and sets $slots to their sum.
check_hostfile() {
    [ -f "$1" ] || die "--hostfile $1: no such file." "Write one, with a line a node: HOST slots=N"
    local line
    slots=0
    while read -r line || [ -n "$line" ]; do
        line=${line%%#*}
        [[ $line =~ [^[:space:]] ]] || continue
        [[ $line =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
            die "--hostfile $1 has the line '$line'." "Each line should be HOST slots=N, as in: node1 slots=8"
        slots=$((slots + BASH_REMATCH[1]))
    done <"$1"
    [ "$slots" -ge 1 ] || die "--hostfile $1 names no node." "Write a line a node: HOST slots=N"
}

# More threads than cores a rank make every rank slower, and libraries start as many as there are cores.
set_threads() {
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# Tells of a lock that a killed compilation of DeepSpeed's has left: on CPUs it would wait for it without a word, for ever.
tell_of_locks() {
    local root=${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/torch_extensions} lock
    for lock in "$root"/deepspeed_shm_comm/lock "$root"/*/deepspeed_shm_comm/lock; do
        if [ -n "$(find "$lock" -mmin +15 2>/dev/null)" ]; then
            echo "$launcher: $lock is older than 15 minutes. On CPUs deepspeed.init_distributed waits for as long as it is there;" \
                "a compilation that was killed has left it. If no other is going on, remove it: rm $lock" >&2
        fi
    done
}

# Tells the command and what is in its environment, and becomes it, or only tells with --dry-run.
launch() {
    set_threads
    tell_of_locks
    [ -z "$dry_run" ] || check_config "$@"
    local name
    {
        printf '%s:' "$launcher"
        for name in "${told[@]}"; do
            if [ -n "${!name:-}" ]; then printf ' %s=%q' "$name" "${!name}"; fi
        done
        printf ' %q' "$@"
        printf '\n'
    } >&2
    [ -n "$dry_run" ] || exec "$@"
}
