"""Upcycled models with a head for retrieval."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaProcessor

from modeling_sparse_moe_vlm import configuration_upcycled_retrieval, modeling_upcycled_retrieval
from modeling_sparse_moe_vlm.configuration_upcycled_retrieval import retrieval_config_class
from modeling_sparse_moe_vlm.modeling_upcycled_classification import (
    UpcycledClassificationMixin,
    classification_model_class,
)
from modeling_sparse_moe_vlm.modeling_upcycled_retrieval import UpcycledRetrievalMixin, retrieval_model_class
from modeling_sparse_moe_vlm.toolbox.data import RetrievalCollator, retrieval_inputs
from modeling_sparse_moe_vlm.toolbox.evaluation import embed
from modeling_sparse_moe_vlm.toolbox.installed_code import use_installed_code
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from tests.support.processors import make_image, make_image_processor, make_processor, make_tokenizer
from tests.support.retrieval import make_pairs
from tests.support.upcycled import KINDS, make_dense, make_dense_inputs, make_few_experts, make_speaking


def make_llava_processor() -> LlavaProcessor:
    return LlavaProcessor(
        make_image_processor(),
        make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=make_processor().chat_template,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_upcycled_model(kind, tmp_path):
    source, inputs = make_few_experts(kind), make_dense_inputs(kind)
    implementation = source.config.experts_config._experts_implementation_internal
    model = to_retrieval(source, make_tokenizer())
    assert model.model is source.base_model
    assert not model.training
    assert model.config.experts_config is source.config.experts_config
    assert model.config.experts_config._experts_implementation_internal == implementation is not None
    assert model.config._attn_implementation == source.config._attn_implementation is not None
    with torch.no_grad():
        last = source.base_model(**inputs).last_hidden_state[:, -1]
        embeddings = model(**inputs).embeddings
        torch.testing.assert_close(embeddings, last / last.norm(dim=1, keepdim=True))
        torch.testing.assert_close(
            model.get_text_features(**inputs, embedding_size=4).pooler_output.norm(dim=1), torch.ones(2)
        )
        model.save_pretrained(tmp_path)
        use_installed_code(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert type(loaded.config) is type(model.config) is type(AutoConfig.from_pretrained(tmp_path))
        torch.testing.assert_close(loaded(**inputs).embeddings, embeddings)
        loaded.save_pretrained(tmp_path / "again")
        for name, value in AutoModel.from_pretrained(tmp_path / "again").state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name])
    config = pickle.loads(pickle.dumps(model.config))
    assert config.auto_map == model.config.auto_map
    assert config.auto_map["AutoModel"] == f"modeling_upcycled_retrieval.{type(model).__name__}"
    assert type(model).__name__.endswith("ForImageTextRetrieval")


def test_gradients_and_router_losses():
    model, inputs = (
        to_retrieval(make_few_experts("qwen3_vl"), make_tokenizer(), contrastive_loss="sigmoid"),
        make_dense_inputs("qwen3_vl"),
    )
    labels, is_document = torch.tensor([5, 5]), torch.tensor([False, True])
    outputs = model.train()(**inputs, labels=labels, is_document=is_document, output_router_logits=True)
    without = model(**inputs, labels=labels, is_document=is_document)
    torch.testing.assert_close(outputs.loss, without.loss + outputs.router_loss)
    assert outputs.router_loss > 0
    assert len(outputs.router_logits) == 2
    outputs.loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_a_llava_is_trained_on_pairs_and_embeds_images_without_prompts():
    processor = make_llava_processor()
    model = to_retrieval(make_speaking(), processor)
    batch = RetrievalCollator(processor)(make_pairs(3))
    prompt = retrieval_inputs(processor, [make_image()])["input_ids"][0].tolist()
    assert model.config.image_prompt_ids == prompt
    with torch.no_grad():
        outputs = model(**batch)
        images = model.get_image_features(batch["pixel_values"]).pooler_output
    assert outputs.logits_per_image.shape == (3, 3)
    assert outputs.loss > 0
    torch.testing.assert_close(images, outputs.image_embeds, atol=1e-5, rtol=1e-4)
    assert batch["is_document"].tolist() == model._has_images(batch["input_ids"]).tolist()
    without_prompt = to_retrieval(make_few_experts("qwen3_vl"), make_tokenizer())
    with pytest.raises(ValueError, match="the number of tokens of an image depends on its size"):
        without_prompt.get_image_features(torch.randn(16, 48))


def test_classes_that_do_not_exist():
    for module in (configuration_upcycled_retrieval, modeling_upcycled_retrieval):
        for name in ("UpcycledNothingRetrievalConfig", "UpcycledNothingForImageTextRetrieval", "nothing"):
            with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
                getattr(module, name)
    dense = make_few_experts("llama")
    retrieval = to_retrieval(dense, make_tokenizer())
    with pytest.raises(ValueError, match="needs a model of type 'sparse_moe_vlm' or an upcycled model"):
        to_retrieval(retrieval, make_tokenizer())
    with pytest.raises(ValueError, match=r"but got one of type 'llama'\. Upcycle dense models with `upcycle` first"):
        to_retrieval(make_dense("llama"), make_tokenizer())
    with pytest.raises(ValueError, match="needs a model of Transformers"):
        to_retrieval(torch.nn.Linear(1, 1), make_tokenizer())


def test_all_placeholders_make_a_row_a_document():
    model = to_retrieval(make_few_experts("llama", modalities=["text", "image"]), make_tokenizer())
    model.config.experts_config.placeholder_ids = {"image": [98, 97]}
    input_ids = torch.tensor([[5, 97], [98, 5], [5, 6]])
    assert model._has_images(input_ids).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("emu3", "Emu3ForConditionalGeneration"),  # also has Emu3ForCausalLM
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
        ("llama", "LlamaForCausalLM"),
        ("siglip", "SiglipModel"),
    ],
)
@pytest.mark.parametrize("mixin", [UpcycledRetrievalMixin, UpcycledClassificationMixin])
def test_the_class_with_the_names_of_the_base_model(mixin, model_type, expected):
    model = SimpleNamespace(config=SimpleNamespace(base_model_type=model_type))
    assert mixin.dense_class(model).__name__ == expected


@pytest.mark.parametrize("make_class", [retrieval_model_class, classification_model_class])
def test_the_experts_implementation_is_kept(make_class, monkeypatch):
    """The module without experts, which Transformers creates first, would refuse an implementation."""
    config = make_few_experts("llama").config
    if make_class is retrieval_model_class:
        config = retrieval_config_class(LlamaConfig)(**config.to_dict())
    model_class, seen = make_class(LlamaConfig), []
    get = model_class.get_correct_experts_implementation

    def record(model, requested):
        seen.append(("experts_config" in model.__dict__, requested))
        return get(model, requested)

    monkeypatch.setattr(model_class, "get_correct_experts_implementation", record)
    config._experts_implementation = "batched_mm"
    model = model_class(config)
    assert seen[0] == (False, None)
    assert config._experts_implementation == model.model.config._experts_implementation == "batched_mm"


@pytest.mark.newest
def test_sentence_transformers_gives_the_same_embeddings(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    processor = make_llava_processor()
    model = to_retrieval(make_speaking(), processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    items = ["the cat", make_image(1), {"image": make_image(2), "text": "a mat"}]
    encoded = encoder.encode(items, convert_to_tensor=True)
    torch.testing.assert_close(encoded, embed(model, processor, items), atol=2e-6, rtol=1e-4)
