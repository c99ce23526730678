"""All that is to be seen on a GPU, in parts with a time limit each; for `make gpu`.

    python3 benchmarks/gpu/run.py [--parts "correct fast trains"] [--rehearse] [--out FOLDER]

Parts: "correct" (does the GPU code compute the right thing), "fast" (what a step takes), "trains"
(does a small GPT train). Each is a process group of its own, which is killed as a whole at its
limit, and each writes FOLDER/PART.json while it goes, so what it had stays. After each the page
FOLDER/gpu.md is made anew from all that is there, so that PARTS="fast" runs one part again and
keeps the others. Everything said goes to FOLDER/log.txt too.

In the environment: PARTS and OUT stand for the options, COMMIT for git's answer where there is no
.git, PART_SECONDS for what a part plans with. ADAFISHER_KERNEL is what users set: 1 shows the
kernel, and nothing what they get without it. The status is 1 if a part failed, was cut, or
reported a failed check.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import report
from common_gpu import FINISHED, PATHS, ROOT, commit, default_folder, has_cuda, head, no_device, read_json, write_json

PARTS = ("correct", "fast", "trains")
LIMITS = {"correct": 200.0, "fast": 130.0, "trains": 130.0}
REHEARSAL_LIMITS = {"correct": 200.0, "fast": 150.0, "trains": 110.0}  # of a machine that is busy, too
TOTAL = 478.0  # of all, where a command may take eight minutes
MARGIN = 8.0  # between what a part plans with and its limit
GRACE = 3.0  # between asking a part to end and ending it
LINES_A_PART = 70  # on the terminal; the log has them all
WHEELS, SITE = ROOT / ".gpu" / "wheels", ROOT / ".gpu" / "site"
FROM_WHEELS = ("deepspeed", "pytorch_optimizer")


class Log:
    """The terminal and FOLDER/log.txt."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "log.txt").open("a", encoding="utf-8", errors="replace")

    def say(self, text: str, terminal: bool = True) -> None:
        self.file.write(f"{text}\n")
        self.file.flush()
        if terminal:
            print(text, flush=True)


# ---- what the parts find ----


def environment(rehearse: bool, site: bool) -> dict[str, str]:
    """What the parts are started with."""
    folders = [str(path) for path in [*PATHS, *([SITE] if site else [])]]
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*folders, *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "DS_ACCELERATOR": "cpu" if rehearse else "cuda",
        "ADAFISHER_KERNEL": os.environ.get("ADAFISHER_KERNEL", "0"),
        "GPU_COMMAND": os.environ.get("GPU_COMMAND", " ".join(["python", *sys.argv])),
        "COMMIT": commit(),
    }


def install_wheels(log: Log) -> bool:
    """Install .gpu/wheels where they are needed; whether there is a folder with what they hold.

    Raises:
        SystemExit: some are needed, and there are none: a machine that is lent once is not to be
            spent on what can be made of the rest. MISSING=1 in the environment does without them.
    """
    wheels = sorted(WHEELS.glob("*.whl"))
    missing = [name for name in FROM_WHEELS if importlib.util.find_spec(name) is None]
    if not missing:
        return False
    if not wheels:
        if not SITE.exists():
            told = f"Not installed: {', '.join(missing)}. `make gpu-wheels`, where there is a network, fetches them"
            log.say(f"{told} into .gpu/wheels, which has to come along.")
            if os.environ.get("MISSING") != "1":
                log.say("Nothing was run. MISSING=1 makes the checks that do without them.")
                raise SystemExit(2)
        return SITE.exists()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--upgrade", "--disable-pip-version-check", "--root-user-action", "ignore"]
    command += ["--target", str(SITE), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = "installed" if done.returncode == 0 else f"FAILED to install:\n{(done.stdout + done.stderr)[-1500:]}"
    log.say(f"{len(wheels)} wheels {told} ({', '.join(missing)} were missing)")
    return SITE.exists()


# ---- a part ----


def run_part(part: str, given: argparse.Namespace, limit: float, found: dict[str, str], log: Log) -> str | None:
    """Run a part to its end or its limit; returns what went wrong, or None."""
    script = given.scripts / f"{part}.py"
    path = given.out / f"{part}.json"
    path.unlink(missing_ok=True)
    began = time.monotonic()
    log.say(f"\n==== {part}: at most {limit:.0f} s ====")
    if not script.exists():
        problem: str | None = f"there is no {script}"
    else:
        command = [sys.executable, str(script), "--out", str(given.out), *(["--rehearse"] if given.rehearse else [])]
        planned = os.environ.get("PART_SECONDS", str(max(1.0, limit - MARGIN)))
        problem = watch(command, limit, {**found, "PART_SECONDS": planned}, log)
    settle(path, part, given.rehearse, problem)
    log.say(f"==== {part}: {problem or 'done'}, {time.monotonic() - began:.0f} s ====")
    return problem


def watch(command: list[str], limit: float, found: dict[str, str], log: Log) -> str | None:
    """A command in a process group of its own, which is ended as a whole."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=found, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    pump = threading.Thread(target=copy_lines, args=(process.stdout, log), daemon=True)
    pump.start()
    try:
        status = process.wait(limit)
        return None if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        return f"cut at its limit of {limit:.0f} s"
    finally:
        end_group(process)
        pump.join(2)


def copy_lines(source: IO[str], log: Log) -> None:
    for number, line in enumerate(source):
        log.say(line.rstrip("\n"), terminal=number < LINES_A_PART)
        if number == LINES_A_PART:
            print("… (the rest is in log.txt)", flush=True)


def end_group(process: subprocess.Popen[str]) -> None:
    """End whatever is left of a group, its leader included."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def settle(path: Path, part: str, rehearse: bool, problem: str | None) -> None:
    """Put how the part ended into its JSON, of which a part that got nowhere has none."""
    try:
        content: dict[str, Any] = read_json(path) or {**head(rehearse), "part": part}
    except ValueError as error:
        content, problem = {**head(rehearse), "part": part}, f"{path.name} is no JSON: {error}"
    if content.get("ended") != FINISHED:  # then it is its numbers that tell what went wrong
        write_json(path, {**content, "ended": problem or FINISHED})


def make_page(folder: Path, log: Log) -> None:
    """Make the page of what there is; if that fails, the numbers stay and the next part starts."""
    try:
        report.make(folder)
    except Exception as error:
        log.say(f"gpu.md could not be made: {type(error).__name__}: {error}")


# ---- all ----


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=os.environ.get("PARTS") or " ".join(PARTS), help="some of them, by name")
    parser.add_argument("--rehearse", action="store_true", help="the same scripts on a CPU, with tiny sizes")
    parser.add_argument("--out", type=Path, help="by default the environment's OUT, or runs/gpu")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="another limit")
    parser.add_argument("--scripts", type=Path, default=Path(__file__).parent, help="where PART.py are; for tests")
    given = parser.parse_args()
    asked = given.parts.replace(",", " ").split()
    unknown = [part for part in asked if part not in PARTS]
    if unknown or not asked:
        parser.error(f"no such part: {' '.join(unknown) or 'none was named'}. There are: {' '.join(PARTS)}")
    given.parts = [part for part in PARTS if part in asked]
    given.limits = dict(REHEARSAL_LIMITS if given.rehearse else LIMITS)
    for each in given.limit:
        part, _, seconds = each.partition("=")
        if part not in PARTS or not re.fullmatch(r"\d+(\.\d+)?", seconds) or not float(seconds):
            parser.error(f"--limit is PART=SECONDS, for instance fast=60, and not {each}. There are: {' '.join(PARTS)}")
        given.limits[part] = float(seconds)
    in_environment = os.environ.get("OUT")
    given.out = (given.out or (Path(in_environment) if in_environment else default_folder(given.rehearse))).resolve()
    if not given.rehearse and not has_cuda():
        parser.exit(1, f"{no_device('make gpu')}\n")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=given.out):
            pass
    except OSError as error:
        parser.error(f"Cannot write into {given.out}: {error.strerror}. --out, or OUT, names another folder.")
    return given


def stop(number: int, frame: object) -> None:
    """Leave by way of `finally`, which ends the part."""
    raise SystemExit(128 + number)


def main() -> int:
    began = time.monotonic()
    given = arguments()
    signal.signal(signal.SIGTERM, stop)
    given.scripts = given.scripts.resolve()
    log = Log(given.out)
    found = environment(given.rehearse, install_wheels(log))
    os.environ.update({name: found[name] for name in ("GPU_COMMAND", "COMMIT")})
    problems = {}
    for part in given.parts:
        limit = min(given.limits[part], max(1.0, TOTAL - (time.monotonic() - began)))
        problems[part] = run_part(part, given, limit, found, log)
        make_page(given.out, log)
    log.say("\n" + report.summary(given.out))
    log.say(f"\nWritten: {given.out}/gpu.md, {time.monotonic() - began:.0f} s in all")
    wrong = [f"{part}: {problem}" for part, problem in problems.items() if problem is not None]
    for line in wrong:
        log.say(f"NOT GOOD: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
