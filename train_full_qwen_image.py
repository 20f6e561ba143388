"""All weights of Qwen-Image.

Command: accelerate launch train_full_qwen_image.py --config ./train_configs/train_full_qwen_image.yaml [key=value ...]
"""

from pixtune.cli import run_script

if __name__ == "__main__":
    run_script(families=["qwen_image"], method="full")
