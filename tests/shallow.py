"""The shipped small models with fewer blocks, for runs whose tests ask for no good picture: they take half the time."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

ASSETS = Path(__file__).resolve().parent.parent / "assets"
LENGTHS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
"""List of blocks -> the config's key for its length."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@cache
def shallow_model(name: str, num_blocks: int = 2) -> Path:
    """Returns a folder with the first blocks of each kind of a model of `assets/`; its other parts are the model's own.

    It is made once in a process, and is not to be changed.
    """
    folder = Path(tempfile.mkdtemp(prefix="pixtune-shallow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(ASSETS / name, folder / name)
    cut_blocks(folder / name / "transformer", num_blocks)
    return folder / name


def cut_blocks(transformer: Path, num_blocks: int) -> None:
    """Takes all but the first blocks of each kind out of a transformer's folder."""
    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    config |= {key: min(num_blocks, config[key]) for key in LENGTHS.values() if key in config}
    (transformer / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def stays(tensor: str) -> bool:
        blocks, _, rest = tensor.partition(".")
        return blocks not in LENGTHS or int(rest.split(".")[0]) < num_blocks

    with safe_open(transformer / WEIGHTS, framework="pt") as file:
        kept = {tensor: file.get_tensor(tensor) for tensor in file.keys() if stays(tensor)}  # noqa: SIM118
        about = file.metadata()
    (transformer / WEIGHTS).unlink()
    save_file(kept, transformer / WEIGHTS, about)
