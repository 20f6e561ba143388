"""Opens model folders in diffusers' layout, reads their configs and names their content.

Only safetensors and JSON are ever read from a user's path, and a download takes only those plus tokenizer text.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixtune.errors import WeightsError
from pixtune.storage.files import file_digest, write_if_possible
from pixtune.storage.shipped import spelling_hint

MODEL_INDEX = "model_index.json"
READ_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Endings of the files that a model folder needs, and of all that are taken from one."""
HUB_PATTERNS = (MODEL_INDEX, *(f"*/*{suffix}" for suffix in READ_SUFFIXES))
"""Files of a download: the components' folders alone. FLUX.1 has its weights beside them again, in a file of 24 GB."""
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


@dataclass(frozen=True)
class ModelFolder:
    """Local folder as `DiffusionPipeline.save_pretrained` writes it."""

    path: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """Content of `model_index.json`."""
        return read_json(self.path / MODEL_INDEX)

    @property
    def pipeline_class(self) -> str:
        return str(self.index.get("_class_name", "folder without a pipeline class"))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that the index lists."""
        return tuple(name for name, kind in self.index.items() if isinstance(kind, list) and len(kind) == 2 and kind[0])

    def component_config(self, component: str) -> dict[str, Any]:
        """Reads a component's own config: `config.json`, or `scheduler_config.json` for the scheduler."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_json(self.path / component / name)

    def num_parameters(self, component: str) -> int:
        """Counts the parameters of a component, from its safetensors headers alone."""
        count = 0
        for file in weight_files(self.path / component):
            for name, tensor in read_header(file).items():
                if name != "__metadata__":
                    count += math.prod(tensor["shape"])
        return count

    def has_weights(self, component: str) -> bool:
        """Returns whether any weight file of a component is there."""
        return any((self.path / component).glob("*.safetensors"))

    def count_parameters(self, component: str) -> int | None:
        """Counts the parameters of a component as `num_parameters` does, or from the index where it is alone.

        An index states bytes, of weights in 16 bits.

        Returns:
            None where neither files nor an index are there.
        """
        if self.has_weights(component):
            return self.num_parameters(component)
        for index in (self.path / component).glob(f"*{INDEX_SUFFIX}"):
            return int(read_json(index)["metadata"]["total_size"]) // 2
        return None

    def fingerprint(self, component: str, memo_dir: Path | None = None) -> str:
        """Returns the SHA-256 over the names and bytes of a component's files, as hex.

        Hashing 16 GB takes a while, so digests of large files are remembered in `memo_dir` under path, size and
        modification time in nanoseconds.
        """
        digest = hashlib.sha256()
        for file in sorted((self.path / component).iterdir()):
            if file.suffix in READ_SUFFIXES:
                digest.update(f"{file.name}\0{_remembered_digest(file, memo_dir)}\0".encode())
        return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with a model's weights, in the order of their names: those of its index, or the only one.

    Raises:
        WeightsError: there are no weights, no index where one is needed, or not all files that the index names.
    """
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indexes) > 1:
        names = ", ".join(index.name for index in indexes)
        raise WeightsError(f"{folder} has several indexes: {names}. Leave that of the variant to train.")
    if not indexes:
        return [_only_file(folder)]
    places = read_json(indexes[0]).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{indexes[0]} has no weight_map from tensors to files. Fetch the model again.")
    paths = [folder / name for name in sorted(set(places.values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise WeightsError(
            f"{folder} lacks {len(absent)} of {len(paths)} files that {indexes[0].name} names: {', '.join(absent)}. "
            "Was the download interrupted? Fetch the model again."
        )
    return paths


def _only_file(folder: Path) -> Path:
    """Returns the one file with weights of a folder without an index."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) == 1 and not SHARD_NAME.search(names[0]):
        return folder / names[0]
    if names:
        raise WeightsError(
            f"{folder} holds {', '.join(names)} and no *{INDEX_SUFFIX} that says what belongs together. Was "
            "a download, or saving, interrupted?"
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern))
    found = f"only {', '.join(pickles)}, which may run any code when they are read" if pickles else "no weights"
    raise WeightsError(f"{folder} holds {found}. A folder with .safetensors files is needed.")


def open_model_folder(name_or_path: str) -> ModelFolder:
    """A local folder, or a hub name that is downloaded into the hub's own cache.

    Raises:
        WeightsError: nothing there, or no diffusers pipeline in it; says what was found and what is needed.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        path = _download(name_or_path)
    if not (path / MODEL_INDEX).is_file():
        raise WeightsError(_not_a_pipeline(path))
    folder = ModelFolder(path)
    missing = [part for part in folder.components if not (path / part).is_dir()]
    if missing:
        raise WeightsError(
            f"{path} is a {folder.pipeline_class}, but its folders {', '.join(missing)} are missing. "
            "Was the download interrupted? Fetch it again."
        )
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"pretrained_model_name_or_path: {name!r} is no folder here ({Path(name).absolute()}) and could not be "
            f"fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]}).{spelling_hint(name)} Give a "
            f"local folder in diffusers' layout, or fetch the model with `{download_command(name)}`; a model behind a "
            "licence asks for `hf auth login` before."
        ) from error


def download_command(name: str, patterns: Sequence[str] = (MODEL_INDEX, "*/*")) -> str:
    """Returns the command line that fetches a model of the hub, or those of its files that match `patterns`."""
    return " ".join(["hf", "download", name, *(f'--include "{pattern}"' for pattern in patterns)])


def _not_a_pipeline(path: Path) -> str:
    need = "A diffusers pipeline folder with model_index.json is needed, for example Qwen/Qwen-Image."
    if path.is_file():
        return f"{path} is a single file. {need}"
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") or ", ".join(config.get("architectures", [])) or "model"
        return f"{path} holds one {kind} (it has config.json but no model_index.json), not an image pipeline. {need}"
    return f"{path} has no model_index.json. {need}"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        WeightsError: there is no such file, or it is not JSON; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing. Was the download interrupted? Fetch the model again.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not valid JSON ({error}). Fetch the model again.") from error


def read_header(file: Path) -> dict[str, Any]:
    """Reads the header of a safetensors file: tensor name -> dtype, shape and offsets.

    The format: 8 bytes that hold the header's length, then the header as JSON.

    Raises:
        WeightsError: the file is cut off or no safetensors file.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length < 2**28 else b""
    try:
        return json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{file} is no safetensors file, or cut off. Fetch the model again.") from error


def _remembered_digest(file: Path, memo_dir: Path | None) -> str:
    stat = file.stat()
    if memo_dir is None or stat.st_size < 64 * 2**20:
        return file_digest(file)
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    memo = memo_dir / f"{key}.sha256"
    # Written twice, so that damage shows: by a wrong digest, all encodings would be those of another model.
    remembered = memo.read_bytes().split() if memo.is_file() else []
    if len(remembered) == 2 and remembered[0] == remembered[1]:
        return remembered[0].decode()
    digest = file_digest(file)
    write_if_possible(memo, f"{digest}\n{digest}\n".encode())
    return digest
