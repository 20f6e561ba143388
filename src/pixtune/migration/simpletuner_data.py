"""Table of the data sets of SimpleTuner: multidatabackend.json."""

from __future__ import annotations

from typing import Any

from pixtune.migration import conversions as to
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, lost


def _size(value: Any, look: Look) -> Any:
    kind = look.get("resolution_type", "pixel_area")
    if kind == "area" and to.number(value) < 64:
        return round((float(to.number(value)) * 1e6) ** 0.5 / 64) * 64
    if kind == "pixel":
        return Outcome(
            {"img_size": to.side(value)},
            (Lost("it is the shorter side there, and here the side of a square of that area"),),
        )
    return to.side(value)


def _captions(value: Any, look: Look) -> Any:
    kind = to.text(value).casefold().replace("_", "")
    prompt = look.get("instance_prompt")
    if look.get("only_instance_prompt") is True or kind == "instanceprompt":
        return Outcome({"caption_text": str(prompt or "")})
    if kind == "textfile":
        if look.get("disable_multiline_split") is True:
            return Lost("a caption file each, as here", False)
        return Outcome({"caption_source": "lines"})
    if kind == "filename":
        return Outcome({"caption_source": "file_name"})
    if kind in ("huggingface",):
        return Lost("see caption_column", False)
    return Lost(
        "captions in Parquet or shards: write a metadata_file, or use dataset with its caption_column", True, True
    )


def _prompt(value: Any, look: Look) -> Any:
    if look.get("prepend_instance_prompt") is True:
        return Outcome({"caption_prefix": to.text(value)})
    return Lost("see caption_strategy", False)


def _crop(value: Any, look: Look) -> Any:
    if to.truth(value) and look.get("crop_aspect", "square") == "square":
        return Lost("pictures are cropped to squares there; here each is in a bucket of its own ratio")
    return Lost("pictures are cropped to their buckets, as here", False)


def _place(value: Any, look: Look) -> Any:
    kind = to.text(value)
    if kind == "local":
        return Lost("a folder", False)
    if kind == "huggingface":
        name = look.get("dataset_name")
        columns = {
            "image_column": look.get("huggingface.image_column"),
            "caption_column": look.get("huggingface.caption_column"),
        }
        found = {key: column for key, column in columns.items() if isinstance(column, str) and "." not in column}
        return Outcome({"dataset": str(name), **found, "data_config.cache_dir": "./cache"})
    return Lost("pictures must be in a folder here, or in a data set of Hugging Face: copy them", True, True)


def _shuffle(value: Any, look: Look) -> Any:
    if not to.truth(value):
        return Lost("tags stay in order, as here", False)
    values = {"shuffle_tags": True, "caption_variants": min(256, to.whole(look.get("caption_shuffle.count", 1)) + 1)}
    return Outcome({**values, "keep_tags": to.whole(look.get("caption_shuffle.position_start", 0))})


FOLDERS: tuple[Rule, ...] = (
    Rule("type", "dataset", _place),
    Rule("instance_data_dir", "img_dir", to.text),
    Rule("conditioning_data.folders", "control_dir", to.one_or_several, remark="the folders of conditioning_data"),
    Rule("conditioning_data.masks", "mask_dir", to.text),
    Rule("repeats", "repeats", lambda value, look: to.real(value) + 1, default=0,
         remark="times after the first one there: 0 is 1 here"),
    Rule("probability", "",
         lambda value, look: Lost("how often a folder is used is its repeats", to.number(value) != 1)),
    Rule("resolution", "img_size", _size, default=1024),
    *harmless("resolution_type", "see resolution"),
    Rule("caption_strategy", "caption_source caption_text", _captions, default="filename",
         remark="textfile is one caption a line"),
    Rule("instance_prompt", "caption_prefix", _prompt),
    *harmless("only_instance_prompt prepend_instance_prompt disable_multiline_split", "see caption_strategy"),
    Rule("caption_shuffle.enable", "shuffle_tags", _shuffle),
    *harmless("caption_shuffle.*", "see caption_shuffle.enable"),
    Rule("caption_dropout_probability", "caption_dropout_rate", to.real),
    Rule("crop", "", _crop),
    Rule("(small pictures are enlarged)", "upscale", default=True),
    Rule("dataset_name", "", lambda value, look: Lost("see dataset", False)),
    *lost("huggingface.composite_image_config.enabled", "pictures that are several in one must be cut"),
    *lost("minimum_image_size minimum_aspect_ratio maximum_aspect_ratio",
          "pictures of all sizes are used: leave some out by data_config.exclude"),
    *lost("is_regularisation_data is_regularization_data", "regularization pictures are prior_preservation.folder"),
    *lost("conditioning", "controls and masks that are made from the pictures must be in folders"),
    *harmless("maximum_image_size target_downsample_size crop_style crop_aspect crop_aspect_buckets id dataset_type "
              "cache_dir_vae cache_dir text_embeds image_embeds metadata_backend vae_cache_clear_each_epoch "
              "conditioning_data conditioning_image_embeds disabled "
              "disable skip_file_discovery preserve_data_backend_cache huggingface.* "
              "parquet.* video.* cache_file_suffix hash_filenames dataset_split split streaming write_batch_size "
              "default", "pictures are bucketed and cached here by themselves"),
)  # fmt: skip
