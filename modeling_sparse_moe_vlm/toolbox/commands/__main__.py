"""`python -m modeling_sparse_moe_vlm.toolbox.commands <verb>`, for launchers that start modules."""

from .main import main

if __name__ == "__main__":
    main()
