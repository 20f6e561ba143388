"""The section of a streamed data set, and what contradicts one: it is read, encoded and trained on window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from pixtune.config.section import Section
from pixtune.config.values import FewThousand, Share


class StreamConfig(Section):
    """Keys of a data set that is neither copied nor encoded whole before the first step."""

    window: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Number of rows that are read, mixed and encoded at once, and then trained on, before the next ones: a data set in
    shards (`dataset`, also on a web server or the hub) or a folder of pictures then needs disk for a few windows
    alone. Needs `max_train_steps`. Absent: the data set is encoded whole before the first step."""
    shards_at_once: FewThousand = 8
    """Number of shards that a window mixes rows of, which processes divide. Their order is random in each epoch."""
    cache_limit_gib: Annotated[float, Field(gt=0)] = 64.0
    """Limit of the encodings on disk, in GiB: what was not used for the longest time is deleted. A data set whose
    encodings fit is encoded once."""
    skipped_share: Share = 0.02
    """Share of the rows read so far, 0 to 1, that may be damaged or lack a picture or caption: they are skipped and
    counted. Beyond it, and beyond 10 rows, the run ends."""
    patience_seconds: Annotated[float, Field(ge=0, le=604_800)] = 600.0
    """Time for which a shard that cannot be read is tried again, in seconds, before the run is saved and ends."""


def _one_source(window: int | None, folders: Any) -> str | None:
    if window is not None and folders is not None and len(folders) > 1:
        return f"stream.window is given and data_config.folders has {len(folders)}: a stream is the only one"
    return None


def _no_uses(window: int | None, folders: Any) -> str | None:
    for number, item in enumerate(folders or ()) if window is not None else ():
        values = dict(item)
        given = [key for key in ("repeats", "loss_weight") if values.get(key, 1.0) != 1.0]
        given += [key for key in ("mask", "mask_dir") if values.get(key) is not None]
        if given:
            return (
                f"data_config.folders[{number}].{' and '.join(given)} given beside stream.window: rows of a stream "
                "come once an epoch, with equal weights and without masks"
            )
    return None


def _steps_alone(window: int | None, steps: int | None, epochs: int | None) -> str | None:
    if window is None or (steps is not None and epochs is None):
        return None
    if epochs is not None:
        return (
            f"num_train_epochs is {epochs} beside stream.window: nobody knows the rows of a stream before they are "
            "read. Give its length as max_train_steps alone"
        )
    return "stream.window is given, and its run needs max_train_steps: nobody knows the rows of a stream beforehand"


def _encoded_ahead(window: int | None, on_disk: bool, text: bool, pictures: bool) -> str | None:
    values = {
        "save_cache_on_disk": on_disk,
        "precompute_text_embeddings": text,
        "precompute_image_embeddings": pictures,
    }
    off = [key for key, value in values.items() if not value]
    if window is None or not off:
        return None
    return f"{' and '.join(off)} false beside stream.window: a stream's windows are encoded to disk before their steps"


def _named_rows(window: int | None, exclude: Sequence[str], weights: Mapping[str, float]) -> str | None:
    given = [name for name, value in (("exclude", exclude), ("loss_weights", weights)) if value]
    if window is None or not given:
        return None
    return f"data_config.{' and '.join(given)} given beside stream.window, which names no single rows"


def _no_masks(window: int | None, folder: object, place: object) -> str | None:
    given = [name for name, value in (("mask_dir", folder), ("mask", place)) if value is not None]
    if window is None or not given:
        return None
    return f"data_config.{' and '.join(given)} given beside stream.window: masks of a stream are not read"


def _no_priors(window: int | None, folder: object, prompts: Sequence[str]) -> str | None:
    if window is None or not (folder or prompts):
        return None
    return "prior_preservation given beside stream.window: put regularization pictures into the stream's shards"


def _no_share(window: int | None, share: float | str) -> str | None:
    if window is None or isinstance(share, str) or share == 0:
        return None
    return (
        f"validation.held_out is {share} beside stream.window: nobody knows a share of a stream. Set held_out_dir; or "
        "auto, which holds out the first rows of the first shard; or 0"
    )


def _nothing_judged(window: int | None, judges: bool | None) -> str | None:
    if window is None or not judges:
        return None
    return "validation.judge_captions is true beside stream.window: captions are judged where a run knows all of them"


def _real_pictures(window: int | None, random: bool) -> str | None:
    if window is None or not random:
        return None
    return "random_weights is true beside stream.window: steps are measured on drawn data, and nothing is read"


def _read_where_streamed(window: int | None, *values: object) -> str | None:
    names = ("shards_at_once", "cache_limit_gib", "skipped_share", "patience_seconds")
    usual = (StreamConfig.model_fields[name].default for name in names)
    given = [name for name, value, default in zip(names, values, usual, strict=True) if value != default]
    if window is not None or not given:
        return None
    return f"stream.{' and '.join(given)} given and stream.window absent: nothing is streamed, so nothing reads it"


RULES_OF_STREAMS: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    (("stream.window", "data_config.folders"), _one_source),
    (("stream.window", "data_config.folders"), _no_uses),
    (("stream.window", "max_train_steps", "num_train_epochs"), _steps_alone),
    (
        ("stream.window", "save_cache_on_disk", "precompute_text_embeddings", "precompute_image_embeddings"),
        _encoded_ahead,
    ),
    (("stream.window", "data_config.exclude", "data_config.loss_weights"), _named_rows),
    (("stream.window", "data_config.mask_dir", "data_config.mask"), _no_masks),
    (("stream.window", "prior_preservation.folder", "prior_preservation.prompts"), _no_priors),
    (("stream.window", "validation.held_out"), _no_share),
    (("stream.window", "validation.judge_captions"), _nothing_judged),
    (("stream.window", "random_weights"), _real_pictures),
    (
        (
            "stream.window", "stream.shards_at_once", "stream.cache_limit_gib", "stream.skipped_share",
            "stream.patience_seconds",
        ),
        _read_where_streamed,
    ),
)  # fmt: skip
"""Rules of keys that mean nothing, or cannot be kept, beside a stream."""
