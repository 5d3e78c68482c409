"""
Training in two processes does not hang and equals training in one process if all processes only have texts, all only
have images, or one has texts and the other images, with frozen parts and activation checkpointing too.
"""

import os
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_sparse_moe_vlm.toolbox.data import VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer, train_parts
from tests.support import upcycled
from tests.support.models import QUIET_TRAINING
from tests.support.processes import ROOT, launch
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, user

pytestmark = [pytest.mark.slow, pytest.mark.extensive, pytest.mark.newest]

TEXT, IMAGE = [False] * 2, [True] * 2
# Whether the rows of the first and of the second process have images, step by step.
HAVE_IMAGES = [*TEXT, *TEXT, *IMAGE, *IMAGE, *TEXT, *IMAGE, *IMAGE, *TEXT, *TEXT, *TEXT]
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "image", "of", "the", "cat"]
MODELS = {"own": make_speaking_model, "upcycled": upcycled.make_speaking}
FROZEN = {"vision_encoder": "freeze", "experts": {"image": "freeze"}}
PLAIN = {"trainer_class": Trainer}
# By launch file and name: model, sizes of `DistributedConfig`, parts, packing, options of `run`.
RUNS = {
    "expert_parallel": {
        "ddp": ("own", {}, {}, False),
        "ddp, frozen": ("own", {}, FROZEN, True),
        "ddp, upcycled": ("upcycled", {}, {}, False),
        "ddp, upcycled, frozen": ("upcycled", {}, FROZEN, False),
        "fsdp": ("own", {"fsdp_size": 2}, FROZEN, False),
        "fsdp, upcycled": ("upcycled", {"fsdp_size": 2}, {}, True),
        "experts": ("own", {"fsdp_size": 2, "ep_size": 2}, {}, True),
        "experts, upcycled": ("upcycled", {"fsdp_size": 2, "ep_size": 2}, {}, False),
    },
    "fsdp2": {
        "fsdp2": ("own", {}, {}, True),
        "fsdp2, frozen": ("own", {}, FROZEN, False),
        "fsdp2, upcycled": ("upcycled", {}, {}, False),
        "fsdp2, upcycled, packed": ("upcycled", {}, {"connector": "freeze"}, True),
        "fsdp2, upcycled, plain trainer": ("upcycled", {}, {}, False, PLAIN),
    },
}
LAYERS = {"own": "SparseMoeVlmDecoderLayer", "upcycled": "LlamaDecoderLayer"}


def make_rows() -> list[dict]:
    rows = []
    for i, has_image in enumerate(HAVE_IMAGES):
        question = [make_image(i)] if has_image else []
        answer = " ".join(WORDS[i % 5 : 6 + i % 3] * (1 if i % 2 else 5))
        rows.append({"messages": [user(*question, " ".join(WORDS[: 2 + i % 4])), assistant(answer)]})
    return rows


def run(
    folder: Path, kind: str, sizes: dict, parts: dict, packing: bool, options: dict | None = None
) -> tuple[list[float], dict]:
    """Returns the losses and the tensors after a training."""
    trainer_class = (options or {}).get("trainer_class", SparseMoeTrainer)
    arguments = TrainingArguments(
        str(folder / "run"),
        **QUIET_TRAINING,
        max_steps=len(HAVE_IMAGES) // 4,
        logging_steps=1,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        gradient_checkpointing=bool(parts),
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # Accelerate refuses it on the CPU, unless the CPU is treated as a GPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LAYERS[kind]
    arguments.per_device_train_batch_size = 4 // arguments.world_size
    config = {"distributed_config": DistributedConfig(**sizes)} if sizes and arguments.world_size > 1 else {}
    model = AutoModelForImageTextToText.from_pretrained(folder / kind, trust_remote_code=True, **config)
    if trainer_class is Trainer:  # it computes router losses from the tokens of each process
        model.config.experts_config.output_router_logits = False
    packed = {"packing": True, "model": MODELS[kind]()} if packing else {}  # the check runs a whole model
    trainer = trainer_class(
        model,
        arguments,
        VisionLanguageCollator(make_processor(), **packed),
        make_rows(),
        optimizer_cls_and_kwargs=train_parts(model, parts, arguments),
    )
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    tensors = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], tensors


PROGRAM = """
import sys
from datetime import timedelta
from pathlib import Path
import torch

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
from tests.integration.test_mixed_batches import RUNS, run

folder = Path(sys.argv[1])
for name, settings in RUNS[(folder / "launch").read_text()].items():
    print(name, file=sys.stderr, flush=True)
    result = run(folder, *settings)
    if torch.distributed.get_rank() == 0:
        torch.save(result, folder / f"{name}.pt")
"""


@pytest.mark.parametrize("name", RUNS)
def test_any_mixture_of_batches(tmp_path, name):
    for kind, make in MODELS.items():
        settings = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
        make(expert_groups="isolated", **settings).save_pretrained(tmp_path / kind)
    (tmp_path / "launch").write_text(name)
    result = launch(ROOT / f"configuration/accelerate/{name}.yaml", PROGRAM, tmp_path, "--mixed_precision", "no")
    assert result.returncode == 0, result.stderr[-8000:]
    for run_name, settings in RUNS[name].items():
        losses, tensors = torch.load(tmp_path / f"{run_name}.pt")
        expected_losses, expected = run(tmp_path, *settings)
        assert losses == pytest.approx(expected_losses, rel=1e-4), run_name
        for tensor_name, tensor in tensors.items():
            message = f"{run_name}: {tensor_name}"
            torch.testing.assert_close(tensor, expected[tensor_name], atol=1e-5, rtol=1e-4, msg=message)
