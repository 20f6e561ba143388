"""LoRA of Qwen-Image.

Command: accelerate launch train.py --config ./train_configs/train_lora.yaml [key=value ...]
"""

from pixtune.cli import run_script

if __name__ == "__main__":
    run_script(families=["qwen_image"])
