"""`sparse-moe-vlm train`, from a clone: `python scripts/train.py --help`."""

from modeling_sparse_moe_vlm.toolbox.commands.main import run_script

if __name__ == "__main__":
    run_script("train")
