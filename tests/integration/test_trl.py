"""Supervised and preference tuning with TRL, on conversations with images."""

import inspect
import math

import peft
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from modeling_sparse_moe_vlm.fused_head import takes_fused_head
from modeling_sparse_moe_vlm.routing import RoutingRecord, router_biases
from modeling_sparse_moe_vlm.toolbox.evaluation import generate_answers
from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor, measure_routing, update_router_bias
from modeling_sparse_moe_vlm.toolbox.routing.watch import decoders
from modeling_sparse_moe_vlm.toolbox.training import GenerationMetrics, model_parts, train_parts
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, user

trl = pytest.importorskip("trl")

ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_length": None,
}


def changed_parameters(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("with_images", [True, False])
def test_sft(with_images, tmp_path):
    model, processor = make_speaking_model(router_aux_loss_coef=0.1), make_processor()
    # A processor distinguishes a typed image token from a placeholder, but a tokenizer by itself does not.
    parts = [{"type": "image"}] if with_images else []
    text = "What is <image> here?" if with_images else "What is here?"
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        assistant("A cat."),
    ]
    processor.tokenizer.chat_template = processor.chat_template
    columns = {"messages": [messages] * 4}
    if with_images:
        columns["images"] = [[make_image(i)] for i in range(4)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(columns),
        processing_class=processor if with_images else processor.tokenizer,
    )
    before = snapshot(model)
    trainer.train()
    changed = changed_parameters(model, before)
    assert {"lm_head.weight", "model.language_model.layers.0.mlp.experts.gate_up_proj"} <= changed
    assert any("vision_tower" in name for name in changed) == with_images
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < log["loss"] < 20


def test_sft_adds_the_router_losses(arrangement, tmp_path):
    messages = [user("the cat"), assistant("A cat.")]
    logs = []
    for coefficient in (0.0, 1.0):
        model = make_speaking_model(expert_groups=arrangement, router_aux_loss_coef=coefficient)
        processor = make_processor()
        processor.tokenizer.chat_template = processor.chat_template
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS | {"max_steps": 1}),
            train_dataset=Dataset.from_dict({"messages": [messages] * 2}),
            processing_class=processor.tokenizer,
        )
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert logs[1]["aux_loss"] > 0
    assert logs[1]["loss"] - logs[0]["loss"] == pytest.approx(logs[1]["aux_loss"], rel=1e-3)


def test_sft_trains_parts(tmp_path):
    model = make_speaking_model()
    arguments = trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS | {"max_steps": 1})
    parts = {"connector": 1e-3, "routers": 1e-2, "rest": "freeze"}
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows_with_images(),
        processing_class=make_processor(),
        optimizer_cls_and_kwargs=train_parts(model, parts, arguments),
    )
    before = snapshot(model)
    trainer.train()
    own = model_parts(model)
    assert changed_parameters(model, before) == {*own["connector"], *own["routers"]}
    rates = {
        parameter: group["initial_lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    assert rates == {p: parts[part] for part in ("connector", "routers") for p in own[part].values()}


def test_dpo(tmp_path):
    model, processor = make_speaking_model(), make_processor()
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        "chosen": [assistant("A cat.")],
        "rejected": [assistant("A mat.")],
    }
    columns = {key: [value] * 2 for key, value in row.items()} | {"images": [[make_image(i)] for i in range(2)]}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=make_speaking_model(),
        args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(columns),
        processing_class=processor,
    )
    before = snapshot(model)
    trainer.train()
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in changed_parameters(model, before)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(0.693, abs=0.05)


# ------------------------------------------------------------------------------------------------ router losses

COEFFICIENTS = {
    "balancing": {"router_aux_loss_coef": 0.5},
    "z-loss": {"router_aux_loss_coef": 0.001, "router_z_loss_coef": 2.0},
    "entropies": {
        "router_aux_loss_coef": 0.1,
        "router_local_entropy_coef": {"image": 0.7},
        "router_global_entropy_coef": 3.0,
    },
}
UNEVEN = [{"name": "a", "num_experts": 4, "layers": [0]}, {"name": "b", "num_experts": 6, "layers": [1]}]


def rows_with_images(number: int = 2) -> Dataset:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is here?"}]},
        assistant("A cat."),
    ]
    return Dataset.from_dict({"messages": [messages] * number, "images": [[make_image(i)] for i in range(number)]})


def train_sft(model, tmp_path, **kwargs):
    """Runs one step with a learning rate of zero. Returns the trainer, its log and the batch."""
    arguments = ARGUMENTS | {"max_steps": 1, "learning_rate": 0.0} | kwargs.pop("arguments", {})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=rows_with_images(),
        processing_class=make_processor(),
        **kwargs,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    return trainer, next(entry for entry in trainer.state.log_history if "loss" in entry), batch


def own_outputs(model, batch):
    """Returns the outputs of the model for a batch, with the forward method of its class."""
    model.train()
    return type(model).forward(model, **batch, output_router_logits=True)


@pytest.mark.parametrize("groups", ["hybrid", UNEVEN], ids=["hybrid", "uneven layers"])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_sft_trains_with_the_models_own_router_losses(coefficients, groups, tmp_path):
    numbers = {"num_experts": None} if groups is UNEVEN else {}
    model = make_speaking_model(expert_groups=groups, **numbers, **COEFFICIENTS[coefficients])
    _, log, batch = train_sft(model, tmp_path)
    own = own_outputs(model, batch)
    assert log["loss"] == pytest.approx(own.loss.item(), rel=1e-4)
    plain = type(model).forward(model, **batch, output_router_logits=False).loss.item()
    assert abs(log["loss"] - plain) > 0.01
    coefficient = model.config.text_config.router_aux_loss_coef
    assert coefficient * log["aux_loss"] == pytest.approx(own.loss.item() - plain, rel=1e-3)


def test_router_losses_and_generation_metrics_are_logged_in_sft(tmp_path):
    """Each router loss by itself, instead of TRL's `aux_loss`, which is the sum of all divided by a coefficient."""
    model, monitor = make_speaking_model(**COEFFICIENTS["z-loss"]), RoutingMonitor(by_layer=True)
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "report_to": ["tensorboard"]}
    rows = rows_with_images()
    (answer, _) = generate_answers(model, make_processor(), rows, max_new_tokens=4)
    rows = rows.add_column("references", [[answer], ["another"]])
    generated = GenerationMetrics(make_processor(), rows, max_new_tokens=4)
    trainer, log, batch = train_sft(
        model, tmp_path, callbacks=[generated, monitor], arguments=arguments, eval_dataset=rows_with_images()
    )
    own = own_outputs(model, batch)
    expected = {name: own[name].item() for name in ("aux_loss", "z_loss", "router_loss")}
    expected |= {f"aux_loss_{name}": own.aux_loss_by_modality[i].item() for i, name in enumerate(("text", "image"))}
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, abs=6e-5), name
        assert evaluation[f"eval_{name}"] == pytest.approx(value, abs=6e-5), name  # the same rows
        for split in ("train", "eval"):
            assert events.Scalars(f"{split}/{name}")[0].value == pytest.approx(value, abs=6e-5)
    assert evaluation["eval_exact_match"] == events.Scalars("eval/exact_match")[0].value == 50.0
    assert events.Scalars("train/routing/layer_1/joint/image/entropy")
    assert log["tokens_per_second"] > log["tokens_per_second_image"] > 0


def test_sft_gives_the_routers_the_gradient_of_the_models_own_loss(tmp_path):
    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            layers = model.model.language_model.layers
            self.kept = [layer.mlp.gate.weight.grad.clone() for layer in layers]

    model, gradients = make_speaking_model(**COEFFICIENTS["z-loss"]), Gradients()
    _, _, batch = train_sft(model, tmp_path, callbacks=[gradients], arguments={"max_grad_norm": 0.0})
    model.zero_grad()
    own_outputs(model, batch).loss.backward()
    for layer, gradient in zip(model.model.language_model.layers, gradients.kept, strict=True):
        torch.testing.assert_close(gradient, layer.mlp.gate.weight.grad, atol=1e-5, rtol=1e-3)


def test_sft_with_an_adapter_trains_with_the_models_own_router_losses(tmp_path):
    model = make_speaking_model(**COEFFICIENTS["z-loss"])
    config = peft.LoraConfig(target_modules=["q_proj"])
    trainer, log, batch = train_sft(model, tmp_path, peft_config=config)
    assert isinstance(trainer.model, peft.PeftModel)
    own = own_outputs(trainer.model.get_base_model(), batch)
    assert log["loss"] == pytest.approx(own.loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["router_z_loss_coef", "router_local_entropy_coef", "router_global_entropy_coef"])
def test_a_router_loss_that_trl_would_leave_out_is_an_error(name, tmp_path):
    model = make_speaking_model(**{"router_aux_loss_coef": 0.0, name: 0.1})
    with pytest.raises(ValueError, match=f"`{name}` would have no effect.*`router_aux_loss_coef` is not 0"):
        train_sft(model, tmp_path)
    dense = make_speaking_model(**{"router_aux_loss_coef": 0.0, name: 0.1, "mlp_only_layers": [0, 1]})
    train_sft(dense, tmp_path)


def test_without_any_coefficient_only_the_language_loss_is_trained_with(tmp_path):
    model = make_speaking_model(router_aux_loss_coef=0.0)
    _, log, batch = train_sft(model, tmp_path)
    plain = type(model).forward(model.train(), **batch, output_router_logits=False)
    assert log["loss"] == pytest.approx(plain.loss.item(), rel=1e-4)
    assert "aux_loss" not in log


def test_a_dense_model_has_no_router_loss(tmp_path):
    _, log, _ = train_sft(make_speaking_model(mlp_only_layers=[0, 1], router_aux_loss_coef=0.1), tmp_path)
    assert log["aux_loss"] == 0.0


def test_dpo_trains_with_the_models_own_router_losses(tmp_path):
    """At the start, policy and reference are equal, so the preference loss is log 2 and the rest are router losses."""
    settings = COEFFICIENTS["z-loss"] | {"expert_groups": UNEVEN, "num_experts": None}
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        "chosen": [assistant("A cat.")],
        "rejected": [assistant("A mat.")],
    }
    columns = {key: [value] * 2 for key, value in row.items()} | {"images": [[make_image(i)] for i in range(2)]}
    model = make_speaking_model(**settings)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=make_speaking_model(**settings),
        args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS | {"max_steps": 1, "learning_rate": 0.0}),
        train_dataset=Dataset.from_dict(columns),
        processing_class=make_processor(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    inputs = {key: value for key, value in batch.items() if key != "completion_mask" and "ref_" not in key}
    own = own_outputs(model, inputs | {"labels": inputs["input_ids"]})
    plain = type(model).forward(model, **inputs, labels=inputs["input_ids"], output_router_logits=False)
    assert log["loss"] - math.log(2) == pytest.approx((own.loss - plain.loss).item(), rel=1e-3)


def test_bias_is_updated_in_sft(tmp_path):
    """With the callback only, and without a balancing loss, so that TRL does not request router logits."""
    settings = {"router_bias_update_rate": 0.01, "router_aux_loss_coef": 0.0, "expert_groups": "joint"}
    model, by_hand = make_speaking_model(**settings), make_speaking_model(**settings)
    monitor = RoutingMonitor()
    _, log, batch = train_sft(model, tmp_path, callbacks=[monitor])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    update_router_bias(by_hand, measure_routing(by_hand, [inputs]))
    for bias, expected in zip(router_biases(model), router_biases(by_hand), strict=True):
        assert bias.any()
        assert torch.equal(bias, expected)
    assert "routing/joint/image/entropy" in log
    assert not any(decoder._forward_hooks or decoder._forward_pre_hooks for decoder in decoders(model))


# ------------------------------------------------------------------------------------------------ contracts of TRL


def test_trl_replaces_the_forward_as_expected():
    """`add_fused_lm_head` assigns a forward with `fused_lm_head`, which passes its arguments to the base model."""
    model, seen = make_speaking_model().train(), []
    trl.trainer.utils.add_fused_lm_head(model)
    assert "forward" in vars(model)
    assert takes_fused_head(inspect.unwrap(model.forward, stop=takes_fused_head))
    assert not takes_fused_head(type(model).forward)
    assert list(inspect.signature(model.forward).parameters) == list(
        inspect.signature(type(model)(model.config).forward).parameters
    )
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ids = torch.randint(10, 60, (2, 6))
    outputs = model(input_ids=ids, labels=ids, fused_lm_head=True, output_router_logits=True)
    assert type(seen[0]["routing_record"]) is RoutingRecord
    assert seen[0]["output_router_logits"] is False
    own = type(model).forward(model, input_ids=ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(outputs.loss, own.loss)
    as_ever = model(input_ids=ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(as_ever.loss, own.loss)
    assert as_ever.logits is not None
