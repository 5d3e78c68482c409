"""Runs the command as `python -m modeling_sparse_moe_vlm.toolbox.commands VERB`, for launchers that start modules."""

from .main import main

if __name__ == "__main__":
    main()
