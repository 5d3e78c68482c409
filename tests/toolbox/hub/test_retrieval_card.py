"""Model cards of retrieval models."""

import re

from modeling_sparse_moe_vlm.toolbox.hub import write_model_card
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from tests.support.processors import make_processor, make_tokenizer
from tests.support.retrieval import make_retrieval_model
from tests.support.upcycled import make_few_experts

HEAD = "it embeds texts, images, and texts with images."


def test_card_of_our_architecture(tmp_path):
    model = make_retrieval_model()
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert card.data.tags == ["moe", "vision-language", "custom_code", "image-text-retrieval", "sentence-transformers"]
    assert card.data.pipeline_tag is None
    assert "a head for image-text retrieval (`sparse_moe_vlm_retrieval`): " + HEAD in str(card)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [parameter for name, parameter in model.named_parameters() if ".mlp.experts." in name]
    unused = sum(parameter.numel() for parameter in experts) // 2  # 2 of 4 experts per token
    active = total - unused - sum(p.numel() for name, p in model.named_parameters() if ".shared_experts.text." in name)
    assert f"| parameters | {total:,} |" in str(card)
    assert f"| active per image token | {active:,} |" in str(card)
    assert f"| weights in float32 | {4 * total / 1000:.1f} kB |" in str(card)
    assert (model.config.num_parameters(), model.config.num_active_parameters("image")) == (total, active)
    assert f'AutoModel.from_pretrained("{tmp_path.name}", trust_remote_code=True)' in str(card)
    assert f'AutoProcessor.from_pretrained("{tmp_path.name}", trust_remote_code=True)' in str(card)


def test_card_of_an_upcycled_model(tmp_path):
    model = to_retrieval(make_few_experts("qwen3_vl"), make_tokenizer())
    model.save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert card.data.tags == ["moe", "upcycled", "custom_code", "image-text-retrieval", "sentence-transformers"]
    assert "by upcycling" in str(card)
    assert HEAD in str(card)
    total = sum(parameter.numel() for parameter in model.parameters())
    (row,) = re.findall(r"^\| parameters \| .* \| (.*) \|$", str(card), re.MULTILINE)
    assert row == f"{total / 1000:.1f} k"
    assert f'AutoModel.from_pretrained("{tmp_path.name}", trust_remote_code=True)' in str(card)
