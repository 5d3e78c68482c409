"""The retrieval model: embeddings, the outputs of a batch, and its configuration."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPModel

from modeling_sparse_moe_vlm import (
    SparseMoeVlmConfig,
    SparseMoeVlmForImageTextRetrieval,
    SparseMoeVlmRetrievalConfig,
)
from modeling_sparse_moe_vlm.contrastive import contrastive_loss
from modeling_sparse_moe_vlm.losses import router_losses
from modeling_sparse_moe_vlm.routing import RoutingRecord
from modeling_sparse_moe_vlm.toolbox.data import RetrievalCollator, retrieval_inputs
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from modeling_sparse_moe_vlm.toolbox.retrieval.conversion import image_prompt
from tests.support.models import IMAGE_TOKEN_ID, TEXT_CONFIG, make_inputs
from tests.support.processors import VOCAB_SIZE, make_image, make_processor, make_speaking_model, make_tokenizer
from tests.support.retrieval import make_pairs, make_retrieval_config, make_retrieval_model


def make_batch(number: int = 4, captions: int = 1):
    return RetrievalCollator(make_processor())(make_pairs(number, captions))


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_embeddings_are_pooled_hidden_states_of_length_1(pooling):
    model, inputs = make_retrieval_model(pooling=pooling), make_inputs()
    with torch.no_grad():
        hidden_states = model.model(**inputs).last_hidden_state
        features = model.get_text_features(**inputs)
        images = model.get_image_features(**inputs)
    pooled = hidden_states[:, -1] if pooling == "last_token" else hidden_states.mean(dim=1)
    expected = pooled / pooled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features.pooler_output, expected)
    torch.testing.assert_close(features.last_hidden_state, hidden_states)
    torch.testing.assert_close(images.pooler_output, expected)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_padding_on_either_side_and_the_order_of_rows_do_not_matter(pooling):
    model, processor = make_retrieval_model(pooling=pooling), make_processor()
    items = ["the cat", {"image": make_image(1), "text": "sat on the mat, again and again"}, make_image(2), "mat"]
    with torch.no_grad():
        alone = torch.cat([model(**retrieval_inputs(processor, [item])).embeddings for item in items])
        right = retrieval_inputs(processor, items)
        left = {name: values.clone() for name, values in right.items()}
        for row, length in enumerate(right["attention_mask"].sum(dim=1)):
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                left[name][row] = left[name][row].roll(-int(length))
        assert left["attention_mask"][0].tolist() != right["attention_mask"][0].tolist()
        for inputs in (right, left):
            torch.testing.assert_close(model(**inputs).embeddings, alone, atol=1e-5, rtol=1e-4)
        permuted = retrieval_inputs(processor, [items[i] for i in (2, 0, 3, 1)])
        torch.testing.assert_close(model(**permuted).embeddings, alone[[2, 0, 3, 1]], atol=1e-5, rtol=1e-4)
    assert torch.cdist(alone, alone).fill_diagonal_(1).min() > 0.01


def test_truncated_embeddings_are_scaled_again():
    model, inputs = make_retrieval_model(matryoshka_dims=[8]), make_inputs()
    with torch.no_grad():
        full = model(**inputs).embeddings
        for truncated in (
            model(**inputs, embedding_size=8).embeddings,
            model.get_text_features(**inputs, embedding_size=8).pooler_output,
            model.get_image_features(**inputs, embedding_size=8).pooler_output,
        ):
            torch.testing.assert_close(truncated, full[:, :8] / full[:, :8].norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="`embedding_size` must be an integer from 1 to 32, but got 33"):
        model(**inputs, embedding_size=33)


def test_features_are_called_as_in_clip():
    """The arguments of CLIP in this release have the same positions, and the output the same fields."""
    import inspect

    for name in ("get_text_features", "get_image_features"):
        of_clip = inspect.signature(getattr(CLIPModel, name)).parameters
        own = list(inspect.signature(getattr(SparseMoeVlmForImageTextRetrieval, name)).parameters)
        assert own[: len(of_clip) - 1] == list(of_clip)[:-1]
        assert own[-1] == list(of_clip)[-1] == "kwargs"
    model, inputs = make_retrieval_model(), make_inputs(images_per_row=0)
    with torch.no_grad():
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
    assert isinstance(features, tuple)
    assert [tuple(value.shape) for value in features] == [(2, 14, 32), (2, 32)]
    with pytest.raises(ValueError, match="`interpolate_pos_encoding=True` is not supported"):
        model.get_image_features(make_inputs()["pixel_values"], True)


def test_a_call_as_of_clip_equals_the_call_with_all_rows():
    processor, rows = make_processor(), make_pairs(3)
    prompt = retrieval_inputs(processor, [make_image()])["input_ids"][0].tolist()
    model = make_retrieval_model(image_prompt_ids=prompt)
    batch = RetrievalCollator(processor)(rows)
    texts = retrieval_inputs(processor, [row["captions"][0] for row in rows])
    with torch.no_grad():
        expected = model(**batch)
        outputs = model(texts["input_ids"], batch["pixel_values"], texts["attention_mask"], return_loss=True)
        images = model(pixel_values=batch["pixel_values"])
        assert model(texts["input_ids"], batch["pixel_values"], texts["attention_mask"]).loss is None
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(images.embeddings, expected.image_embeds, atol=1e-5, rtol=1e-4)
    assert images.logits_per_image is None
    with pytest.raises(ValueError, match="3 texts, but 2 images"):
        model(texts["input_ids"], batch["pixel_values"][:2], return_loss=True)
    with pytest.raises(ValueError, match="`position_ids` cannot be combined"):
        model(texts["input_ids"], batch["pixel_values"], position_ids=torch.arange(4)[None])


def test_arguments_of_a_call_as_of_clip():
    processor = make_processor()
    model = make_retrieval_model()  # the prompt of an image has 4 tokens
    pixels = torch.stack([torch.randn(3, 16, 16) for _ in range(2)])
    for words in (["a", "b"], ["the cat sat on the mat", "a cat"]):  # shorter and longer than an image
        texts = retrieval_inputs(processor, words)
        ids = [texts["input_ids"][:, :2], texts["attention_mask"][:, :2]] if words[0] == "a" else None
        ids, mask = ids or (texts["input_ids"], texts["attention_mask"])
        with torch.no_grad():
            expected = torch.cat(
                [
                    model.get_text_features(ids, mask).pooler_output,
                    model.get_image_features(pixels).pooler_output,
                ]
            )
            types = torch.zeros_like(ids)
            outputs = model(ids, pixels, mask, mm_token_type_ids=types, labels=torch.tensor([5, 6, 6, 5]))
            is_document = torch.tensor([True, False, False, True])
            chosen = model(ids, pixels, mask, is_document=is_document)
            unmasked = model(ids[1:], pixels).embeddings
        torch.testing.assert_close(outputs.embeddings, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(chosen.image_embeds, expected[is_document], atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            loss = contrastive_loss(
                outputs.embeddings,
                torch.tensor([5, 6, 6, 5]),
                torch.tensor([False, False, True, True]),
                loss="softmax",
                scale=torch.tensor([1 / 0.07]),
                bias=None,
                sizes=[32],
            )
            torch.testing.assert_close(outputs.loss, loss)
            text = model.get_text_features(ids[1:]).pooler_output
        torch.testing.assert_close(unmasked[:1], text, atol=1e-5, rtol=1e-4)


def test_other_inputs_and_outputs_of_the_model():
    model, inputs = make_retrieval_model(image_prompt_ids=[]), make_inputs(images_per_row=0)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    positions = 3 * torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    with torch.no_grad():
        expected = model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        assert expected.hidden_states is None
        moved = model.model(**inputs, position_ids=positions).last_hidden_state
        outputs = model(**inputs, position_ids=positions, output_hidden_states=True)
        torch.testing.assert_close(outputs.last_hidden_state, moved)
        assert (moved - expected.last_hidden_state).abs().max() > 1e-3
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        features = model.get_text_features(**inputs, position_ids=positions, use_cache=True, return_loss=False)
        torch.testing.assert_close(features.last_hidden_state, moved)
        for given in (
            inputs | {"pixel_values": torch.zeros(0, 3, 16, 16)},
            {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]},
        ):
            torch.testing.assert_close(model(**given).embeddings, expected.embeddings)
        received = []
        hook = model.model.register_forward_pre_hook(lambda *args: received.append(args[-1]), with_kwargs=True)
        types = torch.ones_like(inputs["input_ids"])
        model(**inputs, mm_token_type_ids=types)
        hook.remove()
        assert received[0]["mm_token_type_ids"] is types
        record = RoutingRecord()
        model(**inputs, routing_record=record, output_router_logits=True)
        assert record.outputs()["router_logits"]
        labels = torch.tensor([-2, -2])
        assert model(**inputs, labels=labels, return_loss=False).loss is None
    assert not model.accepts_loss_kwargs


def test_rows_with_videos_are_documents():
    model = make_retrieval_model({"modalities": ["text", "image", "video"]}, video_token_id=1)
    ids = torch.tensor([[1, 5], [5, 5], [5, IMAGE_TOKEN_ID]])
    assert model._has_images(ids).tolist() == [True, False, True]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_outputs_of_a_batch(loss):
    model = make_retrieval_model({"output_router_logits": True}, contrastive_loss=loss, matryoshka_dims=[8, 16])
    batch = make_batch(3, captions=2)
    with torch.no_grad():
        outputs = model(**batch)
    unit = outputs.embeddings
    assert torch.equal(outputs.text_embeds, unit[:6])
    assert torch.equal(outputs.image_embeds, unit[6:])
    scale, bias = (1 / 0.07, 0.0) if loss == "softmax" else (10.0, -10.0)
    torch.testing.assert_close(outputs.logits_per_text, scale * unit[:6] @ unit[6:].T + bias, atol=1e-4, rtol=1e-5)
    assert torch.equal(outputs.logits_per_image, outputs.logits_per_text.T)
    contrastive = contrastive_loss(
        unit,
        batch["labels"],
        batch["is_document"],
        loss=loss,
        scale=torch.tensor([scale]),
        bias=None if loss == "softmax" else torch.tensor([bias]),
        sizes=[8, 16, 32],
    )
    losses = router_losses(
        model.config.text_config,
        outputs.router_logits,
        batch["mm_token_type_ids"],
        batch["attention_mask"],
        router_indices=outputs.router_indices,
    )
    total = losses.total(model.config.text_config)
    assert total > 0
    torch.testing.assert_close(outputs.router_loss, total)
    torch.testing.assert_close(outputs.aux_loss, losses.aux_loss)
    torch.testing.assert_close(outputs.loss, contrastive + total)


def test_router_losses_are_computed_for_training_and_on_request():
    model, batch = make_retrieval_model({"output_router_logits": True}), make_batch()
    inputs = {name: values for name, values in batch.items() if name not in ("labels", "is_document")}
    assert model(**inputs).router_loss is None
    assert model(**inputs, output_router_logits=True).router_loss > 0
    assert model.train()(**inputs).router_loss > 0
    plain = make_retrieval_model()
    assert plain(**batch).router_logits is None
    with_losses = plain(**batch, output_router_logits=True)
    torch.testing.assert_close(with_losses.loss, plain(**batch).loss + with_losses.router_loss)


def test_mistakes_in_a_batch():
    model, batch = make_retrieval_model(), make_batch()
    with pytest.raises(ValueError, match="pass `input_ids`, `pixel_values`, or both"):
        model()
    with pytest.raises(ValueError, match=r"`labels` must have one value for each of the 8 rows.*\(7,\)"):
        model(**batch | {"labels": batch["labels"][:7]})
    with pytest.raises(ValueError, match=r"`is_document` must have one value"):
        model(**batch | {"is_document": batch["is_document"][:7]})
    without = {name: values for name, values in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match="`return_loss=True` needs `labels`"):
        model(**without, return_loss=True)
    model.__dict__["_tp_size"] = 2
    with pytest.raises(ValueError, match="does not support tensor parallelism"):
        model(**batch)


def test_rows_with_images_are_documents_by_default():
    model, batch = make_retrieval_model(), make_batch()
    is_document = batch.pop("is_document")
    assert is_document.tolist() == [False] * 4 + [True] * 4
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**batch, is_document=is_document).loss)
        swapped = model(**batch, is_document=~is_document)
    torch.testing.assert_close(swapped.logits_per_image, model(**batch).logits_per_text)


def test_every_parameter_gets_a_gradient_also_with_checkpointing():
    batch = make_batch()
    grads = []
    for checkpointed in (False, True):
        model = make_retrieval_model({"output_router_logits": True}, contrastive_loss="sigmoid").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        assert model.logit_scale.grad.abs() > 0
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1])


def test_the_scale_is_at_most_100():
    model, batch = make_retrieval_model(), make_batch()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
        outputs = model(**batch)
    scores = 100 * outputs.text_embeds @ outputs.image_embeds.T
    torch.testing.assert_close(outputs.logits_per_text, scores, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("tiles", [{"max_tiles": 4}, {"min_tiles": 4, "max_tiles": 4}])
def test_images_of_several_tiles_need_their_prompts(tiles):
    """The model cannot know which tiles belong to one image."""
    processor = make_processor(**tiles)
    model = to_retrieval(make_speaking_model(), processor)
    assert model.config.image_prompt_ids == []
    assert (image_prompt(processor) is None) == ("min_tiles" not in tiles)
    inputs = retrieval_inputs(processor, [make_image(0, 20, 40), make_image(1)])
    assert len(inputs["pixel_values"]) > 2
    with torch.no_grad():
        assert model(**inputs).embeddings.shape[0] == 2
        with pytest.raises(ValueError, match="depends on its size, so `pixel_values` are not enough: pass all inputs"):
            model(pixel_values=inputs["pixel_values"])


def test_a_trained_model_becomes_a_retrieval_model(tmp_path):
    processor = make_processor()
    source = make_speaking_model(output_router_logits=True)
    weights = {name: value.clone() for name, value in source.model.state_dict().items()}
    model = to_retrieval(source, processor, contrastive_loss="sigmoid", pooling="mean")
    assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())
    assert not model.training
    assert model.model is source.model
    assert model.config.text_config is source.config.text_config
    assert source.config.text_config._attn_implementation == "sdpa"
    assert source.config.text_config._experts_implementation == "grouped_mm"
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10
    batch = RetrievalCollator(processor)(make_pairs(2))
    assert model.config.image_prompt_ids == batch["input_ids"][2][batch["attention_mask"][2] == 1].tolist()
    source.save_pretrained(tmp_path)
    loaded, report = SparseMoeVlmForImageTextRetrieval.from_pretrained(
        tmp_path, contrastive_loss="sigmoid", pooling="mean", output_loading_info=True
    )
    assert not report["unexpected_keys"]  # the language head is left out
    assert set(report["missing_keys"]) == {"logit_scale", "logit_bias"}
    assert loaded.config.model_type == "sparse_moe_vlm_retrieval"
    assert loaded.logit_scale.item() == pytest.approx(math.log(10))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
    with pytest.raises(ValueError, match="`pooling` must be one of"):
        SparseMoeVlmForImageTextRetrieval.from_pretrained(tmp_path, pooling="max")
    with pytest.raises(ValueError, match="needs a model of type 'sparse_moe_vlm' or"):
        to_retrieval(model, processor)
    half = to_retrieval(source.to(torch.bfloat16), processor, contrastive_loss="sigmoid")
    assert (half.logit_scale.dtype, half.logit_bias.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_tokenizer_leaves_the_prompt_of_images_as_in_the_configuration():
    source = make_speaking_model()
    model = to_retrieval(source, make_tokenizer())
    assert model.config.image_prompt_ids == [source.config.image_token_id] * source.config.image_seq_length


def test_save_and_load(tmp_path):
    model, batch = make_retrieval_model(contrastive_loss="sigmoid", matryoshka_dims=[4]), make_batch()
    with torch.no_grad():
        model.logit_bias.fill_(-3.0)
        expected = model(**batch)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is SparseMoeVlmForImageTextRetrieval
        torch.testing.assert_close(loaded(**batch).loss, expected.loss)
    model.save_pretrained(tmp_path / "other", is_main_process=False)  # the main process writes the files
    assert not any(path.is_file() for path in (tmp_path / "other").iterdir())
    assert (tmp_path / "modules.json").is_file()
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SparseMoeVlmRetrievalConfig
    assert config.matryoshka_dims == [4]
    assert config.trained_sizes == [4, 32]
    assert config.auto_map["AutoModel"] == "modeling_retrieval.SparseMoeVlmForImageTextRetrieval"
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    embeddings = half(**batch | {"pixel_values": batch["pixel_values"].bfloat16()}).embeddings
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(8))


def test_fields_of_the_head_are_checked():
    assert make_retrieval_config().initial_logit_scale == pytest.approx(math.log(1 / 0.07))
    assert make_retrieval_config(logit_scale_init_value=1.5).initial_logit_scale == 1.5
    assert make_retrieval_config().image_prompt_ids == [IMAGE_TOKEN_ID] * 4
    assert SparseMoeVlmRetrievalConfig().trained_sizes == [2048]
    assert make_retrieval_config(matryoshka_dims=[32, 8]).trained_sizes == [8, 32]
    for field, value, message in (
        ("pooling", "max", "`pooling` must be one of last_token, mean"),
        ("contrastive_loss", "triplet", "`contrastive_loss` must be one of softmax, sigmoid"),
        ("matryoshka_dims", [33], "`matryoshka_dims` must be an integer from 1 to 32, got 33"),
        ("matryoshka_dims", [0], "`matryoshka_dims` must be an integer from 1 to 32, got 0"),
        ("matryoshka_dims", [8, 8], "`matryoshka_dims` repeats"),
        ("logit_scale_init_value", 5.0, "`logit_scale_init_value` must be a number from 0 to 4.6"),
        ("logit_bias_init_value", math.nan, "`logit_bias_init_value` must be a number"),
        ("image_prompt_ids", [3, 3, 3], "`image_prompt_ids` has 3 placeholders .id 3., but an image has 4 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make_retrieval_config(**{field: value})


def test_configurations_without_the_head_are_not_changed():
    config = SparseMoeVlmConfig(text_config=TEXT_CONFIG | {"vocab_size": VOCAB_SIZE})
    assert "pooling" not in config.to_dict()
    assert config.auto_map["AutoModel"] == "modeling_sparse_moe_vlm.SparseMoeVlmModel"
