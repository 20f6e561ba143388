"""LoRA of Qwen-Image-Edit, -2509 or -2511 from control pictures.

Command: accelerate launch train_qwen_edit_lora.py --config ./train_configs/train_lora_qwen_edit.yaml [key=value ...]
"""

from pixtune.cli import run_script

if __name__ == "__main__":
    run_script(families=["qwen_image_edit", "qwen_image_edit_plus"])
