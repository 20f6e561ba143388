"""Table of the folders of pictures of OneTrainer, its concepts."""

from __future__ import annotations

from typing import Any

from pixtune.migration import conversions as to
from pixtune.migration.rules import Look, Lost, Outcome, Rule, harmless, lost, only_if


def _balance(value: Any, look: Look) -> Any:
    if look.get("balancing_strategy", "REPEATS") == "REPEATS":
        return to.real(value)
    return Lost("it is a number of pictures there: write repeats")


def _other_size(value: Any, look: Look) -> Any:
    if not to.truth(value):
        return Lost("as here", False)
    return Outcome({"img_size": to.sides(look.get("image.resolution_override"))})


def _masks(value: Any, look: Look) -> Lost:
    why = "masks lie beside pictures there as NAME-masklabel.png: put them into a mask_dir under the pictures' names"
    return Lost(why, True, True) if value is True else Lost("no masks, as here", False)


def _tag_dropout(value: Any, look: Look) -> Any:
    return to.real(look.get("text.tag_dropout_probability", 0.0)) if to.truth(value) else Lost("none, as here", False)


_with_tags = only_if(
    lambda look: look.peek("text.enable_tag_shuffling") is True or look.peek("text.tag_dropout_enable") is True,
    "tags stay in order, as here",
)


_ONE_FILE = Lost("one file of captions for all pictures: write caption files, or caption_text", True, True)


FOLDERS: tuple[Rule, ...] = (
    Rule("path", "img_dir", to.text),
    Rule("balancing", "repeats", _balance),
    Rule("repeats", "repeats", to.real),
    *harmless("balancing_strategy", "see balancing"),
    Rule("loss_weight", "loss_weight", to.real),
    Rule("resolution", "img_size", to.sides, default="512"),
    Rule("image.enable_resolution_override", "", _other_size),
    *harmless("image.resolution_override", "see image.enable_resolution_override"),
    Rule("image.enable_random_flip", "flip", to.truth_or("no mirror images, as here"), default=True,
         remark="on where it is left out; here off"),
    *lost("image.enable_fixed_flip image.enable_random_rotate image.enable_fixed_rotate "
          "image.enable_random_brightness image.enable_fixed_brightness image.enable_random_contrast "
          "image.enable_fixed_contrast image.enable_random_saturation image.enable_fixed_saturation "
          "image.enable_random_hue image.enable_fixed_hue", "pictures are only cropped and mirrored here"),
    *lost("image.enable_crop_jitter", "crops are of the middle here", True),
    *harmless("image.*", "belongs to a change of pictures that is listed where it is on"),
    Rule("masked_training", "", _masks),
    *harmless("unmasked_weight", "see masked_training, and weight_outside_mask"),
    Rule("text.prompt_source", "caption_source",
         to.chosen({"sample": Lost("caption files, as here", False), "filename": "file_name", "concept": _ONE_FILE})),
    *harmless("text.prompt_path", "see text.prompt_source"),
    Rule("text.enable_tag_shuffling", "shuffle_tags", to.truth_or("tags stay in order, as here")),
    Rule("text.keep_tags_count", "keep_tags", _with_tags(to.whole), default=1),
    Rule("text.tag_dropout_enable", "tag_dropout_rate", _tag_dropout),
    *lost("text.caps_randomize_enable text.tag_dropout_special_tags", "letters and single tags are not chosen"),
    *harmless("text.*", "see the captions' keys"),
    Rule("include_subdirectories", "", lambda value, look: Lost("subfolders are read here always", False)),
    Rule("(small pictures are enlarged)", "upscale", default=True),
    *harmless("name seed enabled validation_concept image_variations text_variations type __version concept_stats*",
              "not needed here"),
)  # fmt: skip
