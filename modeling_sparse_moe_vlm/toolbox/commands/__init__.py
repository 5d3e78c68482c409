"""The command line interface `sparse-moe-vlm`, with one module for each verb."""
