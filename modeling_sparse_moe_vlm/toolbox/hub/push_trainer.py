"""Uploads of a `Trainer`, which contain the same files as [`~toolbox.hub.push_checkpoint`]."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

# `toolbox.hub` imports recipes of training, so it is only imported by the methods here.

logger = logging.get_logger(__name__)

# Of a checkpoint of `Trainer`: a pickle that contains the token and paths of this machine.
_PRIVATE = ["training_args.bin"]


class PushesCheckpoints(Trainer):
    """
    A `Trainer` that uploads complete checkpoints and nothing else, at the end and during training. Transformers'
    own uploads `training_args.bin`, logs and whatever else is in the output folder, and leaves out the code of the
    model while it trains.
    """

    hub_model_id: str | None
    push_in_progress: PushInProgress | None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model: str | None = None,
        force: bool = False,
        **kwargs: Any,
    ):
        """
        Saves the model and the processor in `args.output_dir`, and uploads them to `args.hub_model_id`: see
        [`~toolbox.hub.push_checkpoint`]. Without a model card in the folder, one is written.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until the upload is complete.
            token (`str`, *optional*):
                Token with write access. By default, `args.hub_token`.
            revision (`str`, *optional*):
                Branch. By default, `args.hub_revision`.
            private (`bool`, *optional*):
                Whether the repository is private if it is created. By default, `args.hub_private_repo`.
            base_model (`str`, *optional*):
                Name on the Hub of the model that an adapter was trained on, if the adapter does not name it.
            force (`bool`, *optional*, defaults to `False`):
                Whether files may be replaced that this package did not upload.
            kwargs (`dict[str, Any]`, *optional*):
                Arguments of `Trainer.create_model_card`. With any of them, Transformers writes the model card.

        Returns:
            `CommitInfo`: The commit, or a `Future` of it if `blocking=False`. `None` in other processes than the first.

        Raises:
            PushError: If the checkpoint is not complete, or if the token or the repository does not allow the upload.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        private = private if private is not None else self.args.hub_private_repo
        self.save_model(_internal_call=True)  # in all processes
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = _full_name(name, token, private)
        if kwargs:
            name = kwargs.pop("model_name", None) or str(self.hub_model_id)
            self.create_model_card(model_name=name, **kwargs)
        self._finish_current_push()
        options = {"token": token, "revision": revision or self.args.hub_revision}
        options |= {"commit_message": commit_message, "base_model": base_model, "force": force, "private": private}
        if not blocking:
            return _in_background(_push, self.args.output_dir, self.hub_model_id, options)
        return _push(self.args.output_dir, self.hub_model_id, options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint during training, in the background. A failure does not end the training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        when = f"step {self.state.global_step}"
        if self.args.save_strategy == "epoch":
            when = f"epoch {int(self.state.epoch or 0)}"
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        options["commit_message"] = f"Training in progress, {when}"
        name = None
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            name = "last-checkpoint"
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            name = Path(checkpoint_folder).name
        # The checkpoint may be deleted during the upload (`save_total_limit`).
        stage = _linked(Path(checkpoint_folder), Path(self.args.output_dir))
        job = _in_background(_push_in_training, stage, self.hub_model_id, options, name)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)


def _full_name(name: str, token: str | None, private: bool | None) -> str:
    """Returns the name of a repository as `"user/name"`. A name without a user is one of the owner of the token."""
    from huggingface_hub import HfApi

    from .push_errors import errors_of_the_hub

    if "/" in name:
        return name
    with errors_of_the_hub(name):
        return HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id


def _push(folder: str | Path, repo_id: str, options: dict[str, Any]):
    from .push import push_checkpoint

    return push_checkpoint(folder, repo_id, **options).info


def _push_in_training(stage: Path, repo_id: str, options: dict[str, Any], name: str | None) -> None:
    """Uploads a checkpoint, and with `name` also what is needed to resume the training, to a folder of that name."""
    from .push_errors import PushError

    with _removed(stage):
        try:
            _push(stage, repo_id, options)
            if name is not None:
                _push_state(stage, repo_id, options, name)
        except (PushError, OSError) as error:
            logger.warning(f"The checkpoint was not uploaded, and the training continues: {error}")


def _push_state(folder: Path, repo_id: str, options: dict[str, Any], name: str) -> None:
    from huggingface_hub import HfApi

    from .push_errors import errors_of_the_hub
    from .push_ownership import MARK

    with errors_of_the_hub(repo_id):
        HfApi(token=options["token"]).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=name,
            commit_message=f"{options['commit_message']}, checkpoint ({MARK})",
            revision=options["revision"],
            ignore_patterns=_PRIVATE,
        )


def _linked(folder: Path, parent: Path) -> Path:
    """Returns a new folder with hard links to the files of a folder, or copies where links are not possible."""
    stage = Path(tempfile.mkdtemp(prefix="_uploading-", dir=parent))
    try:
        shutil.copytree(folder, stage, dirs_exist_ok=True, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.copytree(folder, stage, dirs_exist_ok=True)
    return stage


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_background(function: Any, *args: Any) -> Future:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
    try:
        return executor.submit(function, *args)
    finally:
        executor.shutdown(wait=False)
