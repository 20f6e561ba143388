"""LoRA of FLUX.1-dev or FLUX.1-Kontext-dev.

Command: accelerate launch train_flux_lora.py --config ./train_configs/train_flux_config.yaml [key=value ...]
"""

from pixtune.cli import run_script

if __name__ == "__main__":
    run_script(families=["flux", "flux_kontext"])
