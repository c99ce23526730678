#!/usr/bin/env bash
# Runs a script on one node or several with Open MPI's mpirun; the ranks find each other through mpi4py.
#
#   launch/mpirun.sh --ranks 2 launch/train.py --config configs/zero3.json
#   launch/mpirun.sh --ranks 16 --hostfile hosts launch/train.py --config configs/zero3.json
#
#   --ranks N         ranks on all nodes (default: the slots of the hostfile, or this node's GPUs, or 1)
#   --hostfile FILE   a line a node: HOST slots=N. All need the project and its Python at the same paths
#   --interface NAME  network interface (default: as gloo and NCCL choose)
#   --dry-run         only tell what would be run, and whether the script's DeepSpeed config is there

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks="" hostfile="" interface=""
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) need_count "${@:1:2}"; ranks=$2; shift 2 ;;
        --hostfile) need "$@"; hostfile=$2; shift 2 ;;
        --interface) need "$@"; interface=$2; shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        --help | -h) usage; exit ;;
        --*) die "there is no option $1." "See $launcher --help; options of the script come after it." ;;
        *) break ;;
    esac
done
need_script "$@"
find_python
need_module mpi4py "'.[mpi]'"
command -v mpirun >/dev/null || die "there is no mpirun." "Install Open MPI, or: $python -m pip install '.[mpi]'"
mpirun --version | grep -q "Open MPI" ||
    die "$(command -v mpirun) is not Open MPI's." "Put Open MPI's mpirun first on the path, or use $here/torchrun.sh."

command=(mpirun)
if [ -n "$hostfile" ]; then
    check_hostfile "$hostfile"
    command+=(--hostfile "$hostfile" -n "${ranks:-$slots}")
else
    command+=(-n "${ranks:-$(ranks_here)}" --oversubscribe) # more ranks than cores are slow, but meant
fi
[ -z "$interface" ] || use_interface "$interface"
[ "$(id -u)" != 0 ] || command+=(--allow-run-as-root)
set_threads
for name in PATH "${told[@]}"; do
    [ -z "${!name:-}" ] || command+=(-x "$name")
done
launch "${command[@]}" "$python" "$@"
