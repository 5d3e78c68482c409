"""Retrieval models in trainers, in several processes, with adapters, and without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parameters_to_vector
from transformers import Trainer, TrainingArguments

from modeling_sparse_moe_vlm.toolbox.data import RetrievalCollator
from modeling_sparse_moe_vlm.toolbox.evaluation import embed
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from modeling_sparse_moe_vlm.toolbox.training import SparseMoeTrainer
from tests.support.models import QUIET_TRAINING
from tests.support.processes import run_in_processes
from tests.support.processors import make_image, make_processor, make_tokenizer, user
from tests.support.retrieval import make_pairs, make_retrieval_model
from tests.support.upcycled import make_dense_inputs, make_few_experts

pytestmark = pytest.mark.newest


def make_uneven_rows() -> list[dict]:
    """Returns rows with several captions, hard negatives, and an image that both processes have."""
    rows = make_pairs(3, captions=2) + make_pairs(5)[3:]
    rows[0]["image_id"] = rows[4]["image_id"] = "same"
    rows[1]["negatives"] = ["a wrong caption", make_image(9)]
    return rows


@pytest.mark.extensive
def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    program = """
        import sys
        import torch
        from torch.nn.parallel import DistributedDataParallel
        from modeling_sparse_moe_vlm.toolbox.data import RetrievalCollator
        from tests.integration.test_retrieval import make_uneven_rows
        from tests.support.processors import make_processor
        from tests.support.retrieval import make_retrieval_model

        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        rows = make_uneven_rows()
        batch = RetrievalCollator(make_processor())(rows[:3] if rank == 0 else rows[3:])
        results = {}
        for loss in ("softmax", "sigmoid"):
            model = make_retrieval_model(contrastive_loss=loss, matryoshka_dims=[8]).train()
            parallel = DistributedDataParallel(model)
            outputs = parallel(**batch)
            outputs.loss.backward()
            grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            results[loss] = (outputs.loss.detach(), grads, outputs.logits_per_text.shape)
        torch.save(results, f"{sys.argv[1]}/{rank}.pt")
        """
    result = run_in_processes(program, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    batch = RetrievalCollator(make_processor())(make_uneven_rows())
    for loss in ("softmax", "sigmoid"):
        model = make_retrieval_model(contrastive_loss=loss, matryoshka_dims=[8]).train()
        expected = model(**batch).loss
        expected.backward()
        grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for rank, shape in ((0, (7, 4)), (1, (2, 2))):
            of_process = torch.load(tmp_path / f"{rank}.pt")[loss]
            torch.testing.assert_close(of_process[0], expected.detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(of_process[1], grads, atol=2e-4 * grads.abs().max().item(), rtol=1e-3)
            assert of_process[2] == shape
        separate = RetrievalCollator(make_processor())(make_uneven_rows()[:3])
        assert (model(**separate).loss - expected).abs() > 1e-3


def make_trainer(folder, model, trainer_class=Trainer, **arguments):
    settings = QUIET_TRAINING | {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 1}
    return trainer_class(
        model=model,
        args=TrainingArguments(output_dir=str(folder), logging_steps=1, save_strategy="no", **settings | arguments),
        train_dataset=make_pairs(4),
        eval_dataset=make_pairs(4),
        data_collator=RetrievalCollator(make_processor()),
        processing_class=make_processor(),
    )


def test_micro_batches_count_equally_and_the_evaluation_has_a_loss(tmp_path):
    """The loss of a step is the mean over its micro-batches, each with its own negatives."""
    model = make_retrieval_model()
    trainer = make_trainer(tmp_path, model, optim="sgd", learning_rate=1.0, gradient_accumulation_steps=2)
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(trainer.train_dataset)
    collate = RetrievalCollator(make_processor())
    rows = make_pairs(4)
    model.train()
    loss = (model(**collate(rows[:2])).loss + model(**collate(rows[2:])).loss) / 2
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    before = parameters_to_vector(model.parameters()).detach().clone()
    norm = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert (parameters_to_vector(model.parameters()) - before).norm() > 0.1
    with torch.no_grad():
        expected = model.eval()(**collate(rows)).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_training_with_experts_that_are_balanced(tmp_path):
    model = make_retrieval_model({"output_router_logits": True, "router_bias_update_rate": 0.1})
    trainer = make_trainer(
        tmp_path, model, SparseMoeTrainer, max_steps=20, learning_rate=2e-3, per_device_train_batch_size=4
    )
    trainer.train()
    with torch.no_grad():
        outputs = model.eval()(**RetrievalCollator(make_processor())(make_pairs(4)))
    assert outputs.loss - outputs.router_loss < 0.5  # log(4) for embeddings that tell nothing
    assert {"aux_loss", "aux_loss_image", "z_loss"} <= trainer.state.log_history[0].keys()
    assert any(name.startswith("routing/") for name in trainer.state.log_history[0])
    biases = [value for name, value in model.state_dict().items() if "e_score_correction_bias" in name]
    assert biases
    assert all(bias.abs().max() > 0 for bias in biases)


def test_adapters(tmp_path):
    model = get_peft_model(make_retrieval_model(), LoraConfig(target_modules=r".*language_model.*q_proj"))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer = make_trainer(tmp_path, model, learning_rate=0.1, max_steps=2, gradient_checkpointing=True)
    trainer.train()
    assert before
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
    assert trainer.evaluate()["eval_loss"] > 0


WITHOUT_THE_PACKAGE = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

root, *names = sys.argv[1:]
for name in names:
    batch, expected = torch.load(f"{root}/{name}.pt")
    for folder in (f"{root}/{name}", f"{root}/{name}-again"):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            outputs = model(**batch)
        torch.testing.assert_close(outputs.embeddings, expected["embeddings"])
        torch.testing.assert_close(outputs.loss, expected["loss"])
        if folder == f"{root}/{name}":
            model.save_pretrained(f"{root}/{name}-again")
    try:
        AutoModel.from_pretrained(f"{root}/{name}")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("a load without the code")
assert "modeling_sparse_moe_vlm" not in sys.modules
"""


def test_checkpoints_contain_all_code_that_they_need(tmp_path):
    collate = RetrievalCollator(make_processor())
    models = {"own": (make_retrieval_model({"output_router_logits": True}), collate(make_pairs()))}
    batch = make_dense_inputs("qwen3_vl") | {"labels": torch.tensor([7, 7]), "is_document": torch.tensor([False, True])}
    models["upcycled"] = (to_retrieval(make_few_experts("qwen3_vl"), make_tokenizer()), batch)
    for name, (model, batch) in models.items():
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            outputs = model(**batch)
        expected = {"embeddings": outputs.embeddings, "loss": outputs.loss}
        torch.save((dict(batch), expected), tmp_path / f"{name}.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(tmp_path), *models]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    for name in models:
        files = [{path.name for path in (tmp_path / folder).iterdir()} for folder in (name, f"{name}-again")]
        assert files[0] == files[1]


def test_sentence_transformers_gives_the_same_embeddings(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, processor = make_retrieval_model(matryoshka_dims=[8]), make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert encoder.get_embedding_dimension() == 32
    items = [
        "the cat",
        make_image(1),
        {"image": make_image(2), "text": "a mat"},
        {"text": "mat", "image": make_image(3)},
    ]
    for batch in (items, items[:1], items[1:2], items[2:3], items[3:], [[user("the cat", make_image(4))]]):
        encoded = encoder.encode(batch, convert_to_tensor=True)
        torch.testing.assert_close(encoded, embed(model, processor, batch), atol=2e-6, rtol=1e-4)
    texts = encoder.encode(["the cat", "<image>"], convert_to_tensor=True)  # a typed image token is a text
    torch.testing.assert_close(texts, embed(model, processor, ["the cat", "<image>"]), atol=2e-6, rtol=1e-4)
    truncated = encoder.encode(items, truncate_dim=8, normalize_embeddings=True, convert_to_tensor=True)
    expected = embed(model, processor, items, embedding_size=8)
    torch.testing.assert_close(truncated, expected, atol=3e-6, rtol=1e-4)
    torch.testing.assert_close(encoder.similarity(truncated, truncated), expected @ expected.T, atol=1e-5, rtol=1e-4)
    encoder.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert torch.equal(again.encode(items, convert_to_tensor=True), encoder.encode(items, convert_to_tensor=True))


def test_files_of_sentence_transformers_that_a_user_has_changed_are_kept(tmp_path):
    model = make_retrieval_model()
    model.save_pretrained(tmp_path)
    settings = tmp_path / "config_sentence_transformers.json"
    assert json.loads(settings.read_text())["similarity_fn_name"] == "cosine"
    settings.write_text('{"prompts": {"query": "Find: "}}')
    model.save_pretrained(tmp_path)
    assert json.loads(settings.read_text()) == {"prompts": {"query": "Find: "}}
    assert (tmp_path / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "modules.json").exists()
