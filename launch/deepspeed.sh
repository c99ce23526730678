#!/usr/bin/env bash
# Runs a script on one node or several with DeepSpeed's launcher. Start it on one node: it reaches the others by ssh.
#
#   launch/deepspeed.sh --ranks 2 launch/train.py --config configs/zero2.json
#   launch/deepspeed.sh --hostfile hosts launch/train.py --config configs/zero2.json
#
#   --ranks N         ranks on each node (default: the slots of the hostfile, or this node's GPUs, or 1)
#   --hostfile FILE   a line a node: HOST slots=N. All need the project and its Python at the same paths, ssh without a
#                     password, and this node pdsh
#   --port N          where the ranks meet on the first node (default: 29500)
#   --interface NAME  network interface (default: as gloo and NCCL choose)
#   --dry-run         only tell what would be run, and whether the script's DeepSpeed config is there

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks="" hostfile="" port=29500 interface=""
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) need_count "${@:1:2}"; ranks=$2; shift 2 ;;
        --hostfile) need "$@"; hostfile=$2; shift 2 ;;
        --port) need_count "${@:1:2}"; port=$2; shift 2 ;;
        --interface) need "$@"; interface=$2; shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        --help | -h) usage; exit ;;
        --*) die "there is no option $1." "See $launcher --help; options of the script come after it." ;;
        *) break ;;
    esac
done
need_script "$@"
find_python
need_module deepspeed "'.[deepspeed]'"
[ -z "$interface" ] || use_interface "$interface"
set_threads

# The script gets its local rank by LOCAL_RANK, and no argument for it.
command=("$python" -m deepspeed.launcher.runner --no_local_rank --master_port "$port")
if [ -n "$hostfile" ]; then
    check_hostfile "$hostfile"
    command -v pdsh >/dev/null || die "there is no pdsh, by which DeepSpeed reaches the nodes." \
        "Install it (on Debian: apt-get install pdsh), or start $here/torchrun.sh on each node."
    command+=(--hostfile "$hostfile" --force_multi ${ranks:+--num_gpus "$ranks"})
    # DeepSpeed takes few variables along by itself; the others have to be in a file.
    if [ -z "${DS_ENV_FILE:-}" ] && [ -z "$dry_run" ]; then
        DS_ENV_FILE=$(mktemp --tmpdir adafisher_env.XXXXXX) # read after this script is gone, so it stays there
        for name in "${told[@]}"; do
            [ -z "${!name:-}" ] || echo "$name=${!name}"
        done >"$DS_ENV_FILE"
        export DS_ENV_FILE
    fi
elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ] && gpus=$(gpus_here) && [ "$gpus" -ge 1 ]; then
    # With --num_gpus DeepSpeed would start on the first GPUs of the machine, and not on these.
    ranks=${ranks:-$gpus}
    [ "$ranks" -le "$gpus" ] ||
        die "--ranks $ranks, and torch sees $gpus GPU(s): CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES." \
            "Start as many ranks as GPUs at most."
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES// /}"
    chosen=$(IFS=,; echo "${visible[*]:0:ranks}")
    [[ $chosen =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        die "CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES, and DeepSpeed's launcher knows GPUs by numbers alone." \
            "Give numbers, or start $here/torchrun.sh."
    command+=(--hostfile /dev/null --include "localhost:$chosen")
else
    # No file of nodes that lies at DeepSpeed's usual place is meant here.
    command+=(--hostfile /dev/null --num_gpus "${ranks:-$(ranks_here)}")
fi
launch "${command[@]}" "$@"
