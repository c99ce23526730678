"""Scripts on CPU ranks by torchrun, as a user starts them, without network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"


def succeed(ranks: int, script: str, *arguments: object, cwd: Path, **variables: str) -> str:
    """What a script printed, which must end well.

    Args:
        script: its path, absolute or in examples/; behind another's that runs it, and a space.
        variables: of the environment.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    paths = [TESTS / "leave_at_end.py", *(EXAMPLES / part for part in script.split())]
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **fixed, **variables}
    environment.pop("DS_ACCELERATOR", None)
    command = [*launcher, *map(str, paths), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
