"""Runs `sparse-moe-vlm train` in a clone. Options: `python scripts/train.py --help`."""

from modeling_sparse_moe_vlm.toolbox.commands.main import run_script

if __name__ == "__main__":
    run_script("train")
