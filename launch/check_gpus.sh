#!/usr/bin/env bash
# Checks on all GPUs of this machine that AdaFisher is right there, in some minutes, and prints what to report. It runs
# benchmarks/gpu/correct.py with torchrun, a rank a GPU; for one GPU, --ranks 1.
#
#   launch/check_gpus.sh
#   launch/check_gpus.sh --ranks 2 --out runs/check
#   launch/check_gpus.sh --rehearse --ranks 2        # on CPUs, which says whether the checks themselves work
#
#   --ranks N         ranks, as many as GPUs at most (default: as many as GPUs; in a rehearsal 2)
#   --out FOLDER      for correct.json (default: runs/check_gpus, in a rehearsal runs/check_gpus-rehearsal)
#   --only NAMES      some checks, by names that may have wildcards, in one word: --only 'comm zero1-*'
#   --rehearse        on CPUs, with gloo in place of NCCL
#   --dry-run         only tell what would be run

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ranks="" out="" only=() rehearse=""
while [ $# -gt 0 ]; do
    case $1 in
        --ranks) need_count "${@:1:2}"; ranks=$2; shift 2 ;;
        --out) need "$@"; out=$2; shift 2 ;;
        --only) need "$@"; read -ra only <<<"$2"; shift 2 ;;
        --rehearse) rehearse=yes; shift ;;
        --dry-run) dry_run=yes; shift ;;
        --help | -h) usage; exit ;;
        *) die "there is no option $1." "See $launcher --help." ;;
    esac
done
find_python
for module in pytest hypothesis; do need_module "$module" "pytest hypothesis"; done

if [ -z "$rehearse" ]; then
    gpus=$(gpus_here)
    [ "$gpus" -ge 1 ] || die "torch sees no GPU here." \
        "Run this where there are some, with a CUDA build of torch; or try the checks on CPUs with --rehearse."
    ranks=${ranks:-$gpus}
    [ "$ranks" -le "$gpus" ] || die "--ranks $ranks, and torch sees $gpus GPU(s)." "Start as many ranks as GPUs at most."
else
    ranks=${ranks:-2}
fi
out=${out:-$(dirname "$here")/runs/check_gpus${rehearse:+-rehearsal}}

script=$(dirname "$here")/benchmarks/gpu/correct.py
command=("$python" -m torch.distributed.run --nnodes 1 --nproc-per-node "$ranks" --standalone "$script" --out "$out")
[ -z "$rehearse" ] || command+=(--rehearse)
[ ${#only[@]} -eq 0 ] || command+=(--only "${only[@]}")
export PART_SECONDS=${PART_SECONDS:-1800}
[ -n "$dry_run" ] || rm -f "$out/correct.json"
# In a shell of its own, which it becomes: this one goes on to tell what was found.
status=0
(launch "${command[@]}") || status=$?
[ -z "$dry_run" ] || exit "$status"
"$python" "$script" --show "$out/correct.json" || status=1
exit "$status"
