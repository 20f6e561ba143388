"""LoRA of Qwen-Image on a 24 GB GPU, or on a DGX Spark with train_dgx_spark.yaml.

Command: accelerate launch train_4090.py --config ./train_configs/train_lora_4090.yaml [key=value ...]
"""

from pixtune.cli import run_script

if __name__ == "__main__":
    run_script(families=["qwen_image"])
