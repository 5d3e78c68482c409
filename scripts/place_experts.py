"""Runs `sparse-moe-vlm place` in a clone. Options: `python scripts/place_experts.py --help`."""

from modeling_sparse_moe_vlm.toolbox.commands.main import run_script

if __name__ == "__main__":
    run_script("place")
