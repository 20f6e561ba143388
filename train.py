"""Qwen-Image LoRA: accelerate launch train.py --config ./train_configs/train_lora.yaml [key=value ...]"""

from pixtune.cli import run_script

if __name__ == "__main__":
    run_script()
