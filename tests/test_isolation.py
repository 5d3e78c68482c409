"""Isolated experts: training on images keeps text outputs bit-identical, and text needs no image experts in memory."""

import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from modeling_sparse_moe_vlm.routing import router_biases
from modeling_sparse_moe_vlm.toolbox.training import freeze_text
from tests.integration.test_trainer import make_rows
from tests.support.batches import collate
from tests.support.models import QUIET_TRAINING, make_config, make_inputs, make_model

pytestmark = pytest.mark.newest

# Groups for text, groups for images, and always-on groups. One of them is only in one layer.
OWN_GROUPS = [
    {"name": "words", "num_experts": 3, "modalities": ["text"]},
    {"name": "pixels", "num_experts": 4, "modalities": ["image"]},
    {"name": "reading", "num_experts": 1, "modalities": ["text"], "always_on": True, "layers": [0]},
    {"name": "seeing", "num_experts": 1, "modalities": ["image"], "always_on": True},
]
KINDS = {
    "isolated": {"expert_groups": "isolated"},
    "own groups": {"expert_groups": OWN_GROUPS, "num_experts": None},
    "pool": {"expert_groups": OWN_GROUPS, "num_experts": None, "expert_pool": [0, 0]},
    "dense layer": {"expert_groups": "isolated", "mlp_only_layers": [0]},
    "top_p": {"expert_groups": "isolated", "router": "top_p", "norm_topk_prob": False},
    "fixed bias": {"expert_groups": "isolated", "router": "sigmoid", "router_bias_update_rate": 0.0},
    "learned priors": {"expert_groups": "isolated", "learned_modality_priors": True, "alpha_init": 0.9},
}
BALANCING = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "output_router_logits": True}


@torch.no_grad()
def read(model, images_per_row: int) -> torch.Tensor:
    return model.eval()(**make_inputs(seed=9, images_per_row=images_per_row)).logits


def train_on_images(model, optimizer_class=torch.optim.AdamW, steps: int = 5) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trainable, lr=0.02, weight_decay=0.1)
    model.train()
    for step in range(steps):
        inputs = make_inputs(seed=step)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_bit_identical_after_training_on_images(kind, optimizer_class):
    model = make_model(**KINDS[kind], **BALANCING)
    for bias in router_biases(model) or []:
        bias.normal_(std=0.1)
    text, images = read(model, 0), read(model, 1)
    handle = freeze_text(model)
    train_on_images(model, optimizer_class)
    handle.remove()
    assert torch.equal(read(model, 0), text)
    assert (read(model, 1) - images).abs().max() > 1e-2, "outputs for images change"


def test_all_parameters_for_images_are_trained():
    model = make_model(**KINDS["own groups"], **BALANCING)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    handle = freeze_text(model)
    train_on_images(model)
    handle.remove()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {
        name
        for name in before
        if any(part in name for part in ("vision_tower", "multi_modal_projector", ".pixels.", ".seeing.", "mlp.gate."))
    }
    assert changed == expected
    for layer in model.model.language_model.layers:
        rows = (
            layer.mlp.gate.weight != before[f"model.language_model.layers.{layer.self_attn.layer_idx}.mlp.gate.weight"]
        )
        assert rows.any(dim=1).tolist() == [False] * 3 + [True] * 4, (
            "only the router rows of image experts have gradients"
        )


@pytest.mark.parametrize("forgotten", ["nothing", "the routers", "the rest"])
def test_text_changes_without_freezing(forgotten):
    """Without `freeze_text`, weight decay changes the router rows for text, and training changes the rest."""
    model = make_model(**KINDS["isolated"], **BALANCING)
    text = read(model, 0)
    handle = freeze_text(model)
    if forgotten == "the routers":
        handle.remove()
    elif forgotten == "the rest":
        model.requires_grad_(True)
    train_on_images(model)
    handle.remove()
    assert torch.equal(read(model, 0), text) == (forgotten == "nothing")


def test_with_trainer_and_through_a_checkpoint(tmp_path):
    model = make_model(**KINDS["isolated"], **BALANCING)
    text = read(model, 0)
    handle = freeze_text(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        **QUIET_TRAINING,
        max_steps=4,
        save_steps=2,
        learning_rate=0.02,
        weight_decay=0.1,
    )
    Trainer(model=model, args=arguments, train_dataset=make_rows(), data_collator=collate).train()
    handle.remove()
    assert torch.equal(read(model, 0), text)
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        saved = SparseMoeVlmForConditionalGeneration.from_pretrained(tmp_path / checkpoint)
        assert torch.equal(read(saved, 0), text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"share experts between text and other modalities: \{'joint': \['text', 'image'\]\}"),
        ({"expert_groups": "joint"}, r'Give each its own groups, as `expert_groups="isolated"` does'),
        (
            {
                "expert_groups": [
                    *OWN_GROUPS[:2],
                    {"name": "everyone", "num_experts": 1, "always_on": True},
                ],
                "num_experts": None,
            },
            r"'everyone'",
        ),
        (
            {"expert_groups": "isolated", "router_bias_update_rate": 1e-3},
            r"`router_bias_update_rate` is 0.001.*set it to 0",
        ),
    ],
)
def test_models_whose_text_cannot_be_frozen(fields, message):
    model = make_model(**fields)
    with pytest.raises(ValueError, match=message):
        freeze_text(model)
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing is frozen after an error"


def test_other_modalities_may_share_a_group():
    groups = [
        {"name": "words", "num_experts": 2, "modalities": ["text"]},
        {"name": "rest", "num_experts": 4, "modalities": ["image", "video"]},
    ]
    model = make_model(expert_groups=groups, num_experts=None, modalities=["text", "image", "video"])
    freeze_text(model).remove()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".rest." in name for name in learning)
    assert not any(".words." in name for name in learning)


# ---------------------------------------------------------------- memory


def image_modules(model) -> list[str]:
    """Returns the names of all modules that text does not need."""
    ends = (".experts.image", "shared_experts.image", "vision_tower", "multi_modal_projector")
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_text_needs_no_image_expert_in_memory(implementation):
    """The forward pass and `generate` work although these modules are on the meta device and have no weights."""
    model = make_model(expert_groups="isolated")
    model.set_experts_implementation(implementation)
    inputs = make_inputs(images_per_row=0)
    with torch.no_grad():
        expected = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    names = image_modules(model)
    assert len(names) == 4
    for name in names:
        model.get_submodule(name).to("meta")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(input_ids=inputs["input_ids"]).logits, expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
        with pytest.raises((RuntimeError, NotImplementedError)):
            model(**make_inputs())


def test_text_reads_no_image_expert_from_the_disk(tmp_path):
    """If Accelerate offloads the image experts, text can be processed even after their files are deleted."""
    model = make_model(expert_groups="isolated")
    text, images = read(model, 0), read(model, 1)
    model.save_pretrained(tmp_path / "model")
    places = {
        name: "disk" if name.endswith(".experts.image") else "cpu"
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }
    offloaded = SparseMoeVlmForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    experts = [offloaded.get_submodule(name) for name, place in places.items() if place == "disk"]
    assert len(experts) == 2
    assert all(parameter.is_meta for module in experts for parameter in module.parameters())
    assert torch.equal(read(offloaded, 0), text)
    assert torch.equal(read(offloaded, 1), images)

    for folder in ("model", "offloaded"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    assert torch.equal(read(offloaded, 0), text)
    with pytest.raises(Exception, match=r"No such file|does not exist|not found"):
        read(offloaded, 1)


def test_a_joint_group_isolates_nothing():
    """With a joint group, only the vision tower and the connector belong to images."""
    names = image_modules(make_model(expert_groups="joint"))
    assert [name.rpartition(".")[2] for name in names] == ["vision_tower", "multi_modal_projector"]
    assert make_config(expert_groups="isolated").text_config.routed_group_names == ["text", "image"]
