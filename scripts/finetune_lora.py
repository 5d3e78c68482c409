"""Runs `sparse-moe-vlm lora` in a clone. Options: `python scripts/finetune_lora.py --help`."""

from modeling_sparse_moe_vlm.toolbox.commands.main import run_script

if __name__ == "__main__":
    run_script("lora")
