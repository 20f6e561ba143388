"""Checks a data set before training: `python utils/validate_dataset.py --path DIR`, exit code 0 if it can be used."""

from __future__ import annotations

import argparse
import sys

from pixtune.console import make_printing_safe
from pixtune.data.validate import validate_dataset

__all__ = ["validate_dataset"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks every picture and caption of a data set.")
    parser.add_argument("--path", required=True, help="folder of pictures and captions, or of images/ and control/")
    parser.add_argument("--caption_type", default="txt", help="extension of the caption files (default: txt)")
    parser.add_argument("--img_size", type=int, help="also report crops and buckets for this training size in pixels")
    arguments = parser.parse_args()
    make_printing_safe()
    return 0 if validate_dataset(arguments.path, arguments.caption_type, arguments.img_size) else 1


if __name__ == "__main__":
    sys.exit(main())
