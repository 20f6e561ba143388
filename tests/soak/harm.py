"""Damages files of a run as disks, people and other programs do."""

from __future__ import annotations

from pathlib import Path

from pixtune.storage.checkpoint_state import NAME

BLOCK = 4096


def harmed(kind: str, data: bytes, share: float) -> bytes | None:
    """Returns a file's bytes after damage, or None where it is deleted.

    Args:
        kind: one of `draws.HARMS` but "exchange".
        share: place of the damage, in [0, 1).
    """
    at = int(share * len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] if data else data
    if kind == "cut":
        return data[:at]
    if kind == "zero":
        at -= at % BLOCK
        return data[:at] + bytes(len(data[at : at + BLOCK])) + data[at + BLOCK :]
    return None if kind == "delete" else b""


def targets(output: Path, cache: Path, what: str) -> list[Path]:
    """Lists the files of a run that may be damaged, in an order that does not depend on random names."""
    files = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else []
    if what == "cache":
        return sorted((path for path in cache.rglob("*") if path.is_file()), key=lambda path: (path.suffix, path.name))
    in_checkpoint = [path for path in files if checkpoint_of(output, path) is not None]
    if what == "checkpoint":
        return in_checkpoint
    if what == "metrics":
        return [path for path in files if path.name == "metrics.jsonl"]
    return [path for path in files if path not in in_checkpoint]


def checkpoint_of(output: Path, path: Path) -> int | None:
    """Returns the step of the checkpoint that a file is part of; None where it is of none."""
    match = NAME.fullmatch(path.relative_to(output).parts[0]) if path.is_relative_to(output) else None
    return int(match[1]) if match else None


def apply_harm(output: Path, cache: Path, harm: tuple[str, str, float]) -> list[Path]:
    """Damages a file, or exchanges two of the same kind; returns those whose content is another than before."""
    what, kind, share = harm
    files = targets(output, cache, what)
    if not files:
        return []
    path = files[int(share * len(files))]
    before = path.read_bytes()
    if kind == "exchange":
        others = [other for other in files if other != path and other.suffix == path.suffix]
        if not others:
            return []
        other = others[int(share * 7919 % 1 * len(others))]
        after, path_of_other = other.read_bytes(), other
        if after == before:
            return []
        path.write_bytes(after)
        path_of_other.write_bytes(before)
        return [path, other]
    left = harmed(kind, before, share * 104729 % 1)
    if left == before:
        return []
    if left is None:
        path.unlink()
    else:
        path.write_bytes(left)
    return [path]
