"""Opens model folders in diffusers' layout, reads their configs and names their content.

Only safetensors and JSON are ever read from a user's path, and a download takes only those plus tokenizer text.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pixtune.config.model_parts import ModelParts
from pixtune.errors import WeightsError
from pixtune.inputs.misspelt import did_you_mean
from pixtune.inputs.reading import MEBIBYTE, check_regular, read_bounded
from pixtune.storage.config_bounds import check_config
from pixtune.storage.file_kinds import kind_of_bytes
from pixtune.storage.files import remembered_digest
from pixtune.storage.shipped import spelling_hint

if TYPE_CHECKING:
    from pixtune.storage.transformer_file import TransformerFile

MODEL_INDEX = "model_index.json"
MODEL_KEY = "pretrained_model_name_or_path"
READ_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Endings of the files that a model folder needs, and of all that are taken from one."""
HUB_PATTERNS = (MODEL_INDEX, *(f"*/*{suffix}" for suffix in READ_SUFFIXES))
"""Files of a download: the components' folders alone. FLUX.1 has its weights beside them again, in a file of 24 GB."""
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
VARIANT_NAME = re.compile(r"[^.]+\.(?P<variant>[^.]+?)(-\d{5}-of-\d{5})?\.safetensors")
"""Name of a file of another number format, such as model.fp16.safetensors. It may lie beside the plain one, which the
stock pipelines take where nobody asks for the variant."""
LARGEST_JSON_BYTES = 16 * MEBIBYTE
"""Size that no config or index reaches: an index of a hundred thousand tensors has 10 MiB. Python needs thirty times as
much for JSON of nothing but brackets."""
LONGEST_HEADER_BYTES = 16 * MEBIBYTE
"""Length that no model's safetensors header reaches; as `LARGEST_JSON_BYTES`."""


class ComponentConfig(dict[str, Any]):
    """A component's config, whose missing keys are an error of the file that it was read from."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise WeightsError(f"{self.file} has no {key}, which the model needs. Fetch the model again.")


@dataclass(frozen=True)
class ModelFolder:
    """Local folder as `DiffusionPipeline.save_pretrained` writes it; some of its parts may lie elsewhere."""

    path: Path
    parts: Mapping[str, Path] = field(default_factory=dict, kw_only=True)
    """Folders of the parts that lie elsewhere, by the parts' names."""
    file: TransformerFile | None = field(default=None, kw_only=True)
    """The transformer, where it is one file; None: it is the part of that name."""
    given_index: Mapping[str, Any] | None = field(default=None, kw_only=True)
    """Content of a `model_index.json` for parts that no folder holds together; None: the folder has one."""

    @cached_property
    def index(self) -> dict[str, Any]:
        """Content of `model_index.json`."""
        return read_json(self.path / MODEL_INDEX) if self.given_index is None else dict(self.given_index)

    def part(self, component: str) -> Path:
        """Returns the folder of a component."""
        return self.parts.get(component, self.path / component)

    def place(self, component: str) -> Path:
        """Returns the folder or file with a component's weights."""
        return self.file.path if component == "transformer" and self.file is not None else self.part(component)

    @property
    def pipeline_class(self) -> str:
        return str(self.index.get("_class_name", "folder without a pipeline class"))

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts that the index lists."""
        return tuple(name for name, kind in self.index.items() if isinstance(kind, list) and len(kind) == 2 and kind[0])

    def component_config(self, component: str) -> dict[str, Any]:
        """Reads a component's own config: `config.json`, or `scheduler_config.json` for the scheduler.

        Raises:
            WeightsError: it is none, or holds numbers that no model has.
        """
        file = self.config_file(component)
        if component == "transformer" and self.file is not None:
            return ComponentConfig(file, self.file.config)
        config = read_json(file)
        check_config(file, config)
        return ComponentConfig(file, config)

    def config_file(self, component: str) -> Path:
        """Returns the file that a component's config is read from."""
        if component == "transformer" and self.file is not None:
            return self.file.path
        return self.part(component) / ("scheduler_config.json" if component == "scheduler" else "config.json")

    def num_parameters(self, component: str) -> int:
        """Counts the parameters of a component, from its safetensors headers alone."""
        return sum(math.prod(shape) for shape in self.shapes(component).values())

    def shapes(self, component: str) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of a component's tensors, from its safetensors headers alone.

        Raises:
            WeightsError: files are missing, cut off or of another format.
        """
        if component == "transformer" and self.file is not None:
            return self.file.shapes
        return {
            name: tuple(tensor["shape"])
            for file in weight_files(self.part(component))
            for name, tensor in read_header(file).items()
            if name != "__metadata__"
        }

    def has_weights(self, component: str) -> bool:
        """Returns whether any weight file of a component is there."""
        if component == "transformer" and self.file is not None:
            return True
        return any(self.part(component).glob("*.safetensors"))

    def count_parameters(self, component: str) -> int | None:
        """Counts the parameters of a component as `num_parameters` does, or from the index where it is alone.

        An index states bytes, of weights in 16 bits.

        Returns:
            None where neither files nor an index are there.
        """
        if self.has_weights(component):
            return self.num_parameters(component)
        for index in self.part(component).glob(f"*{INDEX_SUFFIX}"):
            try:
                return int(read_json(index)["metadata"]["total_size"]) // 2
            except (KeyError, TypeError, ValueError) as error:
                raise WeightsError(f"{index} has no total_size in its metadata. Fetch the model again.") from error
        return None

    def fingerprint(self, component: str, memo_dir: Path | None = None) -> str:
        """Returns the SHA-256 over the names and bytes of a component's files, as hex.

        Hashing 16 GB takes a while, so digests of large files are remembered in `memo_dir` under path, size and
        modification time in nanoseconds.
        """
        digest = hashlib.sha256()
        for file in sorted(self.part(component).iterdir()):
            if file.suffix in READ_SUFFIXES:
                digest.update(f"{file.name}\0{remembered_digest(file, memo_dir)}\0".encode())
        return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with a model's weights, in the order of their names: those of its index, or the only one.

    Where variants lie side by side, the plain one is taken, as the stock pipelines do.

    Raises:
        WeightsError: there are no weights, no index where one is needed, not all files that the index names, or several
            variants and none of them plain.
    """
    index = weight_index(folder)
    if index is None:
        return [_only_file(folder)]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index} has no weight_map from tensors to files. Fetch the model again.")
    names = sorted(set(places.values()))
    if not names:
        raise WeightsError(f"{index} names no files. Fetch the model again.")
    if outside := [name for name in names if not _is_plain_name(name)]:
        raise WeightsError(
            f"{index} names a file outside its folder, {outside[0]!r}. Nothing else is read. Fetch the model again, "
            "from where you trust."
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise WeightsError(
            f"{folder} lacks {len(absent)} of {len(names)} files that {index.name} names: {', '.join(absent[:5])}. "
            "Was the download interrupted? Fetch the model again."
        )
    return [folder / name for name in names]


def weight_index(folder: Path) -> Path | None:
    """Returns the index of a model in several files; None where there is none.

    Raises:
        WeightsError: there are several, and none is plain.
    """
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    plain = [index for index in indexes if "." not in index.name.removesuffix(INDEX_SUFFIX)]
    if len(plain or indexes) > 1:
        raise WeightsError(
            f"{folder} has several indexes: {', '.join(index.name for index in plain or indexes)}. Leave that of the "
            "variant to train."
        )
    whole = [name for name in _weight_names(folder) if VARIANT_NAME.fullmatch(name) is None]
    if not plain and whole and not any(SHARD_NAME.search(name) for name in whole):
        return None  # the plain weights are one file, and the index is that of a variant
    return next(iter(plain or indexes), None)


def variant_of(files: Sequence[Path]) -> str | None:
    """Returns the variant that weight files are of, as the libraries' `from_pretrained` takes it; None: plain."""
    found = VARIANT_NAME.fullmatch(files[0].name)
    return found["variant"] if found else None


def _weight_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _is_plain_name(name: str) -> bool:
    """Returns whether a name has no folder in it, on any system."""
    return name not in ("", ".", "..") and PureWindowsPath(name).name == name


def _only_file(folder: Path) -> Path:
    """Returns the one file with weights of a folder without an index, or the plain one among variants."""
    names = _weight_names(folder)
    names = [name for name in names if VARIANT_NAME.fullmatch(name) is None] or names
    if len(names) == 1 and not SHARD_NAME.search(names[0]):
        return folder / names[0]
    if names and all(VARIANT_NAME.fullmatch(name) for name in names):
        raise WeightsError(f"{folder} holds several variants of the weights: {', '.join(names)}. Leave one of them.")
    if names:
        raise WeightsError(
            f"{folder} holds {', '.join(names)} and no *{INDEX_SUFFIX} that says what belongs together. Was "
            "a download, or saving, interrupted?"
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern))
    found = f"only {', '.join(pickles)}, which may run any code when they are read" if pickles else "no weights"
    raise WeightsError(f"{folder} holds {found}. A folder with .safetensors files is needed.")


def open_model_folder(name_or_path: str, replaced: Collection[str] = (), key: str = MODEL_KEY) -> ModelFolder:
    """A local folder, or a hub name that is downloaded into the hub's own cache.

    Args:
        replaced: names of parts that come from elsewhere: they may be missing, and their weights are not downloaded.
        key: what an error calls the key of the config that names the model.

    Raises:
        WeightsError: nothing there, or no diffusers pipeline in it; says what was found and what is needed.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if is_file_name(name_or_path) or name_or_path.startswith((".", "/", "~")):
            raise WeightsError(f"{key}: there is no {path.absolute()}.{did_you_mean(path)} {PIPELINE_NEEDED}")
        path = _download(name_or_path, replaced, key)
    if not (path / MODEL_INDEX).is_file():
        raise WeightsError(_not_a_pipeline(path))
    folder = ModelFolder(path)
    if outside := [part for part in folder.components if not _is_plain_name(part)]:
        raise WeightsError(f"{path / MODEL_INDEX} names a part outside its folder, {outside[0]!r}. Fetch it again.")
    missing = [part for part in folder.components if not (path / part).is_dir() and part not in replaced]
    if missing:
        raise WeightsError(
            f"{path} is a {folder.pipeline_class}, but its folders {', '.join(missing)} are missing. "
            "Was the download interrupted? Fetch it again."
        )
    return folder


def is_file_name(name: str) -> bool:
    """Returns whether a name that nothing stands under can only have been meant as a file's."""
    return Path(name).suffix.lower() in (
        ".safetensors",
        ".gguf",
        ".ckpt",
        ".pt",
        ".pth",
        ".bin",
        ".sft",
        ".json",
        ".png",
    )


def lies_here(name_or_path: str, parts: ModelParts) -> bool:
    """Returns whether a model is on this machine under the paths that name it, so that opening it fetches nothing."""
    sources = [name_or_path, *([] if parts.others is None else [parts.others])]
    return all(Path(source).expanduser().exists() for source in sources)


def _download(name: str, replaced: Collection[str], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        unwanted = [f"{part}/*.safetensors*" for part in replaced]
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS), ignore_patterns=unwanted or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(
            f"{key}: {name!r} is no folder here ({Path(name).absolute()}) and could not be "
            f"fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0]}).{spelling_hint(name)} Give a "
            f"local folder in diffusers' layout, or fetch the model with `{download_command(name)}`; a model behind a "
            "licence asks for `hf auth login` before."
        ) from error


def download_command(name: str, patterns: Sequence[str] = (MODEL_INDEX, "*/*")) -> str:
    """Returns the command line that fetches a model of the hub, or those of its files that match `patterns`."""
    return " ".join(["hf", "download", name, *(f'--include "{pattern}"' for pattern in patterns)])


PIPELINE_NEEDED = (
    "A folder in diffusers' layout, with model_index.json, is needed, or a name of the hub such as Qwen/Qwen-Image."
)


def _not_a_pipeline(path: Path) -> str:
    need = PIPELINE_NEEDED
    if path.is_file():
        return f"{path} is a single file. {need}"
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        kind = config.get("_class_name") or ", ".join(config.get("architectures", [])) or "model"
        return f"{path} holds one {kind} (it has config.json but no model_index.json), not an image pipeline. {need}"
    files = sorted(file.name for file in path.glob("*.safetensors"))
    named = f" It has {', '.join(files[:3])}{' ...' * (len(files) > 3)}: is one of them meant?" if files else ""
    return f"{path} has no model_index.json.{named} {need}"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        WeightsError: there is no such file, or it is no JSON object; names it.
    """
    try:
        content = json.loads(read_bounded(path, LARGEST_JSON_BYTES).decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing. Was the download interrupted? Fetch the model again.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise WeightsError(f"{path} is not valid JSON ({error}). Fetch the model again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object but a {type(content).__name__}. Fetch the model again.")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_header(file: Path) -> dict[str, Any]:
    """Reads the header of a safetensors file: tensor name -> dtype, shape and offsets.

    The format: 8 bytes that hold the header's length, then the header as JSON.

    Raises:
        WeightsError: the file is cut off or no safetensors file.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= LONGEST_HEADER_BYTES else b""
        header = json.loads(text)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is no safetensors file but {kind_of_bytes(file)}.") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{file} has a damaged header: {type(header).__name__}, not names. Fetch the model again.")
    for name, place in header.items():
        if name != "__metadata__" and not _is_place(place):
            raise WeightsError(f"{file} has a damaged header at {name} ({place!r:.100}). Fetch the model again.")
    return header


def _is_place(place: object) -> bool:
    """Returns whether an entry of a safetensors header has the form of one."""
    if not isinstance(place, dict) or not isinstance(place.get("dtype"), str):
        return False
    shape, offsets = place.get("shape"), place.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    return len(offsets) == 2 and all(type(number) is int for number in (*shape, *offsets))
