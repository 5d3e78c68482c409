"""Changes of a recipe that make it a run of a few seconds: few images, and no worker processes."""

SMALL_RUN = {
    "data.num_train": 44,
    "data.num_heldout": 11,
    "training.max_steps": 2,
    "training.per_device_train_batch_size": 4,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.dataloader_num_workers": 0,
    "training.dataloader_persistent_workers": "false",
}
