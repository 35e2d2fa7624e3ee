"""The house in numbers: size, length, nesting, documentation, privacy, circles.

    python -m benchmarks.house              the files as they lie here
    python -m benchmarks.house 3e34ee2 HEAD of these revisions, side by side

Read from the syntax trees alone: no file is imported, so any revision can be measured.

lines       of all files of the package, blank ones too
function    lines of a function without its docstring: median, 90th percentile, most
nesting     95th percentile over functions of the depth of if, for, with, try, ...
documented  share of public functions, methods and classes that have a docstring; the
            members of protocols are not counted
comments    share of the lines that hold a comment
Any         uses of the name per 1,000 lines, imports not counted; then with the uses
            of names that stand for it alone (`PyTree`)
private     share of modules with an underscore in their path, faces not counted
circles     sets of modules that import each other at run time
"""

import ast
import dataclasses
import io
import math
import pathlib
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping, Sequence

PACKAGE = "jaxprune"
ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured; the module's docstring says how."""

    files: int
    lines: int
    function: tuple[int, int, int]
    nesting: int
    documented: float
    comments: float
    any_per_kilo: float
    any_by_any_name: float
    private: float
    circles: int

    def row(self, name: str) -> str:
        """A line of the table."""
        cells = [
            str(self.files),
            f"{self.lines / 1000:.1f}k",
            "/".join(map(str, self.function)),
            str(self.nesting),
            f"{self.documented:.0%}",
            f"{self.comments:.1%}",
            f"{self.any_per_kilo:.0f}",
            f"{self.any_by_any_name:.0f}",
            f"{self.private:.0%}",
            str(self.circles),
        ]
        return f"| {name} | {' | '.join(cells)} |"


HEADER = """\
| revision | files | lines | function med/p90/max | nesting p95 | documented \
| comments | `Any` per 1,000 lines | by any name | private modules | circles |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main(revisions: Sequence[str]) -> None:
    """Prints the table."""
    print(HEADER)
    for revision in revisions or [""]:
        print(measure(sources(revision)).row(revision or "here"))


def sources(revision: str = "") -> dict[str, str]:
    """Path -> text of every file of the package, at a revision or as it lies here."""
    if not revision:
        files = sorted((ROOT / PACKAGE).rglob("*.py"))
        return {str(f.relative_to(ROOT)): f.read_text("utf-8") for f in files}
    names = _git("ls-tree", "-r", "--name-only", revision, PACKAGE).splitlines()
    python = [name for name in names if name.endswith(".py")]
    return {name: _git("show", f"{revision}:{name}") for name in python}


def _git(*words: str) -> str:
    found = subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True)
    return found.stdout.decode()


def measure(texts: Mapping[str, str]) -> Measures:
    """The measures of a package, given the text of its files."""
    trees = {path: ast.parse(text) for path, text in texts.items()}
    functions = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    ]
    public = [node for path, tree in trees.items() for node in _public(path, tree)]
    modules = [path for path in trees if not path.endswith("__init__.py")]
    lines = sum(text.count("\n") for text in texts.values())
    lengths = sorted(map(_length, functions))
    aliases = {name for tree in trees.values() for name in _aliases_of_any(tree)}
    names = [
        node.id
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]
    return Measures(
        files=len(texts),
        lines=lines,
        function=(
            int(statistics.median(lengths)),
            _percentile(lengths, 0.9),
            lengths[-1],
        ),
        nesting=_percentile(sorted(map(_depth, functions)), 0.95),
        documented=_share([ast.get_docstring(node) is not None for node in public]),
        comments=sum(map(_comments, texts.values())) / lines,
        any_per_kilo=1000 * names.count("Any") / lines,
        any_by_any_name=1000 * sum(n in {"Any", *aliases} for n in names) / lines,
        private=_share([_is_private(path) for path in modules]),
        circles=len(circles(trees)),
    )


def _aliases_of_any(tree: ast.Module) -> Iterator[str]:
    """Names of a module that are `Any` and nothing else."""
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None and ast.unparse(node.value) == "Any":
                yield from map(ast.unparse, targets)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / max(len(flags), 1)


def _percentile(ordered: Sequence[int], share: float) -> int:
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def _is_private(path: str) -> bool:
    """A part of the path has an underscore: no user should import it."""
    parts = pathlib.PurePath(path).with_suffix("").parts
    return any(part.startswith("_") and part != "__init__" for part in parts)


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (body[0].end_lineno or 0) - body[0].lineno + 1
    return lines


def _depth(node: ast.AST) -> int:
    """How deep blocks lie in each other; functions inside are counted by themselves."""
    inner = (c for c in ast.iter_child_nodes(node) if not isinstance(c, FUNCTIONS))
    deepest = max(map(_depth, inner), default=0)
    return deepest + isinstance(node, BLOCKS)


def _comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def _public(path: str, tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module without underscore, and methods of these."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_") or _is_stub(node):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            waiting += node.body


def _is_stub(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """A member of a protocol: its class says what it is for."""
    return ast.unparse(node.body) == "..."


def circles(trees: Mapping[str, ast.Module]) -> list[set[str]]:
    """Sets of modules that reach each other; imports for types alone do not count."""
    graph = {_dotted(path): tree for path, tree in trees.items()}
    arrows = {name: _imported(tree, graph.keys()) for name, tree in graph.items()}
    reached = {name: _reached(name, arrows) for name in arrows}
    found: list[set[str]] = []
    for name, others in reached.items():
        circle = {other for other in others if name in reached[other]}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def _dotted(path: str) -> str:
    parts = pathlib.PurePath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _reached(start: str, arrows: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for target in arrows[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def _imported(tree: ast.Module, modules: Collection[str]) -> set[str]:
    """Which of these modules a file imports while it is imported itself."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, FUNCTIONS):
            continue  # runs later
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return found & set(modules)


if __name__ == "__main__":
    main(sys.argv[1:])
