"""Checkpoints that something else than a save made: refused in seconds, with what to do."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import Run, trained
from typer.testing import CliRunner

from adafisher_dist import CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import encoding
from adafisher_dist.checkpoint.directory import latest_tag
from adafisher_dist.checkpoint.errors import os_problem
from adafisher_dist.checkpoint.foreign import _check_file
from adafisher_dist.checkpoint.latest import prepare_latest, read_latest
from adafisher_dist.checkpoint.manifest import MANIFEST
from adafisher_dist.tools.cli import app

SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def root(two: Path, tmp_path: Path) -> Path:
    """A copy of a folder with the checkpoints step1 and step2, which `latest` names."""
    return Path(shutil.copytree(two, tmp_path / "root"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def moved_out(path: Path) -> None:
    shutil.move(path, path.parent.parent / f"out-{path.name}")
    path.symlink_to(f"../out-{path.name}")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(60 * 10**9)


SHARDS = {
    "a pipe": (pipe, "it is a pipe, and no file"),
    "endless": (lambda path: link(path, "/dev/zero"), "it is a link to /dev/zero, which is out of its folder"),
    "a link out": (moved_out, f"it is a link to ../out-{SHARD}, which is out of its folder.*cp -L"),
    "links in a circle": (lambda path: link(path, path.name), "its links lead to each other"),
    "60 GB": (sparse, "has 60000000000 bytes, and should have"),
}
FILES = {
    "a pipe": (pipe, "is no file|it is a pipe, and no file"),
    "endless": (lambda path: link(path, "/dev/zero"), "is no file|it is a link to /dev/zero, which is out of its fold"),
    "a link out": (moved_out, "it is a link to ../out-.*, which is out of its folder.*cp -L"),
    "60 GB": (sparse, "it has 60000000000 bytes, and a manifest has at most|more than 8192 bytes"),
}
HOSTILE = [
    *((f"step2/{SHARD}", how, *SHARDS[how]) for how in SHARDS),
    *((f"step2/{MANIFEST}", how, *FILES[how]) for how in FILES),
    *(("latest", how, *FILES[how]) for how in FILES),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "how", "change", "message"), HOSTILE, ids=[f"{c[0]}-{c[1]}" for c in HOSTILE])
def test_a_file_that_is_none(name: str, how: str, change: Callable[[Path], Any], message: str, root: Path) -> None:
    """Loads, `inspect` and `export` name it and end at once."""
    change(root / name)
    run, began = Run(), time.monotonic()
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            run.load(root, verify=verify)
        assert Path(name).name in str(caught.value) and str(root) in str(caught.value)
    export = ("export", root, "--to", "safetensors", "--out", root / "out")
    for words in (("inspect", root, "--verify"), export, (*export, "--no-verify")):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code in (1, 2) and re.search(message, result.output) and "Errno" not in result.output
    assert not (root / "out").exists()
    assert time.monotonic() - began < 20


def test_links_that_stay_in_the_folder(root: Path, tmp_path: Path) -> None:
    """And a checkpoint's folder that is a link itself."""
    shutil.move(root / "step2", tmp_path / "elsewhere")
    (root / "step2").symlink_to(tmp_path / "elsewhere")
    folder = root / "step2"
    (folder / SHARD).rename(folder / "one")
    (folder / "two").symlink_to("one")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere" / "two")
    assert Run().load(root) == 2 and Run().load(folder) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", [pipe, lambda path: link(path, "/dev/zero")], ids=["a pipe", "endless"])
def test_a_file_of_deepspeeds_that_is_none(change: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    path.touch()
    change(path)
    with pytest.raises(CheckpointError, match=r"cannot be read: it is a (pipe|device), and no file"):
        _check_file(path)


# ---- latest ----


def test_a_flipped_bit_of_latest_is_noticed(root: Path) -> None:
    """Any, also where it makes the name of another checkpoint."""
    content = (root / "latest").read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damage = bytearray(content)
            damage[position] ^= 1 << bit
            (root / "latest").write_bytes(damage)
            with pytest.raises(CheckpointError, match=str(root)):
                Run().load(root)
    for name in ("step1", "step1\n"):  # as DeepSpeed, earlier versions and people write it
        (root / "latest").write_text(name)
        assert Run().load(root) == 1


def test_what_latest_says(tmp_path: Path) -> None:
    for tag in ("a", "epoch1/step3", "é中", "two words"):
        prepare_latest(tmp_path, tag).rename(tmp_path / "latest")
        assert read_latest(tmp_path) == tag
    (tmp_path / "latest").write_text("b\ncrc32 00000000\n")
    with pytest.raises(CheckpointError, match=r"it says 'b' and the checksum 00000000.*Checkpoints in .*: none"):
        latest_tag(tmp_path)


# ---- the manifest ----


def write(folder: Path, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    (folder / MANIFEST).write_bytes(b'{"crc32": "%08x", "content": ' % zlib.crc32(data) + data + b"}")


def content_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_bytes())["content"]


MARK = "@@@"
DEEP = 150_000
STRANGE: list[str] = [
    *("null", "true", "-1", "-0", "1e400", "-1e400", "NaN", "Infinity", "1" * 3000, "-" + "9" * 400, "1e-400", "0.5"),
    *(
        '""',
        '"\\u0000"',
        '"\\ud800"',
        '"\\u001b[31mred\\u001b[0m"',
        '"\\u009b2J"',
        '"\\u202eabc"',
        '"../../etc/passwd"',
    ),
    *('"/dev/zero"', '"' + "a" * 100_000 + '"', '"' + "é" * 300 + '"', '"\\n"', '" "', "[]", "{}", "[[]]", '{"": 0}'),
    *("[" * 150 + "]" * 150, "[" * 900 + "]" * 900, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
    *('{"a": 1, "a": 2}', '{"$numpy": ["|V8", 20000000000]}', '{"$numpy": ["|S1", 20000000000]}', '{"$dtype": "x"}'),
    *('{"$tensor": 99}', '{"$bytes": "!"}', '{"$counter": [[[], 1]]}', '{"$set": [[]]}', '{"$bounded_deque": [-1, 0]}'),
    *("[" + ", ".join(["4611686018427387903"] * 50) + "]", "[" + ", ".join(["2"] * 5000) + "]"),
]
KEYS = ['""', '"\\u0000"', '"\\ud800"', '"\\u001b]0;x\\u0007"', '"' + "k" * 5000 + '"', '"$tensor"']


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutated(content: Any, path: tuple[Any, ...], draw: random.Random) -> tuple[str, str]:
    """What was done, and the text."""
    whole = json.loads(json.dumps(content))
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    last, how = path[-1], draw.choice(["value", "value", "value", "missing", "key", "doubled"])
    if how == "missing" or not isinstance(holder, dict):
        if how == "missing":
            del holder[last]
            return f"{path} missing", json.dumps(whole)
        how = "value"
    if how == "value":
        strange = draw.choice(STRANGE)
        holder[last] = MARK
        return f"{path} = {strange[:40]}", json.dumps(whole).replace(f'"{MARK}"', strange)
    key = draw.choice(KEYS) if how == "key" else json.dumps(last)
    own = json.dumps(holder[last])
    if how == "key":
        del holder[last]
    holder[MARK] = 0
    return f"{path} {how} {key[:40]}", json.dumps(whole).replace(f'"{MARK}": 0', f"{key}: {own}")


def check_mutants(count: int, seed: int, folder: Path) -> None:
    run, draw, content = trained(1), random.Random(seed), content_of(folder)
    every, outcomes, problems = [*places(content)], Counter[str](), []
    before = run.digest()
    for number in range(count):
        what, text = mutated(content, draw.choice(every), draw)
        write(folder, text)
        began = time.monotonic()
        try:
            load_checkpoint(folder, run.module, run.optimizer, verify=False, strict=bool(number % 3))
        except CheckpointError as error:
            outcomes["refused"] += 1
            told = str(error)
            if str(folder) not in told or len(told) < len(str(folder)) + 20:
                problems.append(f"{what}: says too little: {told}")
            if not told.replace("\n", "").isprintable() or max(map(len, told.split("\n"))) > 3000:
                problems.append(f"{what}: cannot be shown: {told[:300]!r}")
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        else:
            outcomes["loaded"] += 1
            if " doubled " in what:
                problems.append(f"{what}: loaded")
        if run.digest() != before:
            run = trained(1)
        if number % 5 == 0:
            result = CliRunner().invoke(app, ["inspect", str(folder)])
            if not isinstance(result.exception, SystemExit | None):
                problems.append(f"{what}: inspect: {type(result.exception).__name__}: {str(result.exception)[:300]}")
            elif not result.output.replace("\n", "").isprintable():
                problems.append(f"{what}: inspect shows what a terminal obeys")
        if time.monotonic() - began > 10:
            problems.append(f"{what}: took {time.monotonic() - began:.0f} s")
    print(dict(outcomes))
    assert not problems, "\n".join(problems[:40])
    assert outcomes["refused"] > outcomes["loaded"]


def test_a_manifest_of_strange_values(root: Path) -> None:
    check_mutants(150, 1, root / "step2")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_very_many_manifests_of_strange_values(seed: int, root: Path) -> None:
    check_mutants(3000, seed, root / "step2")


def test_chunks_that_share_bytes(root: Path) -> None:
    """A file of 30 kB may not ask for more memory than it has bytes."""
    content = content_of(root / "step2")
    key = next(key for key in content["tensors"] if key.startswith("weight/"))
    tensor = content["tensors"][key]
    ((_, elements, file, offset), *_) = tensor["chunks"]
    tensor["chunks"] = [[n * elements, elements, file, offset] for n in range(1000)]
    tensor["numel"] = 1000 * elements
    write(root / "step2", json.dumps(content))
    with pytest.raises(CheckpointError, match=r"its tensors have \d+ bytes, and its files \d+"):
        Run().load(root)


def test_values_that_are_nested(tmp_path: Path) -> None:
    """What a save takes, a load takes, and it says when that ends."""
    value: Any = 1
    for _ in range(encoding.MOST_LEVELS - 1):
        value = [value]
    run = trained(1)
    save_checkpoint(tmp_path / "a", run.module, run.optimizer, extra=value)
    assert load_checkpoint(tmp_path / "a", run.module, run.optimizer).extra == value
    with pytest.raises(TypeError, match="extra is nested too deep to be saved: 201 levels of 200"):
        save_checkpoint(tmp_path / "a", run.module, run.optimizer, extra=[value])


# ---- what reaches a terminal ----


def test_names_that_a_terminal_would_obey(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = content_of(root / "step2")
    parameters, name = content["about"]["model"]["parameters"], "evil\x1b]0;title\x07"
    parameters[name] = {**next(iter(parameters.values())), "left_out": True}
    write(root / "step2", json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Run().load(root)
    assert "evil\\x1b]0;title\\x07 is not in the model" in str(caught.value) and "\x1b" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "adafisher_dist"):
        Run().load(root, strict=False)
    assert "evil\\x1b" in caplog.text and "\x1b" not in caplog.text
    shown = CliRunner().invoke(app, ["inspect", str(root), "--all"]).output
    assert "evil\\x1b" in shown and "\x1b" not in shown


# ---- the operating system's errors ----


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "Free some room"), (errno.EACCES, "permission"), (errno.EROFS, "Choose a folder"),
        (errno.EMFILE, "ulimit -n"), (errno.EIO, "kernel's log"),
    ],
)  # fmt: skip
def test_an_error_of_the_system_has_path_and_remedy(
    code: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *arguments: Any, **more: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(CheckpointError, match=remedy) as caught:
        trained(1).save(tmp_path / "a" / "b", 1)
    assert str(tmp_path / "a") in str(caught.value) and os.strerror(code) in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert "Errno" not in os_problem(OSError(code, os.strerror(code)))


def test_a_tag_that_could_not_be_replaced(tmp_path: Path) -> None:
    """The longest can be saved twice; a longer one not even once."""
    longest = "x" * 245
    for step in (1, 2):
        trained(step).save(tmp_path / longest, step)
    assert Run().load(tmp_path) == 2
    with pytest.raises(CheckpointError, match="has 246 bytes, and may have 245"):
        trained(1).save(tmp_path / f"{longest}x", 1)
    assert {path.name for path in tmp_path.iterdir()} == {longest, "latest"}
