"""A row with a blank image, which batches without images get where all processes run the vision encoder."""

from types import SimpleNamespace

import pytest
import torch

from modeling_sparse_moe_vlm.toolbox.data import PreferenceCollator, VisionLanguageCollator
from modeling_sparse_moe_vlm.toolbox.data.blank_images import mask_last_row
from modeling_sparse_moe_vlm.toolbox.training.resuming import ResumableTrainer
from tests.support import upcycled
from tests.support.batches import collate
from tests.support.packed_rows import make_base, make_packer, make_rows
from tests.support.processors import assistant, make_image, make_processor, make_speaking_model, make_tokenizer, user

ROUTER_LOSSES = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
TEXTS = [
    {"messages": [user("the cat"), assistant("sat on the mat " * 12)]},
    {"messages": [user("the"), assistant("mat")]},
    {"messages": [user("the image"), assistant("of the cat")]},
]
AS_TEXT = [{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}]
MODELS = {"own": make_speaking_model, "upcycled": upcycled.make_speaking}


def loss_and_gradients(model, batch):
    model.zero_grad()
    outputs = model.train()(**batch, num_items_in_batch=torch.tensor(9))
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return outputs.loss.detach(), outputs.router_loss.detach(), gradients


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_blank_image_has_no_weight(name, packing):
    model = MODELS[name](**ROUTER_LOSSES)
    arguments = {"packing": packing, "model": model if packing else None}
    plain = VisionLanguageCollator(make_processor(), **arguments)(TEXTS)
    # The blank image does not count for limits.
    collator = VisionLanguageCollator(make_processor(), **arguments, blank_images=True, max_image_tokens_per_batch=1)
    batch = collator(TEXTS)
    assert "pixel_values" not in plain
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert [size.images for size in batch.row_sizes] == [0, 0, 0]
    loss, router_loss, gradients = loss_and_gradients(model, dict(plain))
    its_loss, its_router_loss, its_gradients = loss_and_gradients(model, dict(batch))
    torch.testing.assert_close(its_loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(its_router_loss, router_loss, atol=1e-6, rtol=1e-5)
    for parameter, gradient in its_gradients.items():
        if gradients[parameter] is not None:
            torch.testing.assert_close(gradient, gradients[parameter], atol=1e-5, rtol=1e-4, msg=parameter)
        elif gradient is not None:
            assert not gradient.any(), parameter
    assert any("vision_tower" in parameter and gradient is not None for parameter, gradient in its_gradients.items())


def test_a_batch_with_an_image_stays_as_it_is():
    rows = [*TEXTS, {"messages": [user(make_image(), "the"), assistant("cat")]}]
    plain = VisionLanguageCollator(make_processor())(rows)
    batch = VisionLanguageCollator(make_processor(), blank_images=True)(rows)
    assert list(batch) == list(plain)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


def test_the_last_row_is_padding():
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.full((2, 3), 5)}
    masked = mask_last_row(batch)
    assert masked["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert masked["labels"].tolist() == [[5, 5, 5], [-100, -100, -100]]
    assert batch["labels"].tolist() == [[5, 5, 5], [5, 5, 5]]
    assert list(masked) == list(batch)
    positions = mask_last_row(batch | {"image_grid_thw": torch.ones(1, 3)})["position_ids"]
    assert positions.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_masked_images_do_not_change_the_loss_of_texts(kind):
    """Models with multimodal rotary embeddings need positions for it."""
    rows = upcycled.make_rows(kind)
    model = upcycled.make_few_experts(kind, **ROUTER_LOSSES)
    expected = loss_and_gradients(model, collate(rows[:4:2]))[:2]
    actual = loss_and_gradients(model, mask_last_row(collate([*rows[:4:2], rows[1]])))[:2]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_padding_rows_are_packed_last(name):
    """With `separators`, as Gemma 3 needs, positions do not restart, except for padding."""
    rows, packer = make_rows(name, [(6, 0), (9, 1), (5, 0)]), make_packer(make_base(name), name)
    batch = packer.pack(rows, [[1, 0, 2]], padding={1})
    gap = [-1] if packer.separators else []
    second = [value + (7 if packer.separators else 0) for value in range(5)]
    assert batch["position_ids"].tolist() == [[*range(6), *gap, *second, *gap, *[-1] * 9]]
    assert (batch["labels"][0, -9:] == -100).all()
    assert (batch["labels"][0, 1:6] != -100).all()
    assert batch["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    ("uses_fsdp", "number", "blank_images", "expected"),
    [
        ("true", "2", None, True),
        ("True", "2", None, True),
        ("true", "1", None, False),
        ("true", None, None, False),
        ("false", "2", None, False),
        (None, "2", None, False),
        ("true", "2", False, False),
        (None, None, True, True),
    ],
)
def test_blank_images_are_the_default_of_fsdp(uses_fsdp, number, blank_images, expected, monkeypatch):
    for name, value in (("ACCELERATE_USE_FSDP", uses_fsdp), ("WORLD_SIZE", number)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    collator = VisionLanguageCollator(make_processor(), blank_images=blank_images)
    assert len(collator(TEXTS)["input_ids"]) == 3 + expected
    if blank_images is None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
        assert len(VisionLanguageCollator(tokenizer)(AS_TEXT)["input_ids"]) == 1
    pair = {"prompt": [], "chosen": TEXTS[0]["messages"], "rejected": TEXTS[1]["messages"]}
    assert len(PreferenceCollator(make_processor())([pair])["input_ids"]) == 2


def test_the_trainer_knows_which_models_need_blank_images(monkeypatch, tmp_path):
    """Models of our architecture run their vision encoder on a blank image themselves."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    collator = VisionLanguageCollator(make_processor())
    trainer = object.__new__(ResumableTrainer)
    trainer.args, trainer.is_fsdp_enabled = SimpleNamespace(world_size=2), True
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer.model_accepts_loss_kwargs, trainer.compute_loss_func = False, None
    for name, make in MODELS.items():
        trainer.model = make()
        for given, expected in ((None, name == "upcycled"), (False, name == "upcycled"), (True, True)):
            collator.blank_images = given
            assert trainer._collator_for_training(collator).adds_blank_images is expected
            assert collator.blank_images is given


def test_blank_images_need_a_processor():
    with pytest.raises(
        ValueError, match="`blank_images=True` needs a processor that reads images, but got a tokenizer"
    ):
        VisionLanguageCollator(make_tokenizer(), blank_images=True)
