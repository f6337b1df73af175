"""Which module imports which, and which package which: floors, and circles.

    python tests/programs/import_graph.py [--root PATH] [--modules]

prints how many modules and packages a checkout has, the imports between packages, the floors, and the circles.
Every import counts: at the top of a module, inside a function, under `TYPE_CHECKING`. `tests/test_package.py` holds
what this prints of the library: no circle of modules, and no package that imports from its own floor or from above.
"""

import argparse
import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "rmtension"

# What is at the top of the library, by floors. A package imports only from lower floors.
FLOORS = [
    ["_repr_html", "errors"],
    ["_arguments", "distributed"],
    ["_progress", "_sites", "store"],
    ["data"],
    ["evaluation"],
    ["models", "neurons"],
    ["passes"],
    ["interventions"],
    ["reward_head"],
    ["attribution"],
    ["study"],
    ["plots", "training"],
    ["report", "synthetic"],
    ["cli", "rmtension"],
]


@dataclass(frozen=True)
class Graph:
    """The lines of every module, and the modules that it imports."""

    lines: dict[str, int]
    arrows: dict[str, set[str]]

    def by_package(self) -> "Graph":
        """The same between packages; a module at the top stands for itself."""
        place = {module: module.partition(".")[0] for module in self.lines}
        lines = dict.fromkeys(place.values(), 0)
        arrows: dict[str, set[str]] = {package: set() for package in lines}
        for module, package in place.items():
            lines[package] += self.lines[module]
            arrows[package] |= {place[target] for target in self.arrows[module]} - {package}
        return Graph(lines, arrows)


def read_graph(folder: Path) -> Graph:
    """The graph of the package in `folder`: modules by their names in it, its own `__init__` by the folder's name."""
    files = {_name_of(path.relative_to(folder)) or folder.name: path for path in sorted(folder.rglob("*.py"))}
    texts = {module: path.read_text(encoding="utf-8") for module, path in files.items()}
    arrows = {}
    for module, text in texts.items():
        inside = [folder.name, *files[module].relative_to(folder).parts[:-1]]
        names = {name for node in ast.walk(ast.parse(text)) for name in _imported(node, inside)}
        arrows[module] = {found for name in names if (found := _module(name, folder.name, files))} - {module}
    return Graph({module: text.count("\n") for module, text in texts.items()}, arrows)


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, largest first (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for target in sorted(arrows[node]):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            start = stack.index(node)
            if len(stack) - start > 1:
                found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(arrows):
        if node not in number:
            visit(node)
    return sorted(found, key=lambda circle: (-len(circle), circle))


def floors(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Nodes by the longest way down from them; those of a circle stand together."""
    circle_of = {node: tuple(circle) for circle in circles(arrows) for node in circle}
    height: dict[tuple[str, ...], int] = {}

    def measure(members: tuple[str, ...]) -> int:
        if members not in height:
            below = {circle_of.get(target, (target,)) for node in members for target in arrows[node]} - {members}
            height[members] = 1 + max(map(measure, below), default=-1)
        return height[members]

    found: dict[int, list[str]] = {}
    for node in sorted(arrows):
        found.setdefault(measure(circle_of.get(node, (node,))), []).append(node)
    return [found[floor] for floor in sorted(found)]


def not_downward(arrows: Mapping[str, Iterable[str]], given: Iterable[Iterable[str]]) -> list[str]:
    """The arrows that do not lead to a lower one of the `given` floors, and the nodes that are on no floor."""
    floor_of = {node: floor for floor, nodes in enumerate(given) for node in nodes}
    missing = [f"{node} is on no floor" for node in sorted(arrows) if node not in floor_of]
    return missing + [
        f"{node} (floor {floor_of[node] + 1}) imports from {target} (floor {floor_of[target] + 1})"
        for node in sorted(arrows)
        for target in sorted(arrows[node])
        if node in floor_of and target in floor_of and floor_of[target] >= floor_of[node]
    ]


def _name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.AST, inside: list[str]) -> Iterable[str]:
    """The full names that an import statement in the package `inside` may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = inside[: len(inside) - node.level + 1] if node.level else []
        source = ".".join([*start, *([node.module] if node.module else [])])
        return [f"{source}.{alias.name}" for alias in node.names]
    return []


def _module(name: str, package: str, modules: Iterable[str]) -> str | None:
    """The longest beginning of `name` that is a module; None for another library."""
    parts = name.split(".")
    if parts[0] != package:
        return None
    inside = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
    return next((one for one in inside if one in modules), package)


def describe(graph: Graph, *, each_module: bool = False) -> str:
    """All of it as text."""
    packages = graph.by_package()
    said = [f"{sum(graph.lines.values())} lines"]
    for what, one in (("modules", graph), ("packages", packages)):
        n_arrows, levels, found = sum(map(len, one.arrows.values())), floors(one.arrows), circles(one.arrows)
        said.append(f"{len(one.lines)} {what}, {n_arrows} arrows between them, floors: {len(levels)}")
        said.append(f"circles of {what}: {len(found)}")
        said += [f"  of {len(circle)}: {' '.join(circle)}" for circle in found]
    for what, one in (("package", packages), *([("module", graph)] if each_module else [])):
        width = max(map(len, one.lines))
        said.append(f"floor, {what}, lines -> what it imports")
        for number, level in enumerate(floors(one.arrows), 1):
            for name in level:
                below = " ".join(sorted(one.arrows[name])) or "-"
                said.append(f"{number:3} {name:{width}} {one.lines[name]:6} -> {below}")
    return "\n".join(said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--modules", action="store_true", help="every module too")
    options = parser.parse_args()
    print(describe(read_graph(options.root / NAME), each_module=options.modules))
