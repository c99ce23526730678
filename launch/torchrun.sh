#!/usr/bin/env bash
# Runs a script on one node or several with torchrun. On several nodes, start it on each, with the same words.
#
#   launch/torchrun.sh --ranks 2 launch/train.py --config configs/zero2.json
#   launch/torchrun.sh --nodes 2 --host node1 launch/train.py --config configs/zero2.json
#   launch/torchrun.sh --nodes 1:3 --host node1 --restarts 3 launch/train.py --restartable --save-every 100 --out runs/a \
#       --global-batch 48
#
#   --nodes N         nodes, or MIN:MAX to go on with fewer after a loss, and with more when they come (default: 1). The
#                     script's batch has to be shared out equally to any number of them
#   --ranks N         ranks on this node (default: as many as GPUs, or 1)
#   --host HOST[:P]   the node where all meet, by name or address, and its port (29500); needed for several nodes.
#                     If this one is lost, so is the run: choose a node that stays
#   --id NAME         of the job, the same on all nodes (default: adafisher)
#   --interface NAME  network interface (default: the one that leads to HOST)
#   --wait SECONDS    with MIN:MAX, for more nodes once MIN are there (default: 15)
#   --restarts N      how often all ranks are started again after one has failed (default: 0). The script has to go on from
#                     its last checkpoint then, as launch/train.py does with --restartable
#   --dry-run         only tell what would be run, and whether the script's DeepSpeed config is there

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nodes=1 ranks="" host="" id=adafisher interface="" restarts=0 wait=15
while [ $# -gt 0 ]; do
    case $1 in
        --nodes) need "$@"; nodes=$2; shift 2 ;;
        --ranks) need_count "${@:1:2}"; ranks=$2; shift 2 ;;
        --host) need "$@"; host=$2; shift 2 ;;
        --id) need "$@"; id=$2; shift 2 ;;
        --interface) need "$@"; interface=$2; shift 2 ;;
        --wait) need_count "${@:1:2}"; wait=$2; shift 2 ;;
        --restarts) need "$@"; restarts=$2; shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        --help | -h) usage; exit ;;
        --*) die "there is no option $1." "See $launcher --help; options of the script come after it." ;;
        *) break ;;
    esac
done
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] && [ "${nodes%:*}" -le "${nodes#*:}" ] ||
    die "--nodes should be N or MIN:MAX, and is '$nodes'." "As in --nodes 2, or --nodes 1:3."
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts should be a whole number, and is '$restarts'." "As in --restarts 3."
need_script "$@"
find_python

command=("$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${ranks:-$(ranks_here)}" --max-restarts "$restarts")
if [ "$nodes" = 1 ] && [ -z "$host" ]; then
    command+=(--standalone)
else
    [ -n "$host" ] || die "--nodes $nodes needs --host." "Name the node where all meet, as in --host node1."
    [[ $host =~ :[0-9]+$ && ! $host =~ :.*: ]] && port=${host##*:} host=${host%:*} || port=29500
    need_module psutil psutil
    place=$("$python" "$here/network.py" "$host" "$port") ||
        die "--host $host is of no use." "Give a name or an address that all nodes know, of a network that they share."
    read -r is_host address found <<<"$place"
    use_interface "${interface:-$found}"
    # By itself torchrun often finds neither which node is the host nor an address that the others can reach.
    command+=(
        --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "$id" --local-addr "$address"
        --rdzv-conf "is_host=$is_host,last_call_timeout=$wait"
    )
fi
# Otherwise ranks that start again meet in the store of those before, whose addresses are still in it: one that is there
# before the others connects to processes that are gone, and fails (torch 2.13; tests/test_launchers.py).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch "${command[@]}" "$@"
