"""DPO, KTO, GRPO and RLOO of TRL with images: the router losses, the biases, and the modality of tokens."""

import copy
import math

import peft
import pytest
import torch
from datasets import Dataset

from modeling_sparse_moe_vlm import fused_head
from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.expert_lora import expert_lora_config
from modeling_sparse_moe_vlm.toolbox.routing import RoutingMonitor, loss_watch, measure_routing, update_router_bias
from modeling_sparse_moe_vlm.toolbox.routing.watch import watch_routing
from tests.integration.test_trl import ARGUMENTS, UNEVEN
from tests.support import upcycled
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model

trl = pytest.importorskip("trl")

# All losses, and biases that move. The balancing loss has a small coefficient, by which TRL multiplies all of them.
SETTINGS = {
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 2.0,
    "router_global_entropy_coef": 3.0,
    "router_bias_update_rate": 0.01,
}
# The loss without router losses while the trained model equals the reference model: the preference loss of DPO is
# log 2, that of KTO is 1 - sigmoid(0), and the advantages of GRPO and RLOO sum to 0.
START = {"DPO": math.log(2), "KTO": 0.5, "GRPO": 0.0, "RLOO": 0.0}
GENERATION = {"num_generations": 2, "max_completion_length": 3, "temperature": 1.0}
OPTIONS = {
    "DPO": {"max_length": None},
    "KTO": {"max_length": None},
    "GRPO": GENERATION | {"loss_type": "grpo"},
    "RLOO": GENERATION | {"beta": 0.0},  # without a reference model
}


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def make_rows(name: str) -> Dataset:
    """Returns prompts of unequal length, which are padded on the left."""
    columns = {
        "prompt": [question("What?"), question("What is the cat on the mat?")],
        "images": [[make_image(i)] for i in range(2)],
    }
    if name == "DPO":
        columns |= {"chosen": [[assistant("A cat.")]] * 2, "rejected": [[assistant("A mat.")]] * 2}
    if name == "KTO":
        columns |= {"completion": [[assistant("A cat.")], [assistant("A mat.")]], "label": [True, False]}
    return Dataset.from_dict(columns)


def make_reward(completions, **kwargs) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def make_trainer(name: str, model, folder, **kwargs):
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "max_length"} | OPTIONS[name]
    arguments |= {"max_steps": 1, "shuffle_dataset": False} if name in ("GRPO", "RLOO") else {"max_steps": 1}
    if name in ("DPO", "KTO"):
        if "peft_config" not in kwargs:
            kwargs["ref_model"] = copy.deepcopy(model)
    else:
        kwargs["reward_funcs"] = make_reward
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(output_dir=str(folder), **arguments | kwargs.pop("arguments", {})),
        train_dataset=make_rows(name),
        processing_class=kwargs.pop("processor", None) or make_processor(),
        **kwargs,
    )


def record_inputs(model) -> list[dict]:
    """Records the inputs of the forward passes that are trained on."""
    recorded = []

    def record(module, args, kwargs):
        if torch.is_grad_enabled():
            recorded.append({key: value for key, value in kwargs.items() if torch.is_tensor(value)})

    model.model.register_forward_pre_hook(record, with_kwargs=True)
    return recorded


def router_loss(model, inputs) -> float:
    """Returns the router losses that the forward method of the class computes, with their coefficients."""
    outputs = type(model).forward(model.train(), **inputs, labels=inputs["input_ids"], output_router_logits=True)
    return outputs.router_loss.item()


def loss_of(trainer) -> dict:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


def train_and_compare(name: str, model, folder, **kwargs):
    start = copy.deepcopy(model)
    recorded = record_inputs(model)
    trainer = make_trainer(name, model, folder, callbacks=[RoutingMonitor()], **kwargs)
    counted = []
    watch_routing(model, lambda *pass_: counted.append(pass_), when=lambda _: torch.is_grad_enabled())
    trainer.train()
    (inputs,) = recorded
    assert len(counted) == 1
    # The modality ids that TRL passes belong to the tokens, although it pads the prompts on the left.
    is_image = (inputs["input_ids"] == 3) & (inputs["attention_mask"] == 1)
    assert is_image.sum(dim=1).tolist() == [4] * (4 if name == "DPO" else 2)
    inputs = inputs | {"mm_token_type_ids": is_image.long()}
    own = router_loss(start, inputs)
    assert own > 0.1
    log = loss_of(trainer)
    assert log["loss"] == pytest.approx(START[name] + own, rel=1e-4)
    assert log["router_loss"] == pytest.approx(own, abs=6e-5)
    return trainer, start, inputs


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("KTO", make_speaking_model),
        ("GRPO", upcycled.make_speaking),
        ("RLOO", make_speaking_model),
        pytest.param("DPO", make_speaking_model, marks=pytest.mark.extensive),
        pytest.param("DPO", upcycled.make_speaking, marks=pytest.mark.extensive),
        pytest.param("KTO", upcycled.make_speaking, marks=pytest.mark.extensive),
        pytest.param("GRPO", make_speaking_model, marks=pytest.mark.extensive),
        pytest.param("RLOO", upcycled.make_speaking, marks=pytest.mark.extensive),
    ],
)
def test_router_losses_and_biases(name, make, tmp_path):
    model = make(**SETTINGS)
    trainer, start, inputs = train_and_compare(name, model, tmp_path)
    update_router_bias(start, measure_routing(start, [inputs]))
    for bias, expected in zip(router_biases(model), router_biases(start), strict=True):
        assert bias.any()
        assert torch.equal(bias, expected)
    assert any(key.endswith("/image/entropy") for key in loss_of(trainer))


@pytest.mark.extensive
@pytest.mark.parametrize("name", OPTIONS)
def test_adapters_on_experts(name, tmp_path):
    model = make_speaking_model(**SETTINGS | {"router_bias_update_rate": 0.0})
    config = expert_lora_config(model, r=2)
    trainer, _, _ = train_and_compare(name, model, tmp_path, peft_config=config)
    assert isinstance(trainer.model, peft.PeftModel)
    adapters = {key: value for key, value in trainer.model.named_parameters() if "lora_B" in key}
    assert any(".experts" in key for key in adapters)
    # In the last layer, the images of the prompt have no effect on the completion.
    first = [value for key, value in adapters.items() if ".layers.0." in key]
    assert first
    assert all(value.any() for value in first)


@pytest.mark.extensive
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["uneven layers", "upcycled"])
def test_a_processor_that_pads_on_the_right(kind, name, tmp_path):
    processor = make_processor()
    processor.tokenizer.padding_side = "right"
    if kind == "upcycled":
        model = upcycled.make_speaking(**SETTINGS)
    else:
        model = make_speaking_model(**SETTINGS | {"expert_groups": UNEVEN, "num_experts": None})
    train_and_compare(name, model, tmp_path, processor=processor)


# ------------------------------------------------------------------------------------ coefficients of the trainer


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(fused_head.logger, "warning_once", messages.append)
    monkeypatch.setattr(loss_watch.logger, "warning", messages.append)
    return messages


def test_the_coefficient_of_the_trainer_replaces_that_of_the_model(warnings, tmp_path):
    model = make_speaking_model(router_aux_loss_coef=0.1)
    start, recorded = copy.deepcopy(model), record_inputs(model)
    arguments = {"router_aux_loss_coef": 0.3}
    trainer = make_trainer("KTO", model, tmp_path, arguments=arguments, callbacks=[RoutingMonitor()])
    trainer.train()
    own = router_loss(start, recorded[0])
    assert loss_of(trainer)["loss"] == pytest.approx(0.5 + 3 * own, rel=1e-4)
    assert warnings == []


def test_a_coefficient_of_the_trainer_that_scales_other_losses_is_warned_of(warnings, tmp_path):
    model = make_speaking_model(**SETTINGS)
    start, recorded = copy.deepcopy(model), record_inputs(model)
    arguments = {"router_aux_loss_coef": 0.002}
    trainer = make_trainer("KTO", model, tmp_path, arguments=arguments, callbacks=[RoutingMonitor()])
    trainer.train()
    assert loss_of(trainer)["loss"] == pytest.approx(0.5 + 2 * router_loss(start, recorded[0]), rel=1e-4)
    (message,) = warnings
    assert "is 0.002 in the trainer's configuration, but 0.001 in the model's" in message
    assert "multiplies `router_z_loss_coef`, `router_global_entropy_coef` by 2 as well" in message


@pytest.mark.parametrize("name", ["KTO", pytest.param("RLOO", marks=pytest.mark.extensive)])
def test_no_router_loss_is_dropped_in_silence(name, warnings, tmp_path):
    """With a coefficient of 0, these trainers do not request router losses, whatever the model's configuration says."""
    arguments = {"router_aux_loss_coef": 0.0}
    model = make_speaking_model(router_aux_loss_coef=0.1)
    trainer = make_trainer(name, model, tmp_path, arguments=arguments, callbacks=[RoutingMonitor()])
    trainer.train()
    assert loss_of(trainer)["loss"] == pytest.approx(START[name], abs=1e-6)
    (message,) = warnings
    assert "`router_aux_loss_coef=0.1`, but the trainer does not request router losses" in message
    trainer = make_trainer(name, make_speaking_model(**SETTINGS), tmp_path, arguments=arguments)
    with pytest.raises(ValueError, match="`router_z_loss_coef`, `router_global_entropy_coef` would have no effect"):
        trainer.train()
    dense = make_speaking_model(**SETTINGS, mlp_only_layers=[0, 1])
    make_trainer(name, dense, tmp_path, arguments=arguments).train()
    assert len(warnings) == 1
