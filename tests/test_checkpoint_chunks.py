"""The tables of chunks in a manifest, as lists and as text: what is found, what is refused."""

import base64
import itertools
import json
import os
import random
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import content_of, write_manifest
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from adafisher_dist import AdaFisher, CheckpointError, load_checkpoint, save_checkpoint
from adafisher_dist.checkpoint import chunks, ranges, reader, saving, writer
from adafisher_dist.checkpoint.chunks import ByFile, Chunk, Chunks, Shards, collect, parse
from adafisher_dist.checkpoint.manifest import MANIFEST, read
from adafisher_dist.tools.cli import app

Rows = list[list[int]]  # elements, file, offset
WEIGHT = "weight/0.weight"


# ---- the text, by another way ----


def as_text(rows: Rows) -> str:
    """What the module's docstring says, number by number."""
    data, before = b"", [0, 0, 0]
    for column in range(3):
        for row in rows:
            data += struct.pack("<q", (row[column] - before[column] + 2**63) % 2**64 - 2**63)
            before[column] = row[column]
    return base64.b64encode(zlib.compress(data)).decode()


def rows_of(text: str) -> Rows:
    data = zlib.decompress(base64.b64decode(text))
    numbers = struct.unpack(f"<{len(data) // 8}q", data)
    count = len(numbers) // 3
    columns = [[*accumulate(numbers[count * column : count * (column + 1)])] for column in range(3)]
    return [list(row) for row in zip(*columns, strict=True)]


def as_list(rows: Rows) -> list[list[int]]:
    starts = accumulate([0, *(row[0] for row in rows)])
    return [[start, *row] for start, row in zip(starts, rows, strict=False)]


# ---- tables ----


def some_rows(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    return [[draw.randint(1, 9), draw.randrange(5), draw.randrange(1000)] for _ in range(count)]


def table_of(rows: Rows, form: Callable[[Rows], Any]) -> Chunks:
    shards = Shards({f"file{number}": 2000 for number in range(5)})
    return parse(form(rows), "key", sum(row[0] for row in rows), 4, shards, 10**6)


@pytest.mark.parametrize("form", [as_list, as_text])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 700])
def test_a_table_is_what_it_was(count: int, form: Callable[[Rows], Any]) -> None:
    rows = some_rows(count, count)
    table = table_of(rows, form)
    expected = [Chunk(start, n, f"file{file}", offset) for start, n, file, offset in as_list(rows)]
    assert [*table] == expected and len(table) == count
    assert table.dump() == (as_text(rows) if count > 64 else as_list(rows))
    assert [*collect("key", sum(row[0] for row in rows), expected, table.files)] == expected


@pytest.mark.parametrize(("starts", "numel"), [((0, 3), 7), ((0, 5), 9), ((1, 5), 9), ((0, 4), 9)])
def test_a_save_with_gaps_or_overlaps_is_none(starts: tuple[int, int], numel: int) -> None:
    chunks = [Chunk(start, 4, "file0", 0) for start in starts]
    with pytest.raises(ValueError, match=rf"the ranks wrote key up to element \d, and then from \d on, of {numel}"):
        collect("key", numel, chunks, ("file0",))


@pytest.mark.parametrize("seed", range(20))
def test_what_overlaps_is_found(seed: int) -> None:
    rows = some_rows(80, seed)
    table, draw = table_of(rows, as_text), random.Random(seed)
    every = [*table]
    total = every[-1].start + every[-1].numel
    ends = [0, total, *(chunk.start for chunk in every[:20]), *(draw.randint(0, total) for _ in range(20))]
    for start, stop in [(a, b) for a in ends for b in ends if a < b]:
        expected = [c for c in every if c.start < stop and start < c.start + c.numel]
        assert [*table.overlapping(start, stop)] == expected
        assert table.files_of(start, stop) == {chunk.file for chunk in expected}
    assert not [*table.overlapping(7, 7)] and not table.files_of(7, 7)


def test_chunks_are_found_by_their_files() -> None:
    tables = {f"key{seed}": table_of(some_rows(seed * 40, seed), as_text) for seed in range(4)}
    by_file = ByFile(tables)
    for number in range(6):
        expected = [(key, c) for key, table in tables.items() for c in table if c.file == f"file{number}"]
        assert [*by_file.of(number)] == expected
    assert not [*ByFile({}).of(0)]


# ---- checkpoints that have them ----


class Run:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(11, 37), nn.ReLU(), nn.Linear(37, 2))
        self.optimizer = AdaFisher(self.module.parameters(), block_size=4, rows_per_block=2)

    def step(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.module(torch.ones(3, 11)).square().sum().backward()
            self.optimizer.step()

    def everything(self) -> list[torch.Tensor]:
        state = self.optimizer.state.values()
        found = [*self.module.parameters(), *(value for entry in state for value in entry.values())]
        return [torch.as_tensor(value).detach().clone() for value in found]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def trained() -> Run:
    run = Run(0)
    run.step(3)
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ranges of few elements, so that its tensors have many chunks."""
    folder, run = tmp_path_factory.mktemp("original") / "a", trained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "RANGE_NUMEL", 4)
        save_checkpoint(folder, run.module, run.optimizer)
    tensors = content_of(folder)["tensors"]
    assert len(rows_of(tensors[WEIGHT]["chunks"])) == 102 and isinstance(tensors["weight/2.bias"]["chunks"], list)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "a"))


def with_lists(content: Any) -> Any:
    for tensor in content["tensors"].values():
        if isinstance(tensor["chunks"], str):
            tensor["chunks"] = as_list(rows_of(tensor["chunks"]))
    return content


@pytest.mark.parametrize("lists", [False, True], ids=["text", "lists"])
def test_a_checkpoint_of_many_chunks_loads(lists: bool, saved: Path, tmp_path: Path) -> None:
    """As text, and in lists of any length, as earlier versions wrote them."""
    folder, run = saved, trained()
    if lists:
        write_manifest(folder, with_lists(content_of(folder)))
    fresh = Run(1)
    load_checkpoint(folder, fresh.module, fresh.optimizer)
    assert same(fresh.everything(), run.everything())
    run.step(2)
    fresh.step(2)
    assert same(fresh.everything(), run.everything())
    told = CliRunner().invoke(app, ["inspect", str(folder), "--verify", "--json"])
    assert told.exit_code == 0, told.output
    out = CliRunner().invoke(app, ["export", str(folder), "--to", "safetensors", "--out", str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    exported = load_file(tmp_path / "out" / "model.safetensors")
    manifest = read(folder)
    assert {f"weight/{name}" for name in exported} == {key for key in manifest.tensors if key.startswith("weight/")}


def fails_on_one_rank(rank: int, world: int, folder: str) -> tuple[str, list[Any]]:
    real, run = reader._Reads._read, Run(1)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    if rank == 1:
        reader._Reads._read = fail
    with pytest.raises(CheckpointError, match="incomplete") as caught:
        load_checkpoint(folder, run.module, run.optimizer)
    reader._Reads._read = real
    load_checkpoint(folder, run.module, run.optimizer)
    return str(caught.value), [parameter.tolist() for parameter in run.module.parameters()]


@pytest.mark.dist
def test_a_read_that_fails_on_one_rank(saved: Path) -> None:
    """All are told of it alike, and load afterwards, on more ranks than have saved it."""
    (first, weights), (second, others) = run_ranks(fails_on_one_rank, 2, str(saved), timeout=60)
    assert first == second and "Rank 1: the disk is gone" in first and "Rank 0" not in first
    assert weights == others == [parameter.tolist() for parameter in trained().module.parameters()]


def test_the_checksum_is_of_the_bytes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dumped again where it fits; whatever digit is another, it is refused."""
    path = saved / MANIFEST
    text = path.read_bytes()
    begin = len(b'{"crc32": "00000000", "content": ')
    assert json.loads(text)["crc32"] == f"{zlib.crc32(text[begin:-1]):08x}"
    for place in (12, len(text) // 2, text.index(b'"world_size": ') + 14):
        path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            read(saved)
    path.write_bytes(text)
    monkeypatch.setattr("adafisher_dist.checkpoint.manifest._checksum", None)
    assert len(read(saved).tensors[WEIGHT].chunks) == 102


def changed(row: int, column: int, value: int) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        rows[row][column] = value
        return rows

    return change


ROWS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "an element more": (changed(3, 0, 5), "does not place all 407 elements"),
    "an element less": (changed(3, 0, 3), "does not place all 407 elements"),
    "a row less": (lambda rows: rows[:-1], "does not place all 407 elements"),
    "a row twice": (lambda rows: rows + rows[-1:], "does not place all 407 elements"),
    "no rows": (lambda rows: [], "does not place all 407 elements"),
    "elements below 0": (changed(3, 0, -4), r"whole numbers below 2\*\*62"),
    "a file below 0": (changed(3, 1, -1), r"whole numbers below 2\*\*62"),
    "an offset below 0": (changed(3, 2, -1), r"whole numbers below 2\*\*62"),
    "no such file": (changed(3, 1, 1), "files below 1"),
    "an offset outside": (changed(3, 2, 10**9), "places a part of weight/0.weight outside of shard"),
    "an offset at the end of int64": (changed(3, 2, 2**63 - 1), r"whole numbers below 2\*\*62"),
    "a length whose end is past int64": (changed(3, 0, 2**62 - 1), "places a part of weight/0.weight outside of shard"),
    "elements past 2**62": (changed(3, 0, 2**62), r"whole numbers below 2\*\*62"),
    "more rows than elements": (lambda rows: [[0, 0, 8]] * 306 + rows, "more than 407"),
}


@pytest.mark.parametrize(("change", "message"), ROWS.values(), ids=ROWS)
def test_rows_that_no_save_wrote(change: Callable[[Rows], Rows], message: str, saved: Path) -> None:
    folder = saved
    content = content_of(folder)
    tensor = content["tensors"][WEIGHT]
    tensor["chunks"] = as_text(change(rows_of(tensor["chunks"])))
    write_manifest(folder, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(folder)
    assert f"{folder / MANIFEST} is damaged" in str(caught.value) and WEIGHT in str(caught.value)


def again(text: str, change: Callable[[bytes], bytes]) -> str:
    return base64.b64encode(change(base64.b64decode(text))).decode()


def unpacked(change: Callable[[bytes], bytes]) -> Callable[[str], str]:
    return lambda text: again(text, lambda data: zlib.compress(change(zlib.decompress(data))))


TEXTS: dict[str, Callable[[str], Any]] = {
    "base64 cut short": lambda text: text[: len(text) // 2 // 4 * 4],
    "base64 without its end": lambda text: text[:-1],
    "no base64": lambda text: "ü" + text[1:],
    "a space in it": lambda text: text[:4] + " " + text[4:],
    "no zlib": lambda text: again(text, lambda data: b"no" + data[2:]),
    "another checksum in it": lambda text: again(text, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "without its checksum": lambda text: again(text, lambda data: data[:-4]),
    "two streams": lambda text: again(text, lambda data: data * 2),
    "a byte more": unpacked(lambda data: data + b"\0"),
    "a number less": unpacked(lambda data: data[:-8]),
    "nothing": lambda text: "",
    "null": lambda text: None,
    "a number": lambda text: 3,
    "an object": lambda text: {"x": text},
    "a list of text": lambda text: [text],
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
def test_a_text_that_no_save_wrote(change: Callable[[str], Any], saved: Path) -> None:
    folder = saved
    content, fresh = content_of(folder), Run(1)
    tensor = content["tensors"][WEIGHT]
    tensor["chunks"] = change(tensor["chunks"])
    write_manifest(folder, content)
    before = fresh.everything()
    with pytest.raises(CheckpointError, match=f"is damaged: chunks of tensor {WEIGHT} should be"):
        load_checkpoint(folder, fresh.module, fresh.optimizer)
    assert same(fresh.everything(), before)


def test_sums_that_go_around() -> None:
    """Of elements that fit into a file of as many bytes: their sum in 64 bits is right."""
    rows = [[2**62 - 1, 0, 0]] * 4 + [[104, 0, 0]]
    assert sum(row[0] for row in rows) % 2**64 == 100
    shards = Shards({"file": 2**62 - 1})
    with pytest.raises(ValueError, match="does not place all 100"):
        parse(as_text(rows), "key", 100, 1, shards, 1000)


def test_a_text_that_would_not_fit_into_memory() -> None:
    """64 MB in 65 kB: no more is unpacked than the tensor can have."""
    text = base64.b64encode(zlib.compress(bytes(64_000_000))).decode()
    shards = Shards({"file": 2**40})
    for numel, most in ((1000, 10**9), (10**9, 1000)):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="more than 1000"):
                parse(text, "key", numel, 4, shards, most)
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_a_checkpoint_has_so_many_chunks(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all, whether in lists or text; a save does not write what no load would read."""
    monkeypatch.setattr(ranges, "RANGE_NUMEL", 4)
    folder, run = saved, trained()
    count = sum(len(tensor.chunks) for tensor in read(folder).tensors.values())
    for most in (count, count - 1):
        monkeypatch.setattr(chunks, "MOST_CHUNKS", most)
        monkeypatch.setattr(writer, "MOST_CHUNKS", most)
        if most == count:
            read(folder)
            save_checkpoint(folder.parent / "b", run.module, run.optimizer)
    for content in (content_of(folder), with_lists(content_of(folder))):
        write_manifest(folder, content)
        with pytest.raises(CheckpointError, match="are more than"):
            read(folder)
    with pytest.raises(CheckpointError, match=f"it has {count} chunks, and a checkpoint may have {count - 1}"):
        save_checkpoint(folder.parent / "c", run.module, run.optimizer)
    assert not (folder.parent / "c").exists()


def unlike_under_one_name(rank: int, world: int, folder: str) -> str:
    """A layout that AdaFisher does not know: ranks hold different parameters of one name."""
    module = nn.Linear(4, 4, bias=False)
    own = ranges.of_tensor("weight/weight", module.weight.detach(), 0, 16, 16)
    saving.local_ranges.weights = lambda *given, **more: own
    with pytest.raises(CheckpointError) as told:
        save_checkpoint(folder, module, AdaFisher(module.parameters()))
    return str(told.value)


def test_two_ranks_do_not_write_the_same_elements(tmp_path: Path) -> None:
    for message in run_ranks(unlike_under_one_name, 2, str(tmp_path / "c")):
        assert "ranks 0 and 1 write the same elements of weight/weight" in message
        assert "Nothing was published" in message
    assert not (tmp_path / "c").exists()


def test_a_header_that_no_load_would_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 4)
    optimizer = AdaFisher(module.parameters())
    monkeypatch.setattr(writer, "LONGEST_HEADER", 200)
    with pytest.raises(CheckpointError, match=r"the header of shard-00000-of-00001\.safetensors would"):
        save_checkpoint(tmp_path / "a", module, optimizer)
    assert not (tmp_path / "a").exists()


def test_no_more_than_64_mib_are_brought_to_the_disk_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as that takes a rank shows no progress."""
    sizes: list[int] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        sync(handle)

    module = nn.Linear(4096, 10 * 1024, bias=False)  # 160 MiB
    monkeypatch.setattr(writer.os, "fsync", noted)
    save_checkpoint(tmp_path / "a", module, AdaFisher(module.parameters()))
    largest = max(sizes)
    steps = [0, *sorted(size for size in sizes if size > 2**20)]
    assert largest > 160 * 2**20
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 2**26 + 2**20
