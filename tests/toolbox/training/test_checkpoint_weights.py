"""Checkpoints of models of Transformers whose tensors have other names in checkpoints."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments, default_data_collator

from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from modeling_sparse_moe_vlm.toolbox.training.checkpoint_weights import load_renamed
from tests.support.in_tree_models import TEXT
from tests.support.models import QUIET_TRAINING
from tests.support.upcycled import make_dense, make_few_experts


def make_mixtral(_: str):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TEXT | {"num_local_experts": 4, "tie_word_embeddings": True})).eval()


def make_trainer(folder, model, **arguments) -> SparseMoeTrainer:
    rows = []
    for seed in range(8):
        input_ids = torch.randint(7, 99, (9,), generator=torch.Generator().manual_seed(seed))
        rows.append({"input_ids": input_ids, "labels": input_ids, "attention_mask": torch.ones_like(input_ids)})
    defaults = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    arguments = TrainingArguments(str(folder), **QUIET_TRAINING | defaults | arguments)
    return SparseMoeTrainer(model, arguments, default_data_collator, train_dataset=rows, eval_dataset=rows)


def assert_equal(model, other):
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("make", "kind"), [(make_dense, "llava"), (make_mixtral, "mixtral")])
def test_resumed_runs_and_the_best_checkpoint(make, kind, tmp_path):
    """The names differ by a prefix (LLaVA), and experts are stored one by one (Mixtral)."""
    whole = make_trainer(tmp_path, make(kind))
    whole.train()
    resumed = make_trainer(tmp_path, make(kind))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(resumed.model, whole.model)
    # With the largest loss as the best, the best checkpoint is not the last one: training decreases the loss.
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    best = make_trainer(tmp_path / "best", make(kind), learning_rate=1e-3, **options)
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = type(best.model).from_pretrained(tmp_path / "best/checkpoint-2")
    assert_equal(best.model, saved)


def test_checkpoints_that_trainer_loads(tmp_path):
    """Models of this package convert state dicts themselves, and some models have the same names everywhere."""
    for kind, model in (("qwen3_vl", make_dense("qwen3_vl")), ("upcycled", make_few_experts("llava"))):
        model.save_pretrained(tmp_path / kind)
        assert not load_renamed(model, tmp_path / kind)
    assert not load_renamed(torch.nn.Linear(1, 1), tmp_path)
    assert not load_renamed(make_dense("llava"), tmp_path)  # no weights


def test_sharded_checkpoints(tmp_path):
    model = make_dense("llava")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    changed = make_dense("llava").to(torch.float64)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1)
    assert load_renamed(changed, tmp_path)
    assert changed.dtype == torch.float64
    assert_equal(changed.float(), model)
