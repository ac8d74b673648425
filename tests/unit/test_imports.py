"""Imports run one way: what each room of the package may know of the others."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dictionary_learning"

# A room imports from the rooms named beside it, and a room is named only below its own line: there is no way back.
MAY_IMPORT = {
    "files": "",
    "network": "",
    "threads": "",
    "kernels": "",
    "dictionary": "",
    "pretrained": "network",
    "tokenizer": "pretrained",
    "sites": "",
    "model": "pretrained sites threads tokenizer",
    "data": "",
    "world": "kernels",
    "trainers": "dictionary kernels",
    "sweep": "sites trainers",
    "formats": "dictionary files network",
    "utils": "formats",
    "start": "dictionary formats pretrained sites",
    "state": "files world",
    "buffer": "data sites world",
    "cache": "buffer files pretrained sites",
    "evaluation": "buffer dictionary model sites threads",
    "training": "dictionary files formats kernels sites threads trainers world",
    "tracking": "files",
    "plotting": "files",
    "model_card": "files plotting",
    "hub": "files model_card",
    "reading": "data files model sweep world",
    "results": "buffer dictionary evaluation files formats model reading sites sweep world",
    "report": "buffer data dictionary files formats model plotting reading results sites tokenizer",
    "plan": "cache data model reading sites start sweep world",
    "run": "buffer cache data dictionary files formats hub kernels model plan plotting reading report results sites "
    "start state sweep tracking training world",
}
# The order in which text walks.
TEXT = ["stream", "readers", "sources", "rows", "hub", "documents", "chats", "contexts", "batches"]


def imported(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, early or late, as parts of their path."""
    here, found = path.relative_to(PACKAGE).parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            parts = (*here[: len(here) - node.level + 1], *module)
        elif module[:1] == (PACKAGE.name,):
            parts = module[1:]
        else:
            continue
        found |= {parts} if module and parts else {(*parts, alias.name) for alias in node.names}
    return found


def test_every_room_imports_what_it_may_and_nothing_is_listed_in_vain():
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__", "assets"} == MAY_IMPORT.keys()
    for room, allowed in MAY_IMPORT.items():
        files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else (PACKAGE / room).rglob("*.py")
        known = {parts[0] for path in files for parts in imported(path)} - {room}
        assert known == set(allowed.split()), room


def test_no_room_is_known_to_one_above_it():
    above: set[str] = set()
    for room, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above, room
        above.add(room)


def test_text_walks_one_way():
    assert {path.stem for path in (PACKAGE / "data").glob("*.py")} == {"__init__", *TEXT}
    for i, stage in enumerate(TEXT):
        known = {parts[1] for parts in imported(PACKAGE / "data" / f"{stage}.py") if parts[0] == "data"}
        assert known <= set(TEXT[:i]), stage


def test_only_the_package_is_imported_by_its_rooms():
    """demo.py and demo_config.py sit on top: no room knows them."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {"demo", "demo_config"} & names, path
