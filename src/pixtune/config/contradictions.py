"""Finds keys that are each right and together wrong: one rule per contradiction, over plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pixtune.config.optimizing import RULES_OF_OPTIMIZERS, unread
from pixtune.config.streaming import RULES_OF_STREAMS


class Contradiction(NamedTuple):
    """Keys that are each right and together wrong."""

    keys: tuple[str, ...]
    sentence: str


def contradictions(values: Mapping[str, Any]) -> list[Contradiction]:
    """Returns every contradiction among `values` (dotted key -> value, defaults filled in).

    A rule whose keys are not all there is skipped, so that a value that is already known to be wrong causes no second
    problem.
    """
    found = []
    of_data = tuple((tuple(f"data_config.{key}" for key in keys), rule) for keys, rule in _RULES_OF_FOLDERS)
    for keys, rule in (*_RULES, *of_data):
        if all(key in values for key in keys):
            sentence = rule(*(values[key] for key in keys))
            if sentence is not None:
                found.append(Contradiction(keys, sentence))
    found += [Contradiction(keys, sentence) for keys, sentence in unread(values)]
    return found + _within_folders(values)


def _within_folders(all_values: Mapping[str, Any]) -> list[Contradiction]:
    """Returns the contradictions inside each item of `data_config.folders`, and of items with what is beside them."""
    found, folders = [], all_values.get("data_config.folders", ())
    for number, item in enumerate(folders if isinstance(folders, list | tuple) else ()):
        place, values = f"data_config.folders[{number}]", dict(item)
        if values.get("caption_source") is None and values.get("caption_text") is None:
            values["caption_source"] = all_values.get("data_config.caption_source")
        found += _one_place_of_pictures(place, values, number == 0 and all_values.get("data_config.cache_dir") is None)
        if values.get("img_size") is None:
            values["img_size"] = all_values.get("data_config.img_size")
        if values.get("control_dir") is not None and values.get("metadata_file") is not None:
            sentence = f"{place} has both control_dir and metadata_file: the file names its own controls"
            found.append(Contradiction((f"{place}.control_dir", f"{place}.metadata_file"), sentence))
        for keys, rule in _RULES_OF_FOLDERS:
            problem = rule(*(values.get(key) for key in keys))
            if problem is not None:
                found.append(Contradiction(tuple(f"{place}.{key}" for key in keys), f"{place}.{problem}"))
    return found


def _one_place_of_pictures(place: str, values: Mapping[str, Any], needs_cache: bool) -> list[Contradiction]:
    folder, dataset = values.get("img_dir"), values.get("dataset")
    keys = (f"{place}.img_dir", f"{place}.dataset", "data_config.folders")
    if folder is None and dataset is None:
        sentence = f"{place}.img_dir is required and missing: a folder of pictures; or name a dataset"
        return [Contradiction(keys, sentence)]
    if folder is not None and dataset is not None:
        return [Contradiction(keys, f"{place} has both img_dir and dataset: make two folders of them")]
    beside = [name for name in ("control_dir", "metadata_file") if values.get(name) is not None]
    if dataset is not None and beside:
        sentence = f"{place}.{beside[0]} is given beside dataset, whose columns hold captions and controls"
        return [Contradiction((f"{place}.{beside[0]}", *keys), sentence)]
    if dataset is not None and values.get("caption_source") == "file_name":
        sentence = f'{place}.caption_source is "file_name", and pictures within a dataset have no names of their own'
        return [Contradiction((f"{place}.caption_source", *keys), sentence)]
    if dataset is not None and needs_cache:
        sentence = f"{place}.dataset needs data_config.cache_dir, a folder for its pictures and encodings"
        return [Contradiction((*keys, "data_config.cache_dir"), sentence)]
    return []


def _some_pictures(folder: object, folders: Any) -> str | None:
    if folder is None and not folders:
        return (
            "data_config.img_dir is required and missing. Folder of pictures, each with a caption file of the same "
            "stem beside it; or name several in data_config.folders"
        )
    if folder is not None and folders:
        return (
            "data_config.img_dir and data_config.folders are both given: make that folder one of the list, as "
            f"{{img_dir: {folder}}}"
        )
    return None


def _places_stand_in_folders(folders: Any, controls: object, metadata: object, masks: object) -> str | None:
    places = (("control_dir", controls), ("metadata_file", metadata), ("mask_dir", masks))
    given = [name for name, value in places if value is not None]
    if folders and given:
        return f"data_config.{' and '.join(given)} given beside data_config.folders: write it into its folder"
    return None


def _a_share_for_each_size(sizes: Any, shares: Sequence[float] | None) -> str | None:
    count = len(sizes) if isinstance(sizes, list | tuple) else 1
    if shares is None or sizes is None:
        return None
    if len(shares) != count:
        return f"img_size_shares has {len(shares)} numbers and img_size {count}: give one for each"
    if not sum(shares) > 0:
        return f"img_size_shares is {list(shares)}: one must be greater than 0"
    return None


def _one_source_of_captions(source: str | None, text: str | None) -> str | None:
    if text is not None and source not in (None, "file"):
        return f'caption_text is given and caption_source is "{source}": choose one of them'
    return None


def _one_source_of_masks(folder: object, place: object) -> str | None:
    if folder is not None and place is not None:
        return f'mask is "{place}" and mask_dir is given as well: choose one of them'
    return None


_RULES_OF_FOLDERS: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    (("img_size", "img_size_shares"), _a_share_for_each_size),
    (("caption_source", "caption_text"), _one_source_of_captions),
    (("mask_dir", "mask"), _one_source_of_masks),
)
"""Rules of keys that `data_config` has as well as each of its folders."""


def _one_batch_size(outer: int | None, inner: int | None) -> str | None:
    if outer is None or inner is None or outer == inner:
        return None
    return f"train_batch_size is {outer} and data_config.train_batch_size is {inner}: give it once, or equal"


def _some_length(steps: int | None, epochs: int | None) -> str | None:
    if steps is None and epochs is None:
        return "neither max_train_steps nor num_train_epochs is given: set one of them"
    return None


def _shared_blocks_are_recomputed(method: str, shards: int | None, keeps_everything: bool | None) -> str | None:
    if method == "full" or not keeps_everything or (shards or 1) == 1:
        return None
    return (
        f"distributed.shards is {shards} and disable_gradient_checkpointing is true: blocks that lie in parts on "
        "several GPUs are recomputed in the backward pass. Leave disable_gradient_checkpointing out"
    )


def _rules_for_their_schedule(scheduler: str, rules: str | None) -> str | None:
    if scheduler == "piecewise_constant" and rules is None:
        return 'lr_scheduler is "piecewise_constant", which needs lr_step_rules, for example "1:100,0.1"'
    if scheduler != "piecewise_constant" and rules is not None:
        return f'lr_step_rules is given and lr_scheduler is "{scheduler}", which does not read it'
    return None


def _controls_for_prompts(prompts: Sequence[str], controls: Sequence[object]) -> str | None:
    if controls and len(controls) != len(prompts):
        counts = f"samples.controls has {len(controls)} lists and samples.prompts {len(prompts)} prompts"
        return f"{counts}: give one list per prompt"
    return None


def _one_kind_of_size(sizes: Sequence[object], width: int | None, height: int | None) -> str | None:
    if sizes and (width is not None or height is not None):
        return "samples.sizes is given, and samples.width or samples.height: leave out one or the other"
    return None


def _strengths_of_a_lora(method: str, strengths: Sequence[float]) -> str | None:
    if method == "full" and tuple(strengths) != (1.0,):
        return f"samples.strengths is {list(strengths)} and method is full, which has no LoRA whose strength could vary"
    return None


def _one_source_of_controls(folder: object, metadata: object) -> str | None:
    if folder is not None and metadata is not None:
        return "data_config.control_dir and data_config.metadata_file are both given: the file names its own controls"
    return None


def _lora_keys_with_a_lora(method: str, targets: object, alpha: object) -> str | None:
    given = [name for name, value in (("lora_targets", targets), ("lora_alpha", alpha)) if value is not None]
    if method == "full" and given:
        return f"{' and '.join(given)} given and method is full, which trains all weights and has no LoRA"
    return None


def _nothing_is_quantized_in_full(method: str, kept: Sequence[str]) -> str | None:
    if method == "full" and kept:
        return "keep_plain given and method is full, which trains all weights and quantizes none"
    return None


def _only_a_lora_is_averaged(method: str, decay: float | None) -> str | None:
    if method == "full" and decay is not None:
        return (
            f"ema.decay is {decay} and method is full: this version averages a LoRA alone, since an average of all "
            "weights takes 4 bytes for each. Leave ema.decay out, or lower the learning rate towards the end "
            "(lr_scheduler: cosine), which smooths as an average does"
        )
    return None


def _kinds_of_a_lora(method: str, kind: str, ranks: object, rslora: bool) -> str | None:
    values = {"adapter.kind": kind != "lora", "adapter.rank_pattern": bool(ranks), "adapter.rslora": rslora}
    given = [name for name, is_given in values.items() if is_given]
    if method == "full" and given:
        return f"{' and '.join(given)} given and method is full, which trains all weights and has no adapter"
    return None


def _keys_of_a_lokr(kind: str, factor: int | None, low_rank: str) -> str | None:
    values = {"adapter.lokr_factor": factor is not None, "adapter.lokr_low_rank": low_rank != "none"}
    given = [name for name, is_given in values.items() if is_given]
    if kind != "lokr" and given:
        return f'{" and ".join(given)} given and adapter.kind is "{kind}": they are read with "lokr" alone'
    return None


def _ranks_of_a_lokr(kind: str, low_rank: str, ranks: object) -> str | None:
    if kind == "lokr" and low_rank == "none" and ranks:
        return (
            'adapter.rank_pattern given and adapter.kind is "lokr" with whole matrices, which have no rank: leave it '
            'out, or set adapter.lokr_low_rank to "larger"'
        )
    return None


def _no_alpha_of_a_lokr(kind: str, alpha: float | None) -> str | None:
    if kind == "lokr" and alpha is not None:
        return (
            f'lora_alpha given ({alpha}) and adapter.kind is "lokr", whose matrices are never scaled, since programs '
            "differ in how they read a scale from its file: leave it out, and change the learning rate instead"
        )
    return None


def _a_plain_lora_starts(kind: str, path: Path | None) -> str | None:
    if kind != "lora" and path is not None:
        return f'init_lora given and adapter.kind is "{kind}": only a LoRA can start from a LoRA file'
    return None


def _formats_of_a_lora(kind: str, formats: Sequence[str]) -> str | None:
    if kind != "lora" and "kohya" in formats:
        return (
            f'lora_files.formats given with "kohya" and adapter.kind is "{kind}": its names there are a LoRA\'s alone'
        )
    return None


def _scale_by_the_root(kind: str, rslora: bool) -> str | None:
    if kind == "lokr" and rslora:
        return 'adapter.rslora given and adapter.kind is "lokr", which PEFT and ComfyUI scale by alpha / rank alone'
    return None


def _an_adapter_beside_a_lora(method: str, path: Path | None) -> str | None:
    if method == "full" and path is not None:
        return (
            f"training_adapter.path is {str(path)!r} and method is full: an adapter is beside a LoRA that is trained. "
            "Fuse it into the base's weights, or choose method: lora"
        )
    return None


def _a_lora_starts_from_a_lora(method: str, path: Path | None) -> str | None:
    if method == "full" and path is not None:
        return (
            f"init_lora is {str(path)!r} and method is full, which trains no LoRA. Fuse it into the base's weights, or "
            "choose method: lora"
        )
    return None


def _lora_files_of_a_lora(method: str, formats: Sequence[str]) -> str | None:
    if method == "full" and "kohya" in formats:
        return (
            f"lora_files.formats is {list(formats)} and method is full, which writes a model folder and no LoRA. Leave "
            "lora_files out, or choose method: lora"
        )
    return None


def _something_to_wait_for(patience: int | None, share: float | str, folder: Path | None) -> str | None:
    if patience is not None and share == 0 and folder is None:
        return f"validation.patience is given ({patience}) and validation.held_out is 0: no held-out loss is measured"
    return None


def _one_held_out_set(share: float | str, folder: Path | None) -> str | None:
    if isinstance(share, str):
        return None  # "auto": the folder decides where there is one
    if share and folder is not None:
        return f"validation.held_out is {share} and validation.held_out_dir is {str(folder)!r}: choose one of them"
    if share >= 1:
        return "validation.held_out is 1, which leaves no picture to train on"
    return None


def _a_range_of_sigmas(least: float, most: float) -> str | None:
    if least < most:
        return None
    words = "is empty" if least == most else "runs backwards"
    return f"objective.min_sigma is {least} and objective.max_sigma {most}: the range of noise levels {words}"


def _one_source_of_priors(folder: object, prompts: Sequence[str]) -> str | None:
    if folder is not None and prompts:
        return "prior_preservation.folder and prior_preservation.prompts are both given: choose one of them"
    return None


def _each_prompt_once(prompts: Sequence[str]) -> str | None:
    twice = [prompt for prompt in dict.fromkeys(prompts) if list(prompts).count(prompt) > 1]
    return f"prior_preservation.prompts has {twice[0]!r} twice: raise num_pictures instead" if twice else None


_RULES: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    (("data_config.img_dir", "data_config.folders"), _some_pictures),
    (
        ("data_config.folders", "data_config.control_dir", "data_config.metadata_file", "data_config.mask_dir"),
        _places_stand_in_folders,
    ),
    (("train_batch_size", "data_config.train_batch_size"), _one_batch_size),
    (("max_train_steps", "num_train_epochs"), _some_length),
    (("lr_scheduler", "lr_step_rules"), _rules_for_their_schedule),
    (("method", "distributed.shards", "disable_gradient_checkpointing"), _shared_blocks_are_recomputed),
    (("validation.held_out", "validation.held_out_dir"), _one_held_out_set),
    (("validation.patience", "validation.held_out", "validation.held_out_dir"), _something_to_wait_for),
    (("method", "lora_targets", "lora_alpha"), _lora_keys_with_a_lora),
    (("method", "keep_plain"), _nothing_is_quantized_in_full),
    (("method", "training_adapter.path"), _an_adapter_beside_a_lora),
    (("method", "lora_files.formats"), _lora_files_of_a_lora),
    (("method", "init_lora"), _a_lora_starts_from_a_lora),
    (("method", "adapter.kind", "adapter.rank_pattern", "adapter.rslora"), _kinds_of_a_lora),
    (("adapter.kind", "adapter.lokr_factor", "adapter.lokr_low_rank"), _keys_of_a_lokr),
    (("adapter.kind", "adapter.lokr_low_rank", "adapter.rank_pattern"), _ranks_of_a_lokr),
    (("adapter.kind", "lora_alpha"), _no_alpha_of_a_lokr),
    (("adapter.kind", "adapter.rslora"), _scale_by_the_root),
    (("adapter.kind", "init_lora"), _a_plain_lora_starts),
    (("adapter.kind", "lora_files.formats"), _formats_of_a_lora),
    (("method", "ema.decay"), _only_a_lora_is_averaged),
    (("samples.sizes", "samples.width", "samples.height"), _one_kind_of_size),
    (("method", "samples.strengths"), _strengths_of_a_lora),
    (("samples.prompts", "samples.controls"), _controls_for_prompts),
    (("prior_preservation.folder", "prior_preservation.prompts"), _one_source_of_priors),
    (("prior_preservation.prompts",), _each_prompt_once),
    (("objective.min_sigma", "objective.max_sigma"), _a_range_of_sigmas),
    (("data_config.control_dir", "data_config.metadata_file"), _one_source_of_controls),
    *RULES_OF_OPTIMIZERS,
    *RULES_OF_STREAMS,
)
