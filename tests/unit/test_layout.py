"""Rules of the house that a machine can keep: sizes, import direction, names, side effects (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "pixtune"


def module_name(path: Path) -> str:
    """Dotted, without the package itself: "plan.memory", "config", "" for the package."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SRC.rglob("*.py"))}


def running_code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    yield tree
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(tree):
        yield from running_code(child)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every absolute module name that is imported, also inside functions; `from a import b` gives a and a.b."""
    for node in running_code(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, from pixtune.x"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST) -> set[str]:
    """Modules of pixtune that are imported, without the package's name."""
    names = {name.removeprefix("pixtune.") for name in imported(tree) if name.startswith("pixtune.")}
    return {name for name in names if name in MODULES}


def every_import(tree: ast.AST) -> set[str]:
    """As `ours`, with those under `if TYPE_CHECKING`: a type is a dependency of the reader."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    names = {name.removeprefix("pixtune.") for name in names if name.startswith("pixtune.")}
    return {name for name in names if name in MODULES}


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# ---- size


def test_no_file_is_too_long_to_read_in_one_go():
    too_long = {
        str(path.relative_to(ROOT)): length
        for path in SRC.rglob("*.py")
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not too_long, f"over 400 lines, split by what the parts do: {too_long}"


def test_root_scripts_only_call_the_package():
    too_long = [path.name for path in ROOT.glob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 15]
    assert not too_long, f"over 15 lines: {too_long}; what a script does belongs into src/pixtune"


# ---- import direction

ROOMS = [
    "inputs",
    "errors",
    "console",
    "sizes",
    "late",
    "randomness",
    "config",
    "objective",
    "hardware",
    "progress",
    "launch",
    "storage",
    "family",
    "plan",
    "engine",
    "families",
    "trained",
    "deltas",
    "planning",
    "sampler",
    "judging",
    "data",
    "migration",
    "captioning",
    "tracking",
    "report",
    "runs",
    "queue",
    "run",
    "services",
    "assembly",
    "train",
    "bench",
    "commands",
    "ui",
    "cli",
]
"""Rooms, from the ground up: a folder, or a module that stands alone at the top. Each may import those before it."""
TORCH_FREE = {"config", "plan"}
"""Rooms that import neither torch nor a model's library, so that checking and planning take no seconds."""
MODEL_CODE = {"diffusers", "transformers", "accelerate", "peft", "bitsandbytes"}
FREE_OF_MODELS = {*TORCH_FREE, "objective", "randomness", "hardware", "storage", "sizes", "errors", "inputs"}
MAY_IMPORT_THE_LOOP = {"cli", "bench"}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES if module} == set(ROOMS)
    alone = [module for module in MODULES if module and "." not in module and module in ROOMS]
    assert len([module for module in alone if not (SRC / module).is_dir()]) <= 15, "too many modules at the top"


def test_every_room_says_what_it_is_for():
    folders = [module for module in MODULES if module and (SRC / module.replace(".", "/")).is_dir()]
    silent = [module for module in folders if not ast.get_docstring(MODULES[module])]
    assert not silent, f"{silent}: a sentence in __init__.py says what is in there and where to begin"


def test_rooms_import_only_what_lies_below_them():
    found = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        for name in every_import(tree)
        if module and name and ROOMS.index(room(name)) > ROOMS.index(room(module))
    ]
    assert not found, f"{found}; the order of the house is ROOMS, above"


def test_planning_rooms_know_neither_torch_nor_a_model_library():
    found = [
        f"{module} imports {name}"
        for module, tree in MODULES.items()
        if room(module) in FREE_OF_MODELS
        for name in imported(tree)
        if within(name, MODEL_CODE | ({"torch"} if room(module) in TORCH_FREE else set()))
    ]
    assert not found, f"{found}; what needs a model or a device belongs into engine/ or families/"


def test_only_the_command_line_and_the_benchmark_import_the_loop():
    found = [m for m, tree in MODULES.items() if "train" in every_import(tree) and room(m) not in MAY_IMPORT_THE_LOOP]
    assert not found, f"{found} import train: pass in what is needed instead"


def test_no_module_imports_itself_by_a_detour():
    waiting = {module: every_import(tree) - {module} for module, tree in MODULES.items()}
    while ready := {module for module, needs in waiting.items() if not needs}:
        waiting = {module: needs - ready for module, needs in waiting.items() if module not in ready}
    assert not waiting, f"these import each other in a circle, or wait for one that does: {waiting}"


# ---- names

FAMILY_WORDS = re.compile("qwen|flux", re.IGNORECASE)


def test_model_families_are_named_only_in_their_own_package():
    """Prose (docstrings, messages) may name them; identifiers, imports and one-word strings may not.

    `migration` translates keys and names that other trainers have, models' names among them; what it writes is checked
    as any config, and no other room asks it for anything.
    """
    found = []
    for module, tree in MODULES.items():
        if within(module, {"families", "migration"}):
            continue
        for node in ast.walk(tree):
            words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module", "value")]
            found += [
                f"{module}, line {getattr(node, 'lineno', '?')}: {word}"
                for word in words
                if isinstance(word, str) and not re.search(r"\s", word) and FAMILY_WORDS.search(word)
            ]
    assert not found, f"{found}; what differs between families goes behind family.ModelFamily"


MID_SENTENCE = re.compile(
    r"(Of|The same|As|Those|These|Its?|They|See|Likewise|Besides|On top|None|Most|Least)\b"
    r"|(What|How|Where|When|While|Which)\b"
)


def test_docstrings_stand_alone_in_a_hover_window():
    """An opening such as "Of those" or "What it needs" is the end of a sentence that a reader cannot see there."""
    found = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            for line in body if isinstance(body, list) else ():
                if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
                    text = line.value.value
                    if isinstance(text, str) and MID_SENTENCE.match(text.strip()):
                        found.append(f"{module}, line {line.lineno}: {text.strip()[:40]}")
    assert not found, f"{found}; begin with a verb or a noun (CONTRIBUTING.md)"


# ---- errors and side effects


MAY_CATCH_ALL = {"tracking.problems"}
"""The one place that reports whatever a service raises, so that it costs no step."""


def test_nothing_swallows_every_error():
    found = []
    for module, tree in MODULES.items():
        if module in MAY_CATCH_ALL:
            continue
        for node in ast.walk(tree):
            # One that ends by raising an error of ours swallows nothing: libraries raise anything on damaged files.
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else set()
                if node.type is None or caught & {"Exception", "BaseException"}:
                    found.append(f"{module}, line {node.lineno}")
    assert not found, f"{found}: name the errors that can be dealt with there, let the others go on"


AT_USE = {"engine.step_kernels", "engine.triton_kernels"}
"""Modules that need what CUDA builds alone have: imported inside the functions that use them."""
CUDA_ONLY = {"triton", "fastsafetensors", "flash_attn"}


def test_what_cuda_builds_alone_have_is_imported_at_use():
    found = []
    for module, tree in MODULES.items():
        top = ast.Module(body=[n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], type_ignores=[])
        if module not in AT_USE:
            found += [f"{module} imports {name}" for name in imported(top) if within(name, CUDA_ONLY)]
        found += [f"{module} imports {name}" for name in ours(top) & AT_USE]
    assert not found, f"{found}: pixtune must import on any machine"


def test_importing_changes_nothing():
    code = """
import importlib, os, signal, sys, logging, warnings
import accelerate, diffusers, peft, torch, transformers  # what these do on import is theirs

def state():
    flags = {
        "default dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "CUDA initialized": torch.cuda.is_initialized(),
        "random state": torch.random.get_rng_state().sum().item(),
        "environment": dict(os.environ),
        "root log handlers": list(logging.getLogger().handlers),
        "signal handlers": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "folder": (os.getcwd(), sorted(os.listdir())),
    }
    return flags

before = state()
for module in sys.argv[1:]:
    importlib.import_module(module)
after = state()
changed = [name for name in before if before[name] != after[name]]
sys.exit(f"importing pixtune changes: {changed}" if changed else 0)
"""
    modules = [f"pixtune.{module}".rstrip(".") for module in MODULES if module not in AT_USE]
    result = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---- every file


def text_files() -> Iterator[Path]:
    skipped, hidden = {"build", "dist", "assets", "__pycache__", "node_modules"}, {".ci", ".github"}
    for folder, folders, files in os.walk(ROOT):
        if Path(folder) == ROOT:  # what the shipped configs read and write; rooms may have these names
            folders[:] = [name for name in folders if name not in {"runs", "dataset", "samples"}]
        folders[:] = [name for name in folders if name not in skipped and (not name.startswith(".") or name in hidden)]
        for name in files:
            path = Path(folder, name)
            if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ""} and path != Path(
                __file__
            ):
                yield path


def test_no_file_knows_a_machine_or_a_package_registry():
    private = re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|/root/|/work/|/opt/|/home/(?!USER)|C:\\Users"
    )
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := private.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, f"works only here, or names a registry: {found}"


def test_the_file_tour_has_a_line_for_every_module_and_script():
    tour = (ROOT / "docs" / "file_tour.md").read_text(encoding="utf-8")
    folders = [*(ROOT / name for name in ("", "scripts", "benchmarks", "utils", "image_datasets", "train_configs"))]
    paths = [*SRC.rglob("*.py"), *(path for folder in folders for path in folder.glob("*.*"))]
    names = {path.name for path in paths if path.suffix in {".py", ".yaml"}} - {"__init__.py"}
    missing = [name for name in names if not re.search(rf"(^|[\s/]){re.escape(name)}\s", tour, re.MULTILINE)]
    assert not missing, f"docs/file_tour.md has no line for {sorted(missing)}"


def test_the_file_tour_names_nothing_that_is_gone():
    tour = (ROOT / "docs" / "file_tour.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^[\s\w/]*?(\w+\.(?:py|yaml|md))\s", tour, re.MULTILINE))
    there = {path.name for path in text_files()} | {Path(__file__).name}
    assert len(named) > 100 and not named - there
