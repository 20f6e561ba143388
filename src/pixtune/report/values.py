"""Formats values of the report in words."""

from __future__ import annotations

import json

from pixtune.hardware.facts import GIB


def format_plain(value: object) -> str:
    """Formats numbers with thousands separators, truth values as yes and no, the rest as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "left to PyTorch"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}" if isinstance(value, float) else str(value)


def format_decision(key: str, value: object) -> tuple[str, str]:
    """Formats a name and a value of the plan in words; bytes in GiB."""
    if key.endswith("_bytes") and isinstance(value, int):
        return key.removesuffix("_bytes").replace("_", " "), f"{value / GIB:.2f} GiB" if value else "not estimated"
    return key.replace("_", " "), format_plain(value)


def format_setting(value: object) -> str:
    """Formats a value as it would stand in the YAML."""
    if isinstance(value, list | tuple):
        return "\n".join(f"- {format_setting(item)}" for item in value) or "[]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def format_percent(share: float) -> str:
    """Formats a change with its sign, for example −16.1%."""
    return f"{share:+.1%}".replace("-", "−")


def format_seconds(seconds: float) -> str:
    """Formats a short time with three digits."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s"
