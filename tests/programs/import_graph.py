"""The imports between modules and between packages, their floors and their circles.

    python tests/programs/import_graph.py [--root PATH] [--modules]

prints how many modules and packages a checkout has, the imports between packages, the floors, and the circles.
Imports at the top of a module, inside a function and under `TYPE_CHECKING` all count. `tests/test_package.py` checks
that modules do not import each other in a circle, and that packages import only from lower floors.
"""

import argparse
import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "rmtension"

# The packages and modules at the top of the library, by floor. A package imports only from lower floors.
FLOORS = [
    ["_repr_html", "errors"],
    ["_arguments", "distributed"],
    ["_progress", "_sites", "store"],
    ["data"],
    ["bodies", "evaluation"],
    ["heads", "neurons"],
    ["models"],
    ["passes"],
    ["interventions"],
    ["reward_head"],
    ["attribution"],
    ["study"],
    ["plots", "training"],
    ["repair"],
    ["report", "synthetic"],
    ["replication"],
    ["cli", "rmtension"],
]


@dataclass(frozen=True)
class Graph:
    """The lines of every module, and the modules that it imports."""

    lines: dict[str, int]
    arrows: dict[str, set[str]]

    def by_package(self) -> "Graph":
        """The graph of the packages; a module at the top counts as a package."""
        package_of = {module: module.partition(".")[0] for module in self.lines}
        lines = dict.fromkeys(package_of.values(), 0)
        arrows: dict[str, set[str]] = {package: set() for package in lines}
        for module, package in package_of.items():
            lines[package] += self.lines[module]
            arrows[package] |= {package_of[target] for target in self.arrows[module]} - {package}
        return Graph(lines, arrows)


def read_graph(folder: Path) -> Graph:
    """The graph of the package in `folder`; its own `__init__` has the folder's name."""
    files = {_name_of(path.relative_to(folder)) or folder.name: path for path in sorted(folder.rglob("*.py"))}
    texts = {module: path.read_text(encoding="utf-8") for module, path in files.items()}
    arrows = {}
    for module, text in texts.items():
        inside = [folder.name, *files[module].relative_to(folder).parts[:-1]]
        names = {name for node in ast.walk(ast.parse(text)) for name in _imported(node, inside)}
        arrows[module] = {target for name in names if (target := _module(name, folder.name, files))} - {module}
    return Graph({module: text.count("\n") for module, text in texts.items()}, arrows)


def circles(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, largest first (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components = []

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
                components.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(arrows):
        if node not in number:
            visit(node)
    return sorted(components, key=lambda circle: (-len(circle), circle))


def floors(arrows: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Nodes by the length of their longest path down; the nodes of a circle are on one floor."""
    circle_of = {node: tuple(circle) for circle in circles(arrows) for node in circle}
    height: dict[tuple[str, ...], int] = {}

    def measure(members: tuple[str, ...]) -> int:
        if members not in height:
            below = {circle_of.get(target, (target,)) for node in members for target in arrows[node]} - {members}
            height[members] = 1 + max(map(measure, below), default=-1)
        return height[members]

    nodes_at: dict[int, list[str]] = {}
    for node in sorted(arrows):
        nodes_at.setdefault(measure(circle_of.get(node, (node,))), []).append(node)
    return [nodes_at[floor] for floor in sorted(nodes_at)]


def not_downward(arrows: Mapping[str, Iterable[str]], given: Iterable[Iterable[str]]) -> list[str]:
    """The imports that do not lead to a lower one of the `given` floors, and the nodes that have no floor."""
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
    return next((module for module in inside if module in modules), package)


def describe(graph: Graph, *, each_module: bool = False) -> str:
    """The graph as text."""
    packages = graph.by_package()
    lines = [f"{sum(graph.lines.values())} lines"]
    for kind, part in (("modules", graph), ("packages", packages)):
        n_arrows, levels, in_circles = sum(map(len, part.arrows.values())), floors(part.arrows), circles(part.arrows)
        lines.append(f"{len(part.lines)} {kind}, {n_arrows} arrows between them, floors: {len(levels)}")
        lines.append(f"circles of {kind}: {len(in_circles)}")
        lines += [f"  of {len(circle)}: {' '.join(circle)}" for circle in in_circles]
    for kind, part in (("package", packages), *([("module", graph)] if each_module else [])):
        width = max(map(len, part.lines))
        lines.append(f"floor, {kind}, lines -> what it imports")
        for number, level in enumerate(floors(part.arrows), 1):
            for name in level:
                below = " ".join(sorted(part.arrows[name])) or "-"
                lines.append(f"{number:3} {name:{width}} {part.lines[name]:6} -> {below}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout (default: the checkout of this file)")
    parser.add_argument("--modules", action="store_true", help="print every module too")
    options = parser.parse_args()
    print(describe(read_graph(options.root / NAME), each_module=options.modules))
