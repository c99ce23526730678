"""The launchers of launch/: what they run, how they refuse, and real trainings on one machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
BASH = (LAUNCH / "torchrun.sh", LAUNCH / "mpirun.sh", LAUNCH / "deepspeed.sh")
BIN = Path(sys.executable).parent
TINY = "--steps 8 --width 16 --layers 1 --heads 2 --seq-len 16 --corpus-mb 0.2 --held-out 32 --global-batch 12"


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without what this process's launcher may have left in the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP", "GLOO", "NCCL"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"):
        kept.pop(name, None)
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, cwd=cwd, env={**kept, "PYTHON": sys.executable, **environment}, timeout=240,
    )  # fmt: skip


def told(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The command that a launcher told, without its name."""
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stderr.strip().splitlines()[-1])[1:]


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder for programs that stand in for those of a cluster."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    return folder


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here; the extra `dev` brings one")
    done = call(shellcheck, "-x", *sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("launcher", BASH, ids=lambda path: path.name)
def test_help_tells_every_option(launcher: Path) -> None:
    text = call(launcher, "--help").stdout
    options = {
        line.split(")")[0].strip()
        for line in launcher.read_text().splitlines()
        if line.startswith("        --") and ";;" in line
    }
    options -= {"--help | -h", "--*"}
    assert len(options) >= 4 and all(f"  {option} " in text for option in options)
    assert "source" not in text


# ---- what they would run ----


def test_torchrun_on_one_node() -> None:
    words = told(call(LAUNCH / "torchrun.sh", "--ranks", "3", "--dry-run", "launch/train.py", "--data", "my text"))
    assert words[0] == "OMP_NUM_THREADS=1" and words[-1] == "my text"
    expected = (
        "-m torch.distributed.run --nnodes 1 --nproc-per-node 3 --max-restarts 0 --standalone launch/train.py --data"
    )
    assert " ".join(words[3:-1]) == expected


def test_torchrun_on_the_host_of_several_nodes() -> None:
    options = shlex.split("--nodes 2:4 --host 127.0.0.1:1234 --id job --ranks 8 --restarts 3 --wait 5 --dry-run")
    words = told(call(LAUNCH / "torchrun.sh", *options, "launch/train.py", OMP_NUM_THREADS="4"))
    assert words[:3] == ["OMP_NUM_THREADS=4", "GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo"]
    expected = (
        "--nnodes 2:4 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:1234"
        " --rdzv-id job --local-addr 127.0.0.1 --rdzv-conf is_host=true,last_call_timeout=5 launch/train.py"
    )
    assert " ".join(words[7:]) == expected


AGAIN = """
import os, time
import torch.distributed as dist
attempt, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
time.sleep(3 if attempt and rank == 0 else 0)
dist.init_process_group("gloo")
dist.barrier()
if attempt == 0:
    os._exit(1) if rank == 1 else time.sleep(60)
print(f"rank {rank} went on in attempt {attempt}\\n", end="")  # in one write: both ranks have this output
"""


def test_ranks_that_start_again_meet_anew(tmp_path: Path) -> None:
    """One that comes before the other does not find the addresses of those before."""
    (tmp_path / "again.py").write_text(AGAIN)
    done = call(LAUNCH / "torchrun.sh", "--ranks", "2", "--restarts", "3", tmp_path / "again.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} went on in attempt 1" for rank in range(2)]


def test_torchrun_leaves_the_users_interface() -> None:
    options = ["--nodes", "2", "--host", "127.0.0.1", "--dry-run", "launch/train.py"]
    words = told(call(LAUNCH / "torchrun.sh", *options, GLOO_SOCKET_IFNAME="ib0"))
    assert words[1:3] == ["GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=lo"]
    words = told(call(LAUNCH / "torchrun.sh", "--interface", "ib1", *options))
    assert words[1:3] == ["GLOO_SOCKET_IFNAME=ib1", "NCCL_SOCKET_IFNAME=ib1"]


def test_a_hostfile_gives_the_ranks(tmp_path: Path, fakes: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\nnode1 slots=2\n\nnode2 slots=4  # the large one")
    program(fakes, "pdsh", "")
    path = f"{fakes}:{os.environ['PATH']}"
    words = told(call(LAUNCH / "mpirun.sh", "--hostfile", hostfile, "--dry-run", "launch/train.py", PATH=path))
    assert words[1:6] == ["mpirun", "--hostfile", str(hostfile), "-n", "6"] and words[-1] == "launch/train.py"
    options = ["--hostfile", hostfile, "--ranks", "2", "--dry-run", "launch/train.py"]
    words = told(call(LAUNCH / "deepspeed.sh", *options, PATH=path))
    expected = f"--no_local_rank --master_port 29500 --hostfile {hostfile} --force_multi --num_gpus 2 launch/train.py"
    assert " ".join(words[3:]) == f"deepspeed.launcher.runner {expected}"


SEES_GPUS = """#!/bin/sh
case "$*" in
    *accelerator.device_count*) echo {gpus} ;;
    *) exec "{python}" "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("words", "visible", "gpus", "told_ranks"),
    [
        ("deepspeed.sh", None, 8, "--num_gpus 8"),
        ("deepspeed.sh", "", 0, "--num_gpus 1"),
        ("deepspeed.sh", "4,5,7", 3, "--include localhost:4,5,7"),
        ("deepspeed.sh --ranks 2", "4, 5,7", 3, "--include localhost:4,5 "),
        ("deepspeed.sh", "0,1,2,3", 2, "--include localhost:0,1 "),  # a machine of two
        ("deepspeed.sh", "3,-1,2", 1, "--include localhost:3 "),  # as CUDA reads it
        ("torchrun.sh", "GPU-4,GPU-5,GPU-7", 3, "--nproc-per-node 3"),
    ],
)
def test_ranks_run_on_the_gpus_that_are_visible(
    words: str, visible: str | None, gpus: int, told_ranks: str, fakes: Path
) -> None:  # fmt: skip
    program(fakes, "python", SEES_GPUS.format(gpus=gpus, python=sys.executable))
    own = {"PYTHON": str(fakes / "python")} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    launcher, *options = words.split()
    assert told_ranks in " ".join(told(call(LAUNCH / launcher, *options, "--dry-run", "launch/train.py", **own)))


@pytest.mark.parametrize(
    ("ranks", "visible", "message"),
    [("3", "4,5", "--ranks 3, and torch sees 2 GPU(s)"), ("2", "GPU-4,GPU-5", "knows GPUs by numbers alone")],
)
def test_gpus_that_deepspeed_cannot_take_are_refused(ranks: str, visible: str, message: str, fakes: Path) -> None:
    program(fakes, "python", SEES_GPUS.format(gpus=2, python=sys.executable))
    own = {"PYTHON": str(fakes / "python"), "CUDA_VISIBLE_DEVICES": visible}
    done = call(LAUNCH / "deepspeed.sh", "--ranks", ranks, "--dry-run", "launch/train.py", **own)
    assert done.returncode == 2 and message in done.stderr


# ---- what they refuse ----


@pytest.mark.parametrize(
    ("launcher", "words", "message"),
    [
        ("torchrun.sh", "", "there is no script to run"),
        ("torchrun.sh", "nowhere.py", "nowhere.py: no such file in"),
        ("torchrun.sh", "--rank 2 launch/train.py", "there is no option --rank"),
        ("torchrun.sh", "--ranks", "--ranks needs a value"),
        ("torchrun.sh", "--ranks two launch/train.py", "at least 1, and is 'two'"),
        ("torchrun.sh", "--nodes 3:2 launch/train.py", "N or MIN:MAX, and is '3:2'"),
        ("torchrun.sh", "--nodes 2 launch/train.py", "--nodes 2 needs --host"),
        ("torchrun.sh", "--nodes 2 --host no.such.invalid launch/train.py", "the host 'no.such.invalid' cannot be"),
        ("torchrun.sh", "--dry-run launch/train.py --config no.json", "--config no.json: no such file in"),
        ("deepspeed.sh", "--dry-run launch/train.py --deepspeed_config=no.json", "--deepspeed_config no.json: no such"),
        ("mpirun.sh", "--hostfile nowhere launch/train.py", "--hostfile nowhere: no such file"),
        ("mpirun.sh", "--hostfile README.md launch/train.py", "Each line should be HOST slots=N"),
        ("deepspeed.sh", "--hostfile /dev/null launch/train.py", "--hostfile /dev/null: no such file"),
        ("deepspeed.sh", "--port 0 launch/train.py", "--port should be a whole number"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(launcher: str, words: str, message: str) -> None:
    done = call(LAUNCH / launcher, *words.split())
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count(f"{launcher}: ") == 2, "what is wrong, and the remedy"


def test_a_python_without_the_project_is_refused(tmp_path: Path, fakes: Path) -> None:
    program(fakes, "python", '#!/bin/sh\nexec /usr/bin/env python3 -I -S "$@"\n')
    done = call(LAUNCH / "torchrun.sh", "launch/train.py", PYTHON=str(fakes / "python"))
    assert done.returncode == 2 and "has no module torch" in done.stderr and "-m pip install '.[train]'" in done.stderr
    done = call(LAUNCH / "torchrun.sh", "launch/train.py", PYTHON=str(tmp_path / "none"))
    assert done.returncode == 2 and "there is no such program" in done.stderr


@pytest.mark.parametrize(
    ("environment", "is_taken"),
    [
        ({"VIRTUAL_ENV": "own"}, True),
        ({"CONDA_PREFIX": "own", "CONDA_DEFAULT_ENV": "training"}, True),
        ({"CONDA_PREFIX": "own", "CONDA_DEFAULT_ENV": "base"}, False),
    ],
)
def test_the_python_of_an_active_environment_is_taken(
    environment: dict[str, str], is_taken: bool, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program(tmp_path / "bin", "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # where there is no .venv
    own = {name: str(tmp_path) if value == "own" else value for name, value in environment.items()}
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = call(LAUNCH / "torchrun.sh", "--dry-run", "launch/train.py", PYTHON="", PATH=path, **own)
    assert (str(tmp_path / "bin" / "python") in told(done)) == is_taken


def test_several_nodes_without_psutil_are_refused(fakes: Path) -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == 'psutil' else f(n)"
    words = f'if [ "$1" = -c ]; then shift; one=$1; shift; set -- -c "{hide}; $one" "$@"; fi'
    program(fakes, "python", f'#!/bin/sh\n{words}\nexec {sys.executable} "$@"\n')
    own = {"PYTHON": str(fakes / "python")}
    done = call(LAUNCH / "torchrun.sh", "--nodes", "2", "--host", "localhost", "launch/train.py", **own)
    assert done.returncode == 2 and "has no module psutil" in done.stderr and "install psutil" in done.stderr


def test_another_mpi_is_refused(fakes: Path) -> None:
    program(fakes, "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # whose folder is put first on the path
    program(fakes, "mpirun", "#!/bin/sh\necho HYDRA build details\n")
    done = call(LAUNCH / "mpirun.sh", "launch/train.py", PYTHON=str(fakes / "python"))
    assert done.returncode == 2 and "is not Open MPI's" in done.stderr


# ---- trainings ----


def summary(folder: Path, world_size: int = 2) -> dict[str, object]:
    found = json.loads((folder / "summary.json").read_text())
    assert found["world_size"] == world_size and found["steps"] == 8
    return found


@pytest.mark.dist
@pytest.mark.deepspeed
def test_trainings_by_each_launcher_on_this_machine(tmp_path: Path) -> None:
    """torchrun, mpirun, DeepSpeed's launcher, and Slurm's job with stand-ins: the same losses."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    program(
        fakes, "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames node[1-1]" ] && seq -f 127.0.0.%g 1 99999\n'
    )  # a pipe is full
    program(fakes, "srun", '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nSLURM_PROCID=0 exec "$@"\n')
    spool = tmp_path / "slurm_script"
    shutil.copy(LAUNCH / "slurm.sbatch", spool)  # as Slurm does
    training = [LAUNCH / "train.py", "--device", "cpu", *TINY.split(), "--config", ROOT / "configs/zero2.json"]
    slurm = {
        "PATH": f"{fakes}:{os.environ['PATH']}", "RANKS": "2", "SLURM_JOB_ID": "77", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node[1-1]", "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    done = {
        "torchrun": call(LAUNCH / "torchrun.sh", "--ranks", "2", *training, "--out", tmp_path / "torchrun"),
        "mpirun": call(LAUNCH / "mpirun.sh", "--ranks", "2", *training, "--out", tmp_path / "mpirun"),
        "deepspeed": call(
            LAUNCH / "deepspeed.sh", "--ranks", "2", "--port", str(free_port()), *training,
            "--out", tmp_path / "deepspeed", DS_ACCELERATOR="cpu",
        ),
        "slurm": call("bash", spool, *training, "--out", tmp_path / "slurm", **slurm),
    }  # fmt: skip
    for name, result in done.items():
        assert result.returncode == 0, (name, result.stderr[-3000:])
    assert "--rdzv-endpoint 127.0.0.1:15077 --rdzv-id 77" in done["slurm"].stderr
    losses = {name: summary(tmp_path / name)["val_loss"] for name in done}
    assert len(set(losses.values())) == 1, losses


@pytest.mark.dist
@pytest.mark.deepspeed
def test_a_restartable_run_begins_goes_on_and_is_complete(tmp_path: Path) -> None:
    def start(*more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        words = [LAUNCH / "train.py", "--device", "cpu", *TINY.split(), "--restartable", "--out", tmp_path / "a", *more]
        return call(LAUNCH / "torchrun.sh", "--ranks", str(ranks), *words)

    done = start("--steps", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    before = summary(tmp_path / "a", 1)
    done = start()
    assert done.returncode == 0 and "is complete: 8 steps" in done.stdout, done.stderr[-3000:]
    assert summary(tmp_path / "a", 1) == before
    done = start("--seed", "7")
    assert done.returncode != 0 and "seed: 0 there, 7 here" in done.stderr
    done = start("--overwrite")
    assert done.returncode != 0 and "leave one out" in done.stderr
    done = start("--resume", "b")
    assert done.returncode != 0 and "leave --resume out" in done.stderr


# ---- Slurm and Kubernetes ----


def test_slurms_job_has_to_be_submitted() -> None:
    done = call("bash", LAUNCH / "slurm.sbatch", "launch/train.py")
    assert done.returncode != 0 and "submit this with sbatch" in done.stderr
    done = call("bash", LAUNCH / "slurm.sbatch", "launch/train.py", SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 2 and "Slurm has named no nodes" in done.stderr


def test_the_kubernetes_manifest_is_a_train_job() -> None:
    """By Kubeflow's models, which drop unknown keys: what comes back must be all that went in."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    import yaml

    manifest = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest
    trainer = manifest["spec"]["trainer"]
    assert all(
        (ROOT / Path(word).relative_to("/workspace")).is_file() for word in trainer["args"] if "workspace" in word
    )
    manifest["spec"]["trainer"]["numnodes"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() != manifest, "a misspelt key would go unnoticed"
