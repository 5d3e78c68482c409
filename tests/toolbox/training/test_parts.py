"""Parts of a model are frozen or train with a learning rate of their own, in any trainer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.training import (
    SparseMoeTrainer,
    describe_parts,
    freeze_text,
    model_parts,
    train_parts,
)
from tests.integration.test_trainer import make_rows
from tests.support import upcycled
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_model

RATE, DECAY = 1e-2, 0.1


def arguments_of(tmp_path, **changes) -> TrainingArguments:
    defaults = QUIET_TRAINING | {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "logging_steps": 1,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(str(tmp_path), **defaults | changes)


def make_trainer(model, parts, tmp_path, trainer_class=Trainer, rows=None, **changes) -> Trainer:
    arguments = arguments_of(tmp_path, **changes)
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=make_rows() if rows is None else rows,
        data_collator=collate,
        optimizer_cls_and_kwargs=train_parts(model, parts, arguments),
    )


def changed_parts(model, train) -> set[str]:
    """Returns the parts of which any parameter changed, to the bit. If one did, all of its part must have changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train()
    changed = set()
    for part, parameters in model_parts(model).items():
        differ = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
        assert len(differ) in (0, len(parameters)), (part, parameters.keys() - set(differ))
        changed |= {part} if differ else set()
    return changed


def groups_of(trainer) -> list[tuple[float, float, set[str]]]:
    """Returns the learning rate, the weight decay and the names of the parameters of each group of the optimizer."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return [
        (group["lr"], group["weight_decay"], {names[parameter] for parameter in group["params"]})
        for group in trainer.create_optimizer().param_groups
    ]


def test_what_is_frozen_stays_equal_to_the_bit_and_the_rest_trains(tmp_path):
    model = make_model(expert_groups="isolated", output_router_logits=True, router_aux_loss_coef=0.1)
    parts = {"vision_encoder": "freeze", "attention": "freeze", "experts": {"text": "freeze"}, "connector": 1e-3}
    trainer = make_trainer(model, parts, tmp_path, SparseMoeTrainer)
    assert changed_parts(model, trainer.train) == {"connector", "embeddings", "experts.image", "routers", "rest"}


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_only_the_connector_of_an_upcycled_model_in_the_plain_trainer(kind, tmp_path):
    model = upcycled.make_upcycled(kind)
    trainer = make_trainer(model, {"connector": 1e-3, "rest": "freeze"}, tmp_path, rows=upcycled.make_rows(kind))
    expected = set(model_parts(model)["connector"])
    groups = groups_of(trainer)
    assert [(rate, decay) for rate, decay, _ in groups] == [(1e-3, DECAY), (1e-3, 0.0)]
    assert set.union(*(names for *_, names in groups)) == expected
    trainer.optimizer = None
    if kind == "llava":
        assert changed_parts(model, trainer.train) == {"connector"}


def test_each_part_has_its_learning_rate_and_the_weight_decay_of_trainer(tmp_path):
    model = make_model()
    parts = {"connector": 1e-3, "experts": {"image": 1e-4, "joint": 1e-3}, "routers": "freeze", "attention": "train"}
    trainer = make_trainer(model, parts | {"rest": 5e-4}, tmp_path)
    by_part = model_parts(model)
    decays = set(Trainer(model=model, args=trainer.args).get_decay_parameter_names(model))
    rates = {
        RATE: ["attention"],
        1e-3: ["connector", "experts.joint"],
        5e-4: ["vision_encoder", "embeddings", "experts.text", "rest"],
        1e-4: ["experts.image"],
    }
    expected = {
        (rate, decay): {name for part in of_rate for name in by_part[part] if (name in decays) == (decay > 0)}
        for rate, of_rate in rates.items()
        for decay in (DECAY, 0.0)
    }
    groups = groups_of(trainer)
    assert {(rate, decay): names for rate, decay, names in groups} == {key: own for key, own in expected.items() if own}
    assert groups[0][:2] == (RATE, DECAY), "the logged learning rate is that of the first group"
    assert len(groups) == 7  # one expert group has matrices only
    biases = {name for _, decay, names in groups if decay == 0 for name in names}
    assert "model.multi_modal_projector.linear_1.bias" in biases
    assert "model.language_model.norm.weight" in biases


def test_without_learning_rates_trainer_makes_its_usual_optimizer(tmp_path):
    model = make_model()
    assert train_parts(model, {}, arguments_of(tmp_path)) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    trainer = make_trainer(model, {"vision_encoder": "freeze", "routers": "train"}, tmp_path)
    groups = groups_of(trainer)
    assert [(rate, decay) for rate, decay, _ in groups] == [(RATE, DECAY), (RATE, 0.0)]
    frozen = set(model_parts(model)["vision_encoder"])
    assert set.union(*(names for *_, names in groups)) == {name for name, _ in model.named_parameters()} - frozen


def test_the_default_learning_rate_for_every_part_is_training_without_parts(tmp_path):
    losses = []
    for parts in ({}, {"rest": RATE}):
        trainer = make_trainer(make_model(), parts, tmp_path, optim="adamw_torch")
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        names = [names for *_, names in groups_of(trainer)]
        assert len(names) == 2
    assert losses[0] == losses[1]


def test_schedulers_scale_every_learning_rate(tmp_path):
    trainer = make_trainer(
        make_model(), {"connector": 1e-3, "experts": 1e-4}, tmp_path, lr_scheduler_type="linear", max_steps=4
    )
    trainer.create_optimizer_and_scheduler(4)
    assert sorted(set(trainer.lr_scheduler.get_last_lr())) == [1e-4, 1e-3, RATE]
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    assert sorted(set(trainer.lr_scheduler.get_last_lr())) == pytest.approx([0.75e-4, 0.75e-3, 0.75 * RATE])


def test_options_of_the_optimizer_are_those_of_the_arguments(tmp_path):
    trainer = make_trainer(make_model(), {"connector": 1e-3}, tmp_path, adam_beta2=0.9, optim="adamw_torch")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}


def test_a_resumed_run_equals_one_without_interruption(tmp_path):
    parts = {"vision_encoder": "freeze", "connector": 1e-3, "experts": {"image": 1e-4, "text": "freeze"}}

    def run(folder, resume=None, **changes):
        model = make_model(expert_groups="isolated")
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "linear"}
        trainer = make_trainer(model, parts, folder, SparseMoeTrainer, **options | changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    losses, again = ([entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed))
    assert losses == again
    assert len(losses) == 4


def test_frozen_routers_keep_their_biases(tmp_path):
    settings = {"router_bias_update_rate": 0.05, "output_router_logits": True, "router_aux_loss_coef": 0.0}
    for parts, moves in (({"routers": "freeze"}, False), ({"connector": 1e-3}, True)):
        model = make_model(**settings)
        biases = [
            module.e_score_correction_bias
            for module in model.modules()
            if hasattr(module, "weight") and hasattr(module, "e_score_correction_bias")
        ]
        assert biases
        make_trainer(model, parts, tmp_path, SparseMoeTrainer).train()
        assert any(bias.any() for bias in biases) == moves


def test_with_frozen_text(tmp_path):
    model = make_model(expert_groups="isolated")
    handle = freeze_text(model)
    parts = {"connector": 1e-3, "experts": {"image": 1e-4}}
    trainer = make_trainer(model, parts, tmp_path)
    by_rate: dict[float, set[str]] = {}
    for rate, _, names in groups_of(trainer):
        by_rate.setdefault(rate, set()).update(names)
    own = model_parts(model)
    assert by_rate == {
        RATE: {*own["vision_encoder"], *own["routers"]},
        1e-3: set(own["connector"]),
        1e-4: set(own["experts.image"]),
    }
    handle.remove()
    with pytest.raises(ValueError, match=r"`parts.experts.text` is 0.001, but all its parameters are frozen already"):
        train_parts(model, {"experts": {"text": 1e-3}}, trainer.args)


def test_adapters_train_with_the_rate_of_their_part(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    trainer = make_trainer(model, {"attention": 1e-3, "vision_encoder": "freeze"}, tmp_path)
    (group,) = groups_of(trainer)
    assert group == (1e-3, DECAY, {name for name in model_parts(model)["attention"] if "lora_" in name})

    late = make_model()
    optimizer_class, options = train_parts(late, {"connector": 1e-3}, trainer.args)
    adapted = get_peft_model(late, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.lora_A.default.weight' was not in the model .* `get_peft_model`"):
        optimizer_class()(adapted, **options)


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: torch.nn.ModuleDict({"module": model})])
def test_wrapped_models(wrap, tmp_path):
    model = make_model()
    optimizer_class, options = train_parts(model, {"connector": 1e-3}, arguments_of(tmp_path))
    groups = optimizer_class()(wrap(model), **options).param_groups
    assert {parameter for group in groups if group["lr"] == 1e-3 for parameter in group["params"]} == set(
        model_parts(model)["connector"].values()
    )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"router": "freeze"}, r"unknown names \['router'\]; the parts are vision_encoder, connector, .*, rest"),
        ({"connector": 0}, r"`parts.connector` must be 'freeze', 'train' or a learning rate above 0, but got 0"),
        ({"connector": -1e-3}, r"`parts.connector` must be .* but got -0.001"),
        ({"connector": True}, r"`parts.connector` must be .* but got True"),
        ({"connector": None}, r"`parts.connector` must be .* but got None"),
        ({"connector": float("inf")}, r"`parts.connector` must be .* but got inf"),
        ({"connector": float("nan")}, r"`parts.connector` must be .* but got nan"),
        ({"rest": "frozen"}, r"`parts.rest` must be .* but got 'frozen'"),
        ({"attention": {"q": 1e-3}}, r"`parts.attention` must be .* but got \{'q': 0.001\}"),
        ({"experts": {"image": "no"}}, r"`parts.experts.image` must be .* but got 'no'"),
        (
            {"experts": {"audio": 1e-3}},
            r"`parts.experts.audio` must be the name of an expert group or a modality .*joint",
        ),
        ([], r"`parts` must be a mapping"),
        ({"rest": "freeze"}, "nothing would train"),
    ],
)
def test_wrong_parts(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_parts(make_model(), parts, arguments_of(tmp_path))


def test_parts_that_the_model_does_not_have(tmp_path):
    arguments, dense = arguments_of(tmp_path), upcycled.make_dense("llama")
    message = r"`parts.connector`: this model has no such part. It has embeddings, attention, rest"
    with pytest.raises(ValueError, match=message):
        train_parts(dense, {"connector": "freeze"}, arguments)
    with pytest.raises(ValueError, match=r"`parts.experts.image`: the experts of this model have no groups"):
        train_parts(dense, {"experts": {"image": "freeze"}}, arguments)
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_a_modality_stands_for_the_groups_that_serve_only_it(tmp_path):
    groups = [
        {"name": "shared", "num_experts": 2},
        {"name": "seen", "num_experts": 2, "modalities": ["image"]},
        {"name": "always_seen", "num_experts": 1, "modalities": ["image"], "always_on": True},
        {"name": "read", "num_experts": 2, "modalities": ["text"]},
    ]
    model = make_model(expert_groups=groups, num_experts=None)
    parts = {"experts": {"image": "freeze", "read": "train"}}
    assert train_parts(model, parts, arguments_of(tmp_path)) is None
    frozen = {part for part, own in model_parts(model).items() if not any(p.requires_grad for p in own.values())}
    assert frozen == {"experts.seen", "experts.always_seen"}
    twice = {"experts": {"text": 1e-3, "read": 1e-4}}
    with pytest.raises(ValueError, match=r"`parts.experts.read` sets experts.read, which another entry"):
        train_parts(model, twice, arguments_of(tmp_path))


def test_optimizers_that_group_the_parameters_themselves(tmp_path, monkeypatch):
    model, arguments = make_model(), arguments_of(tmp_path, optim="adamw_torch_fused")
    for found in ((object, {"lr": 1.0}), (torch.optim.SGD, {"params": [], "lr": 1.0})):
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *_, found=found: found))
        with pytest.raises(ValueError, match=r"the optimizer 'adamw_torch_fused' groups the parameters itself"):
            train_parts(model, {"connector": 1e-3, "routers": "freeze"}, arguments)
        assert all(parameter.requires_grad for parameter in model.parameters()), "an error changes nothing"
        assert train_parts(make_model(), {"connector": "freeze"}, arguments) is None


def test_the_table_counts_what_trains(tmp_path):
    model = make_model()
    parts = {"vision_encoder": "freeze", "connector": "1e-3", "experts": {"image": "freeze"}}
    train_parts(model, parts, arguments_of(tmp_path))
    model.lm_head.weight.requires_grad_(False)
    lines = [line.split() for line in describe_parts(model, parts, RATE).splitlines()]
    assert lines[0] == ["part", "parameters", "train", "learning", "rate"]
    sizes = {part: sum(p.numel() for p in own.values()) for part, own in model_parts(model).items()}
    rates = dict.fromkeys(sizes, "0.01") | {"connector": "0.001", "vision_encoder": "frozen", "experts.image": "frozen"}
    trained = sizes | {"vision_encoder": 0, "experts.image": 0, "embeddings": 99 * 32}
    assert sizes["embeddings"] == 2 * 99 * 32
    assert lines[1:-1] == [[part, f"{sizes[part]:,}", f"{trained[part]:,}", rates[part]] for part in sizes]
    assert lines[-1] == ["all", f"{model.num_parameters():,}", f"{sum(trained.values()):,}"]
