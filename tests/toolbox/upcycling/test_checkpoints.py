"""From a dense checkpoint to a sparse one: the files in the folder, and errors, after which nothing is left."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MixtralForCausalLM,
)

from modeling_sparse_moe_vlm.toolbox.upcycling import checkpoints, streaming
from modeling_sparse_moe_vlm.toolbox.upcycling.checkpoints import plan_checkpoint, upcycle_checkpoint
from modeling_sparse_moe_vlm.toolbox.upcycling.costs import costs_of
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from modeling_sparse_moe_vlm.toolbox.upcycling.upcycle import upcycle
from tests.support.in_tree_models import make_inputs, make_llava
from tests.support.models import TINY_DECODER
from tests.support.processors import VOCAB_SIZE, assistant, make_image, make_tokenizer, user
from tests.toolbox.upcycling.test_processors import make_llava_processor


@pytest.fixture
def dense(tmp_path):
    """Returns the folder of a small LLaVA with its processor."""
    torch.manual_seed(0)
    text_config = LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE, "head_dim": 8})
    model = make_llava(text_config)
    model.generation_config = GenerationConfig(eos_token_id=2, max_new_tokens=3, do_sample=True, top_k=7)
    model.save_pretrained(tmp_path / "dense")
    make_llava_processor().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def dense_llama(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY_DECODER | {"vocab_size": VOCAB_SIZE})).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@torch.no_grad()
def test_a_folder_that_loads(dense, tmp_path):
    made = upcycle_checkpoint(dense, tmp_path / "sparse", expert_groups="isolated", num_experts=4)
    expected = upcycle(LlavaForConditionalGeneration.from_pretrained(dense), "isolated", 4)
    expected.save_pretrained(tmp_path / "expected")
    weights = [folder / "model.safetensors" for folder in (tmp_path / "sparse", tmp_path / "expected")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    of_processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names_in(tmp_path / "sparse") == names_in(tmp_path / "expected") | of_processor | {"README.md"}
    assert names_in(tmp_path) == {"dense", "sparse", "expected"}

    sparse = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse", trust_remote_code=True).eval()
    assert type(sparse).__name__ == "UpcycledLlavaForConditionalGeneration" == made.model_class
    model = LlavaForConditionalGeneration.from_pretrained(dense).eval()
    inputs = make_inputs()
    torch.testing.assert_close(sparse(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert sparse.generation_config.to_dict() == model.generation_config.to_dict()
    processors = [AutoProcessor.from_pretrained(folder) for folder in (dense, tmp_path / "sparse")]
    assert processors[0].to_dict() == processors[1].to_dict()
    assert made.processor == "LlavaProcessor" == type(processors[1]).__name__


def test_the_report(dense, tmp_path):
    made = upcycle_checkpoint(dense, tmp_path / "sparse")
    planned = plan_checkpoint(dense)
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert (made.source, made.output) == (str(dense), str(tmp_path / "sparse"))
    assert made.dense == planned.dense == costs_of(LlavaForConditionalGeneration.from_pretrained(dense))
    sparse = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse", trust_remote_code=True)
    assert made.sparse == planned.sparse
    assert made.sparse.total == sparse.num_parameters()
    assert made.start == config["experts_config"]["start"]
    assert made.start["parity"]["relative_difference"] == made.start["block_error"] == 0.0
    assert made.start["parity"]["batch"] == "made"
    assert {"name": "residual", "seed": 0, "router_init": "random"}.items() <= made.start.items()
    assert "parity" not in planned.start
    assert "block_error" not in planned.start
    assert (planned.output, planned.processor) == (None, None)
    lines = str(made).splitlines()
    assert lines[0] == "|  | dense | sparse |"
    assert lines[-3] == "UpcycledLlavaForConditionalGeneration, start residual"
    assert lines[-2].startswith(
        "parity on 32 tokens (random batch, float32): relative difference 0.0e+00 (bound 1.0e-05)"
    )
    assert lines[-1] == f"{tmp_path / 'sparse'} (LlavaProcessor)"
    assert str(planned).splitlines()[-1] == "UpcycledLlavaForConditionalGeneration, start residual"
    json.dumps(made.to_dict())


def test_a_language_model_without_a_tokenizer(dense_llama, tmp_path):
    made = upcycle_checkpoint(dense_llama, tmp_path / "sparse", expert_groups="joint", dtype="bfloat16")
    assert made.processor is None
    assert str(made).endswith("sparse (the source has no processor and no tokenizer)")
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", trust_remote_code=True)
    assert sparse.dtype == torch.bfloat16
    assert made.start["parity"]["dtype"] == "bfloat16"
    assert made.start["parity"]["bound"] == 4 * torch.finfo(torch.bfloat16).eps


def test_a_plan_reads_no_weights(dense, tmp_path):
    (dense / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    planned = plan_checkpoint(dense, start="split", expert_groups="joint", granularity=2, num_experts=8)
    assert sorted(tmp_path.rglob("*")) == before
    assert planned.sparse.active["text"] == planned.dense.active["text"] + 2 * 8 * 32  # with routers
    assert planned.start["granularity"] == 2


def rows():
    texts = ["What is it?", "Where is the cat?", "the mat"]
    return [
        {"messages": [user(make_image(number), text), assistant("the cat sat on the mat")]}
        for number, text in enumerate(texts)
    ]


def test_router_rows_from_data(dense, tmp_path):
    """The receipt uses the first example, with its image."""
    made = upcycle_checkpoint(dense, tmp_path / "sparse", router_init="data", rows=rows(), num_experts=2)
    model, processor = LlavaForConditionalGeneration.from_pretrained(dense), AutoProcessor.from_pretrained(dense)
    batch = [
        processor.apply_chat_template([row["messages"]], tokenize=True, return_dict=True, return_tensors="pt")
        for row in rows()
    ]
    expected = upcycle(model, router_init="data", batch=batch, num_experts=2)
    expected.save_pretrained(tmp_path / "expected")
    weights = [folder / "model.safetensors" for folder in (tmp_path / "sparse", tmp_path / "expected")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert made.start["parity"] == expected.config.experts_config.start["parity"]
    assert made.start["parity"]["batch"] == "given"
    assert made.start["router_init"] == "data"


def test_the_sparse_class_of_the_library(dense_llama, tmp_path):
    make_tokenizer().save_pretrained(dense_llama)
    made = upcycle_checkpoint(
        dense_llama, tmp_path / "native", native=True, expert_groups="joint", num_experts=4, max_shard_size="50KB"
    )
    assert made.model_class == "MixtralForCausalLM"
    model, dense = (
        MixtralForCausalLM.from_pretrained(tmp_path / "native"),
        LlamaForCausalLM.from_pretrained(dense_llama),
    )
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    names = names_in(tmp_path / "native")
    assert not [name for name in names if name.endswith(".py")]
    assert {"tokenizer.json", "model.safetensors.index.json"} <= names
    assert made.start["parity"]["relative_difference"] < 1e-5
    assert made.dense == costs_of(dense)
    assert made.sparse == costs_of(model)


def test_without_the_comparison_the_dense_model_is_not_loaded(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "written_parity", None)
    made = upcycle_checkpoint(dense, tmp_path / "sparse", compare=False)
    assert "parity" not in made.start
    assert made.start["block_error"] == 0.0
    assert "outputs of blocks differ by 0.0e+00 at most" in str(made)


# ------------------------------------------------------------------------------------------------ errors


def broken_start(block, *args, start=streaming.start_block, **kwargs):
    start(block, *args, **kwargs)
    block.shared_experts["image"].down_proj.weight.data *= 1.01


@pytest.mark.parametrize("compare", [True, False])
def test_a_broken_start_is_refused(compare, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "start_block", broken_start)
    with pytest.raises(
        UpcyclingError, match=r"the sparse block of layer \d does not compute what .* differ by 1\.0e-02"
    ):
        upcycle_checkpoint(dense, tmp_path / "sparse", compare=compare)
    assert names_in(tmp_path) == {"dense"}
    made = upcycle_checkpoint(dense, tmp_path / "sparse", compare=compare, parity_bound=float("inf"))
    assert made.start["block_error"] == pytest.approx(0.01, rel=1e-3)
    assert "config.json" in names_in(tmp_path / "sparse")


def test_files_that_differ_from_the_model(dense, tmp_path, monkeypatch):
    """The blocks are right, but the written files are not. The receipt detects this."""
    monkeypatch.setattr(
        streaming._Run, "_write", lambda run, tensors, write=streaming._Run._write: write(run, add_one(tensors))
    )
    with pytest.raises(
        UpcyclingError, match=r"the tensor \S+norm\.weight in the files differs from that of the dense model"
    ):
        upcycle_checkpoint(dense, tmp_path / "sparse")
    assert names_in(tmp_path) == {"dense"}


def add_one(tensors):
    return {name: tensor + name.endswith("norm.weight") for name, tensor in tensors.items()}


@pytest.mark.parametrize("where", ["write_sparse_weights", "write_model_card"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_nothing(where, error, dense, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error("no space left")

    monkeypatch.setattr(checkpoints, where, fail)
    with pytest.raises(error, match="no space left"):
        upcycle_checkpoint(dense, tmp_path / "new/sparse")
    assert names_in(tmp_path) == {"dense"}


def test_the_configuration_comes_last(dense, tmp_path, monkeypatch):
    """If the process is killed, the files that it leaves are not mistaken for a model."""
    seen = []
    written = checkpoints.written_parity

    def watched(*args, **kwargs):
        seen.append(names_in(args[3]))
        return written(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "written_parity", watched)
    upcycle_checkpoint(dense, tmp_path / "sparse")
    assert seen == [{"model.safetensors"}]


def test_an_existing_model_is_replaced_only_on_request(dense, tmp_path):
    upcycle_checkpoint(dense, tmp_path / "sparse", max_shard_size="50KB", compare=False)
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 2
    with pytest.raises(UpcyclingError, match="already contains a model"):
        upcycle_checkpoint(dense, tmp_path / "sparse", compare=False)
    upcycle_checkpoint(dense, tmp_path / "sparse", overwrite=True, expert_groups="joint", compare=False)
    assert [path.name for path in (tmp_path / "sparse").glob("*.safetensors*")] == ["model.safetensors"]
    assert json.loads((tmp_path / "sparse/config.json").read_text())["experts_config"]["start"]["name"] == "copy"
    with pytest.raises(UpcyclingError, match="is the folder of the dense model"):
        upcycle_checkpoint(dense, dense, overwrite=True)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"start": "copy", "granularity": 2}, "so it cannot be combined with `granularity` 2"),
        ({"num_expert": 3}, "did you mean `num_experts`"),
        ({"layers": [2]}, "`layers` must be decoder layers, 0 to 1"),
        ({"router_init": "zeros"}, r"`router_init` must be one of \('random', 'data'\), got 'zeros'"),
        ({"router_init": "data"}, '`router_init="data"` needs examples'),
    ],
)
def test_impossible_requests(request_, message, dense, tmp_path, monkeypatch):
    """Nothing is read or written."""
    monkeypatch.setattr(checkpoints.DenseCheckpoint, "open", None)
    with pytest.raises(UpcyclingError, match=message):
        upcycle_checkpoint(dense, tmp_path / "sparse", **request_)
    assert names_in(tmp_path) == {"dense"}


def test_examples_without_a_processor(dense_llama, tmp_path):
    with pytest.raises(UpcyclingError, match="no processor and no tokenizer"):
        upcycle_checkpoint(dense_llama, tmp_path / "sparse", rows=rows())


def test_gguf_files_need_a_package(dense_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "is_gguf_available", lambda: False)
    with pytest.raises(UpcyclingError, match="pip install gguf"):
        upcycle_checkpoint(dense_llama, tmp_path / "sparse", gguf_file="model.gguf")


def test_an_upcycled_model(dense, tmp_path):
    upcycle_checkpoint(dense, tmp_path / "sparse", compare=False)
    with pytest.raises(UpcyclingError, match="has custom code, as models that are upcycled already do"):
        upcycle_checkpoint(tmp_path / "sparse", tmp_path / "twice")
