"""MTEB evaluates a retrieval model through sentence-transformers, offline, on tasks whose data is in memory."""

import json

import pytest
from datasets import Dataset

from modeling_sparse_moe_vlm.toolbox.evaluation import evaluate_retrieval
from modeling_sparse_moe_vlm.toolbox.retrieval import to_retrieval
from tests.support.processors import make_processor
from tests.support.retrieval import make_pairs, make_retrieval_model
from tests.support.upcycled import make_speaking

NUMBER = 12


@pytest.fixture(scope="module")
def tasks():
    """Tasks with texts only and with images, each with one right document per query."""
    pytest.importorskip("mteb")
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    pairs = make_pairs(NUMBER)
    texts = {"text": [pair["captions"][0] for pair in pairs]}
    images = {"image": [pair["image"] for pair in pairs]}

    def make(category, queries, documents):
        class Pairs(AbsTaskRetrieval):
            metadata = TaskMetadata(
                name=f"Pairs-{category}",
                description="Images with captions",
                dataset={"path": "none", "revision": "1"},
                type="Any2AnyRetrieval",
                category=category,
                modalities=["image", "text"],
                eval_splits=["test"],
                eval_langs=["eng-Latn"],
                main_score="recall_at_1",
            )

            def load_data(self, num_proc=None, **kwargs):
                data = RetrievalSplitData(
                    queries=Dataset.from_dict({"id": [f"q{i}" for i in range(NUMBER)], **queries}),
                    corpus=Dataset.from_dict({"id": [f"d{i}" for i in range(NUMBER)], **documents}),
                    relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(NUMBER)},
                    top_ranked=None,
                )
                self.dataset = {"default": {"test": data}}
                self.data_loaded = True

        return Pairs()

    return {
        "text": make("t2t", texts, texts),
        "mixed": [make("t2i", texts, images), make("i2t", images, texts), make("it2t", images | texts, texts)],
    }


@pytest.mark.parametrize("kind", ["ours", "upcycled"])
def test_recall_is_that_of_the_package(kind, tasks, tmp_path):
    import mteb
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    processor = make_processor()
    model = make_retrieval_model() if kind == "ours" else to_retrieval(make_speaking().eval(), processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    # The input of MTEB is a model of sentence-transformers. It evaluates a local one on texts only.
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    (result,) = mteb.evaluate(encoder, tasks["text"], cache=None, show_progress_bar=False).task_results
    assert result.scores["test"][0]["recall_at_1"] == 1  # every text finds itself

    # For images, its modalities must be named. Those of a model on the Hub are read from this file.
    encoder = SentenceTransformerEncoderWrapper(str(tmp_path), device="cpu", trust_remote_code=True)
    settings = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert encoder.mteb_model_meta._detect_modalities_from_sbert_config(settings) == ["image", "text"]
    encoder.mteb_model_meta.modalities = ["image", "text"]
    results = mteb.evaluate(encoder, tasks["mixed"], cache=None, show_progress_bar=False)
    to_image, to_text, both = (result.scores["test"][0] for result in results.task_results)
    expected = evaluate_retrieval(model, processor, make_pairs(NUMBER))
    for k in (1, 5, 10):
        assert to_image[f"recall_at_{k}"] == pytest.approx(expected[f"text_to_image/recall@{k}"] / 100, abs=1e-5)
        assert to_text[f"recall_at_{k}"] == pytest.approx(expected[f"image_to_text/recall@{k}"] / 100, abs=1e-5)
    assert 0 < expected["text_to_image/recall@5"] < 100
    assert both["recall_at_5"] != to_text["recall_at_5"]  # the query also has the caption
