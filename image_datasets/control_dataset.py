"""Editing: `loader(train_batch_size=1, num_workers=2, img_dir="dataset/images", control_dir="dataset/control")`."""

from pixtune.data.loaders import loader

__all__ = ["loader"]
