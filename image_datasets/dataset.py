"""Text-to-image: `loader(train_batch_size=1, num_workers=2, img_dir="dataset", img_size=1024)`."""

from pixtune.data.loaders import loader

__all__ = ["loader"]
