"""The class with which lmms-eval asks models for answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm.auto import tqdm

from ...checks import check
from ..evaluation.generation import answer_batch
from ..evaluation_mode import evaluating
from ..training.models import from_checkpoint
from .requests import batches, cut, generation_options


class SparseMoeVlm(lmms):
    """
    A model of this package, or any other model that [`~toolbox.training.models.from_checkpoint`] loads.

    Args:
        pretrained (`str`):
            Folder of the checkpoint, or its name on the Hub.
        batch_size (`int` or `str`, *optional*, defaults to 1):
            Number of questions per batch.
        device (`str`, *optional*):
            Device of the model. By default, that of the process.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights, such as `"float32"`. By default, that of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the checkpoint. Models of this package run the installed code and do not need it.
        max_new_tokens (`int`, *optional*, defaults to 1024):
            Maximum number of tokens of an answer, for tasks that do not set it.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If `batch_size` is not a positive integer, or if `from_checkpoint` cannot load the model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        max_new_tokens: int = 1024,
    ) -> None:
        super().__init__()
        check(
            str(batch_size).isdecimal() and int(batch_size) > 0,
            f"`batch_size` must be a positive integer, but got {batch_size!r}.",
        )
        self.batch_size = int(batch_size)
        self.max_new_tokens = max_new_tokens
        # lmms-eval gives every process its share of the questions.
        process = PartialState()
        self._rank, self._world_size = process.process_index, process.num_processes
        self.device = torch.device(device or process.device)
        model, self.processor = from_checkpoint(pretrained, trust_remote_code, language_models=True, dtype=dtype)
        self.model = model.to(self.device)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """
        Generates answers, in batches of questions with the same generation arguments, the longest first.

        Args:
            requests (`Sequence[Instance]`):
                Requests whose arguments are the text, the function that returns the messages of a document, the
                generation arguments, the number of the document, the task and the split.

        Returns:
            `list[str]`: One answer per request, in the same order. It ends before the first stop string of the task.

        Raises:
            ValueError: If a question has audio or a section of a video, or cannot be processed. The message names the
                task and the document.
        """
        answers = [""] * len(requests)
        with evaluating(self.model), tqdm(total=len(requests), desc="Answering", disable=self.rank != 0) as progress:
            for batch in batches([request.args for request in requests], self.batch_size):
                arguments = requests[batch[0]].args[2]
                rows = {number: self._row(requests[number]) for number in batch}
                options = generation_options(arguments, self.max_new_tokens)
                texts = answer_batch(self.model, self.processor, rows, **options)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = cut(text, arguments.get("until"))
                progress.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("The model `sparse_moe_vlm` does not support tasks of several rounds.")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("The model `sparse_moe_vlm` does not support tasks with loglikelihoods.")

    def _row(self, request: Instance) -> dict[str, Any]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        for part in (part for message in messages for part in message["content"]):
            check(part["type"] != "audio", f"{task}, row {doc_id} has audio, which the model cannot process.")
            check(
                not part.keys() & {"video_start", "video_end"},
                f"{task}, row {doc_id} asks about a section of a video, but the processor reads whole videos only.",
            )
        return {"messages": messages, "source": task, "row": doc_id}
