"""
Compares quantised models with and without quantised routed experts: bytes, and how many answers change.

    python scripts/benchmarks/quantization.py --model outputs/demo/model --json

The model answers questions about held-out scenes. Every quantiser that is installed (`pip install bitsandbytes torchao
optimum-quanto`) is applied to the decoder twice: to the linear layers only (`stacked`: the routed experts stay as they
are), and to the routed experts as well (`unfused`: `unfused_experts=True`; with torchao also `stacks`: `FqnToConfig` on
the stacked parameters). The vision tower, the connector, the embeddings and the head are not quantised.

- `bytes`: size of all parameters and buffers; the peer is the model as it was saved
- `expert_bytes`: the same of the routed experts only
- `exact_match`: percentage of right answers; the peer is the model as it was saved
- `same_answers`: percentage of answers that are those of the model as it was saved
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import MODEL_OPTION, Row, find_demo, make_parser, report
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
    set_seed,
)

from modeling_sparse_moe_vlm.toolbox.demo import scenes, to_messages
from modeling_sparse_moe_vlm.toolbox.evaluation import exact_match, generate_answers
from modeling_sparse_moe_vlm.toolbox.training import from_scratch

PRESET = Path(__file__).resolve().parents[2] / "configuration/models/tiny.json"
NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            arguments.model = folder
            for part in from_scratch(str(PRESET), scenes("train", 50, cell_size=16), vocab_size=512):
                part.save_pretrained(folder)
        report("quantization", arguments, list(measure(arguments)))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        model=MODEL_OPTION,
        examples={"type": int, "default": 200, "help": "number of held-out questions"},
        cell_size={"type": int, "default": 16, "help": "pixels per cell of a scene; use the value of the training"},
    )
    arguments = parser.parse_args()
    find_demo(parser, arguments)
    arguments.options = {}
    if arguments.quick:
        arguments.examples = min(arguments.examples, 2 if arguments.model is None else 16)
        if arguments.model is None:  # an untrained model does not end its answers
            arguments.options = {"max_new_tokens": 4}
    return arguments


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yields the rows of all quantisers that are installed."""
    data = scenes("test", arguments.examples, cell_size=arguments.cell_size)
    rows = [to_messages(row) for row in data]
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)

    def load(**kwargs: Any) -> PreTrainedModel:
        kwargs |= {"trust_remote_code": True, "device_map": arguments.device}
        return AutoModelForImageTextToText.from_pretrained(arguments.model, **kwargs)

    model = load()
    right = generate_answers(model, processor, rows, **arguments.options)
    peers = {"bytes": size_of(model), "expert_bytes": size_of(model, experts=True)}
    peers["exact_match"] = exact_match(right, data["answer"])
    for case, make_config, unfused in cases():
        model = load(quantization_config=make_config(), unfused_experts=unfused)
        sizes = {"bytes": size_of(model), "expert_bytes": size_of(model, experts=True)}
        answers = generate_answers(model, processor, rows, **arguments.options)
        for metric, figure in (sizes | {"exact_match": exact_match(answers, data["answer"])}).items():
            yield Row(case, metric, figure, peers[metric])
        same = sum(answer == other for answer, other in zip(answers, right, strict=True))
        yield Row(case, "same_answers", 100 * same / len(answers), 100.0)


def cases() -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """Yields names, configurations of quantisers, and whether the experts are unfused."""
    quantisers: dict[str, Callable[[], Any]] = {}
    if is_installed("bitsandbytes"):
        quantisers["bitsandbytes 8 bits"] = lambda: BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTISED
        )
        quantisers["bitsandbytes 4 bits"] = lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=NOT_QUANTISED
        )
    if is_installed("torchao"):
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

        quantisers["torchao 8 bits"] = lambda: TorchAoConfig(
            Int8WeightOnlyConfig(), modules_to_not_convert=NOT_QUANTISED
        )
        patterns = (r"re:.*experts.*(gate_up|down)_proj", r"re:.*language_model.*_proj\.weight")
        yield (
            "torchao 8 bits, stacks",
            lambda: TorchAoConfig(FqnToConfig(dict.fromkeys(patterns, Int8WeightOnlyConfig()))),
            False,
        )
    if is_installed("optimum.quanto"):
        quantisers["quanto 8 bits"] = lambda: QuantoConfig(weights="int8", modules_to_not_convert=NOT_QUANTISED)
        quantisers["quanto 4 bits"] = lambda: QuantoConfig(weights="int4", modules_to_not_convert=NOT_QUANTISED)
    if not quantisers:
        sys.exit("no quantiser is installed: pip install bitsandbytes torchao optimum-quanto")
    for name, make_config in quantisers.items():
        yield f"{name}, stacked", make_config, False
        yield f"{name}, unfused", make_config, True


def is_installed(name: str) -> bool:
    package, _, module = name.partition(".")
    found = importlib.util.find_spec(package)
    return found is not None and (not module or importlib.util.find_spec(name) is not None)


def size_of(model: PreTrainedModel, experts: bool = False) -> int:
    """Returns the bytes of the parameters and buffers of a model, or only of its routed experts."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    counted = [name for name in tensors if not experts or re.search(r"\.(experts|expert_pools)\.", name)]
    return sum(num_bytes(tensors[name]) for name in counted)


def num_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes of a tensor. Quantised tensors of torchao and quanto consist of others."""
    quant_state = getattr(tensor, "quant_state", None)
    if quant_state is not None:  # bitsandbytes, 4 bits
        return tensor.numel() * tensor.element_size() + num_bytes(quant_state.absmax)
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    main()
