"""A reward model with images in TRL's RewardTrainer."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from modeling_sparse_moe_vlm import modeling_upcycled_classification
from modeling_sparse_moe_vlm.experts_config import experts_config_of
from modeling_sparse_moe_vlm.losses import router_losses
from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.data import PreferenceCollator, VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.installed_code import use_installed_code
from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor, loss_watch, measure_routing, update_router_bias
from modeling_sparse_moe_vlm.toolbox.routing.watch import decoders
from modeling_sparse_moe_vlm.toolbox.training import RouterLossesMixin
from tests.integration.test_trl import ARGUMENTS
from tests.support.pretended_processes import pretend_two_processes
from tests.support.processors import assistant, make_image, make_processor, make_speaking_config
from tests.support.upcycled import make_speaking
from tests.test_model_values import SparseMoeVlmForSequenceClassification

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.newest


def make_upcycled_scorer(folder, **fields):
    """Loads an upcycled LLaVA for sequence classification, by which `RewardTrainer` also loads models by name."""
    make_speaking("llava", **fields).save_pretrained(folder)
    use_installed_code(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


def make_scorer(**text_config):
    config = make_speaking_config(**text_config)
    config.num_labels = 1
    torch.manual_seed(0)
    return SparseMoeVlmForSequenceClassification(config)


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def make_rows(margins=None) -> list[dict]:
    rows = []
    for number, text in enumerate(("What?", "What is the cat on the mat?")):
        row = {"prompt": question(text), "chosen": [assistant("A cat.")], "rejected": [assistant("The mat, the mat.")]}
        rows.append(row | {"images": [make_image(number)]})
        if margins is not None:
            rows[-1]["margin"] = margins[number]
    return rows


@pytest.mark.parametrize(
    ("is_upcycled", "margins"), [(False, None), (False, [0.5, 2.0]), (True, None)], ids=["ours", "margins", "upcycled"]
)
def test_reward_trainer_with_images(is_upcycled, margins, monkeypatch, tmp_path):
    warnings: list[str] = []
    monkeypatch.setattr(loss_watch.logger, "warning", warnings.append)
    monkeypatch.setattr(modeling_upcycled_classification.logger, "warning", warnings.append)
    fields = {"router_bias_update_rate": 0.01, "router_z_loss_coef": 0.5}
    model = make_upcycled_scorer(tmp_path / "upcycled", **fields) if is_upcycled else make_scorer(**fields)
    processor = make_processor()
    processor.tokenizer.chat_template = processor.chat_template
    rows, collator = make_rows(margins), PreferenceCollator(processor)
    batch = collator(rows)
    start = copy.deepcopy(model).train()
    start.config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id
    start.may_warn_of_losses = False
    arguments = ARGUMENTS | {"max_steps": 1, "remove_unused_columns": False}
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
        data_collator=collator,
        callbacks=[RoutingMonitor()],
    )
    trainer.train()
    inputs = {name: value for name, value in batch.items() if name != "margin"}
    chosen, rejected = start(**inputs).logits.squeeze(1).chunk(2)
    expected = -F.logsigmoid(chosen - rejected - torch.tensor(margins or [0.0, 0.0])).mean()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)
    other = start(**inputs | {"pixel_values": inputs["pixel_values"].flip(0)}).logits.squeeze(1).chunk(2)[0]
    assert (other - chosen).abs().min() > 1e-3, "the images matter"
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, start.get_parameter(name))]
    assert {"score.weight", "model.language_model.layers.0.mlp.experts.gate_up_proj"} <= set(changed)
    assert any("vision_tower" in name for name in changed)
    update_router_bias(start, measure_routing(start, [inputs]))
    for bias, by_hand in zip(router_biases(model), router_biases(start), strict=True):
        assert bias.any()
        assert torch.equal(bias, by_hand)
    (message,) = warnings
    assert message.startswith("`router_aux_loss_coef`, `router_z_loss_coef` have no effect: models for sequence")


class SparseMoeRewardTrainer(RouterLossesMixin, trl.RewardTrainer):
    """As in the documentation."""


def add_router_losses_by_hand(model, inputs) -> torch.Tensor:
    """Returns the loss of `RewardTrainer` and the router losses, from the router logits that the base model returns."""
    base, config = model.base_model, experts_config_of(model.config)
    found = base(**inputs, output_router_logits=True)
    ids = base.get_mm_token_type_ids(inputs["input_ids"], None, inputs["mm_token_type_ids"])
    losses = router_losses(
        config, found.router_logits, ids, inputs["attention_mask"], router_indices=found.router_indices
    )
    chosen, rejected = model(**inputs).logits.squeeze(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean() + losses.total(config)


@pytest.mark.parametrize("is_upcycled", [False, True], ids=["ours", "upcycled"])
def test_router_losses_are_part_of_the_loss(is_upcycled, monkeypatch, tmp_path):
    """Two micro-batches: the gradient is the mean of theirs, router losses included."""
    warnings: list[str] = []
    monkeypatch.setattr(loss_watch.logger, "warning", warnings.append)
    monkeypatch.setattr(modeling_upcycled_classification.logger, "warning", warnings.append)
    fields = {"router_aux_loss_coef": 0.25, "router_z_loss_coef": 0.5}
    model = make_upcycled_scorer(tmp_path / "upcycled", **fields) if is_upcycled else make_scorer(**fields)
    processor = make_processor()
    processor.tokenizer.chat_template = processor.chat_template
    rows, collator = make_rows(), PreferenceCollator(processor)
    start = copy.deepcopy(model).train()
    start.config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id
    start.may_warn_of_losses = False
    arguments = ARGUMENTS | {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "eval_strategy": "steps",
    }
    trainer = SparseMoeRewardTrainer(
        model,
        trl.RewardConfig(str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=processor.tokenizer,
        data_collator=collator,
        callbacks=[RoutingMonitor()],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    batches = [dict(collator([row])) for row in rows]
    by_hand = torch.stack([add_router_losses_by_hand(start, batch) for batch in batches]).mean()
    by_hand.backward()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(by_hand.item(), rel=1e-4)
    with torch.no_grad():
        without = torch.stack([-F.logsigmoid(start(**batch).logits.squeeze(1).diff().neg()) for batch in batches])
    assert before == pytest.approx(without.mean().item(), rel=1e-4), "evaluations have the loss of the trainer"
    assert log["router_loss"] == pytest.approx(by_hand.item() - without.mean().item(), abs=2e-4)
    assert log["router_loss"] == pytest.approx(0.25 * log["aux_loss"] + 0.5 * log["z_loss"], abs=2e-4)
    assert log["aux_loss_text"] > 0
    for name, parameter in start.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            parameter - model.get_parameter(name),
            gradient,
            atol=2e-6,
            rtol=1e-3,
            msg=lambda text, n=name: f"{n} {text}",
        )
    assert warnings == []
    assert not any(decoder._forward_pre_hooks for decoder in decoders(model)), "no hooks are left"


def test_router_losses_with_outputs_and_of_wrong_models():
    class Trainer:
        def __init__(self, model):
            self.model, self.callback_handler = model, SimpleNamespace(callbacks=[])

        def compute_loss(self, model, inputs, return_outputs=False, passes=1):
            for _ in range(passes):
                outputs = model(**inputs)
            return (outputs.logits.mean(), outputs) if return_outputs else outputs.logits.mean()

    class WithRouterLosses(RouterLossesMixin, Trainer):
        pass

    model = make_scorer(router_aux_loss_coef=0.25).train()
    model.config.get_text_config().pad_token_id = make_processor().tokenizer.pad_token_id
    inputs = dict(PreferenceCollator(make_processor())(make_rows()))
    trainer = WithRouterLosses(model)
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    assert loss.item() == trainer.compute_loss(model, inputs).item()
    router_loss = loss - outputs.logits.mean()
    assert router_loss > 0.1
    # The losses of several forward passes are averaged.
    assert trainer.compute_loss(model, inputs, passes=3).item() == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.compute_loss(model.eval(), inputs).item() == model(**inputs).logits.mean().item()
    with torch.no_grad():
        assert trainer.compute_loss(model.train(), inputs).item() == model(**inputs).logits.mean().item()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    dense = LlamaForSequenceClassification(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=8))
    for wrong in (model.model, dense, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=f"a model of this package for .*, but got {type(wrong).__name__}. Models"):
            WithRouterLosses(wrong)


def test_router_losses_are_those_of_all_processes(monkeypatch):
    """Data parallelism averages the gradients of the processes, so each has the sum over the tokens of all of them."""

    class Trainer:
        def __init__(self, model):
            self.model, self.callback_handler = model, SimpleNamespace(callbacks=[])

        def compute_loss(self, model, inputs):
            return 0.0 * model(**inputs).logits.sum()

    class WithRouterLosses(RouterLossesMixin, Trainer):
        pass

    model = make_scorer(router_aux_loss_coef=0.25, router_z_loss_coef=0.5).train()
    model.config.get_text_config().pad_token_id = make_processor().tokenizer.pad_token_id
    batches = [dict(PreferenceCollator(make_processor())([row])) for row in make_rows()]
    whole = dict(PreferenceCollator(make_processor())(make_rows()))
    trainer = WithRouterLosses(model)
    expected = trainer.compute_loss(model, whole)
    expected.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    mine, others = pretend_two_processes(monkeypatch)
    sums = []
    for batch in batches:
        mine.clear()
        trainer.compute_loss(model, batch)
        sums.append(list(mine))
    for batch, of_other in zip(batches, reversed(sums), strict=True):
        others[:] = of_other
        loss = trainer.compute_loss(model, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (loss / 2).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_batches():
    processor, rows = make_processor(), make_rows([1, 2])
    batch = PreferenceCollator(processor)(rows)
    conversations = [
        {"messages": row["prompt"] + row[side], "images": row["images"]}
        for side in ("chosen", "rejected")
        for row in rows
    ]
    expected = VisionLanguageCollator(processor)(conversations)
    assert batch.keys() == (expected.keys() - {"labels"}) | {"margin"}
    assert all(torch.equal(batch[name], expected[name]) for name in batch if name != "margin")
    assert torch.equal(batch["margin"], torch.tensor([1.0, 2.0]))
    # As `RewardTrainer` changes rows; and without a prompt.
    full = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    without = [{name: value for name, value in row.items() if name != "prompt"} for row in full]
    for changed in (full, without):
        assert torch.equal(PreferenceCollator(processor)(changed)["input_ids"], batch["input_ids"])


def test_rows_that_cannot_be_compared():
    rows = make_rows()
    with pytest.raises(ValueError, match="row 1 of the batch has no `rejected`"):
        PreferenceCollator(make_processor())([rows[0], rows[1] | {"rejected": []}])
    with pytest.raises(ValueError, match=r"pairs\.jsonl.*max_length"):
        PreferenceCollator(make_processor(), max_length=5)([rows[0] | {"source": "pairs.jsonl", "row": 3}])


def test_models_without_router_losses_are_not_warned_of(monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(loss_watch.logger, "warning", warnings.append)
    loss_watch.warn_of_classifiers(make_scorer(router_aux_loss_coef=0.0))
    loss_watch.warn_of_classifiers(make_scorer(mlp_only_layers=[0, 1]))
    loss_watch.warn_of_classifiers(make_scorer().model)
    loss_watch.warn_of_classifiers(torch.nn.Linear(1, 1))
    assert warnings == []
