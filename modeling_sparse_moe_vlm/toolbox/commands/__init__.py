"""The command `sparse-moe-vlm`: one file for each verb."""
