"""What the package may say when something is wrong, read from its source: for docs/troubleshooting.md.

    python tests/messages.py        # those that the page does not have yet, as terms to paste into it

A message is written with … for each part that only a run can tell.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"

# Calls that say something, by the last part of their name. An error counts where it is made, raised there or not.
_CALLS = (
    *("warn", "warning", "info", "error", "exception", "critical"),
    *("fail", "exit", "unexpected", "refuse_modes"),
)

# Strings of this many words count wherever they stand: messages are also returned, collected in lists, joined later.
_WORDS = 4

# Of those, what is no message: help texts (which `--help` shows), and what the tables of the command line say.
_SILENT_MODULES = ("tables.py",)
_SILENT_KEYWORDS = ("help",)
_SILENT_NAMES = ("NAMES", "PANELS")  # of metrics.py and curves.py: words of pictures

# torch's own warning, which the package silences.
_NOT_OURS = ("torch.distributed is (disabled|unavailable).*assuming the intent is to",)


@dataclass(frozen=True, slots=True)
class Message:
    """Where it is, and its text."""

    place: str
    text: str


def messages(package: Path = ROOT / "adafisher_dist") -> list[Message]:
    """All of them, each text once."""
    found: dict[str, Message] = {}
    for path in sorted(package.rglob("*.py")):
        if path.name not in _SILENT_MODULES:
            for line, text in of_source(path.read_text(encoding="utf-8")):
                found.setdefault(text, Message(f"{path.relative_to(package.parent)}:{line}", text))
    return list(found.values())


def of_source(source: str) -> Iterator[tuple[int, str]]:
    """The messages of a module: line and text."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value)
    }
    inlined = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    } & constants.keys()
    silent = {
        id(node)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) in _SILENT_NAMES
    }
    skipped = _docstrings(tree) | {id(constants[name]) for name in inlined} | silent
    yield from _walk(tree, constants, skipped, False)


def _walk(node: ast.AST, constants: dict[str, ast.expr], skipped: set[int], said: bool) -> Iterator[tuple[int, str]]:
    """`said` tells whether the node is an argument of a call that says something."""
    if id(node) in skipped or (isinstance(node, ast.keyword) and node.arg in _SILENT_KEYWORDS):
        return
    if isinstance(node, ast.expr) and _is_text(node):
        text = _text(node, constants)
        words = sum(bool(re.search(r"[^\W\d_]{2}", word)) for word in text.split())
        if text not in _NOT_OURS and (words >= _WORDS or (said and words > 0)):
            yield node.lineno, text
        for part in _variable_parts(node):  # which may hold a message of their own
            yield from _walk(part, constants, skipped, False)
        return
    # A dict, since the modes that `refuse_modes` is told are its keys.
    says = _says(node) if isinstance(node, ast.Call) else said and isinstance(node, ast.Dict)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, constants, skipped, says)


def _says(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    return name.endswith(("Error", "problems.append")) or name.rpartition(".")[2] in _CALLS


def _is_text(node: ast.AST) -> bool:
    """A string, an f-string, or a sum that begins or ends with one."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _text(node: ast.AST, constants: dict[str, ast.expr]) -> str:
    return re.sub(rf"\s*{GAP}(\s*{GAP})+", f" {GAP}", re.sub(r"\s+", " ", _raw(node, constants))).strip()


def _raw(node: ast.AST, constants: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-0-9.]*[sdgfr]", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_raw(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _raw(node.value, constants) if isinstance(node.value, ast.Name) else GAP
    if isinstance(node, ast.BinOp):
        return _raw(node.left, constants) + _raw(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return _raw(constants[node.id], constants)
    return GAP


def _variable_parts(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.JoinedStr):
        yield from (part.value for part in node.values if isinstance(part, ast.FormattedValue))
    elif isinstance(node, ast.BinOp):
        for side in (node.left, node.right):
            if _is_text(side):
                yield from _variable_parts(side)
            else:
                yield side


def _docstrings(tree: ast.AST) -> set[int]:
    """Also the strings below attributes."""
    return {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def quoted(page: str) -> list[str]:
    """The messages that the page explains: its terms in code, each on a line of its own."""
    spans = re.findall(r"^(`+) ?(.+?) ?\1$", page, flags=re.MULTILINE)
    return [re.sub(r"\s+", " ", text) for _, text in spans]


def missing(page: str, found: list[Message]) -> list[Message]:
    """Messages that no term quotes whole."""
    terms = set(quoted(page))
    return [message for message in found if message.text not in terms]


def stale(page: str, found: list[Message]) -> list[str]:
    """Terms that quote no message."""
    return sorted(set(quoted(page)) - {message.text for message in found})


def term(text: str) -> str:
    """A message as a term of the page."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    page_ = PAGE.read_text(encoding="utf-8")
    for message_ in missing(page_, messages()):
        print(f"{term(message_.text)}   <- {message_.place}")
    for term_ in stale(page_, messages()):
        print(f"no message says: {term_}")
