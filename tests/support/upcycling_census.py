"""Finds the types of Transformers that can be upcycled: upcycles a tiny model of each, and compares the two."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

from modeling_sparse_moe_vlm.toolbox.upcycling import upcycle
from modeling_sparse_moe_vlm.toolbox.upcycling.blocks import (
    find_blocks,
    placeholder_ids,
)
from modeling_sparse_moe_vlm.toolbox.upcycling.errors import UpcyclingError
from tests.support.tiny_models import TEXT_TOKENS, default_model, tiny_model

KINDS = {
    "Images and text": (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "Text": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
STARTS = {"copy": {"expert_groups": "joint", "start": "copy"}, "residual": {"start": "residual"}}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
# Notes about types, in addition to the results of the census.
NOTES = {
    "shieldgemma2": "Compared in memory only: Transformers saves this type, dense or upcycled, under names of weights "
    "that it does not find again.",
}
EXACT, ON_REQUEST, REFUSED, FAILED, NOT_BUILT = "exact", "exact, on request", "no", "failed", "not examined"


@dataclass
class Entry:
    """The result for one type: the largest relative difference of logits by start, or why there is none."""

    kind: str
    model_type: str
    outcome: str
    reason: str = ""
    differences: dict[str, float] = field(default_factory=dict)


def census(kind: str, model_types: list[str] | None = None) -> Iterator[Entry]:
    """Yields an entry for every type of a kind, or for the given types."""
    auto_class, names = KINDS[kind]
    for model_type in sorted(names):
        if model_type != "sparse_moe_vlm" and model_type in (model_types or names):
            yield examine(kind, model_type, auto_class)


def examine(kind: str, model_type: str, auto_class) -> Entry:
    layers, outcome = None, EXACT
    try:
        find_blocks(structure(model_type, auto_class))
    except UpcyclingError as error:
        layers, outcome = convertible_layers(model_type, auto_class), ON_REQUEST
        if not layers:
            return Entry(kind, model_type, REFUSED, str(error))
    except Exception as error:
        return Entry(kind, model_type, NOT_BUILT, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    reason = f"`layers={layers}`" if layers else ""
    try:
        differences = {start: difference(model_type, auto_class, layers, **STARTS[start]) for start in STARTS}
    except Exception as error:
        return Entry(kind, model_type, FAILED, f"{type(error).__name__}: {error}")
    return Entry(kind, model_type, outcome, reason, differences)


def structure(model_type: str, auto_class) -> PreTrainedModel:
    """Returns a tiny model without weights, or one of the default size if small sizes do not fit each other."""
    try:
        return tiny_model(model_type, auto_class, "meta")
    except ImportError:  # it needs a library that is not installed
        raise
    except Exception:
        return default_model(model_type, auto_class)


def convertible_layers(model_type: str, auto_class) -> list[int]:
    """Returns the layers of a tiny model that can be upcycled one by one."""
    layers = []
    try:
        model = tiny_model(model_type, auto_class, "meta")
        for layer in range(model.config.get_text_config(decoder=True).num_hidden_layers):
            try:
                find_blocks(model, layers=[layer])
            except UpcyclingError:
                continue
            layers.append(layer)
        find_blocks(model, layers=layers)
    except Exception:
        return []
    return layers


def difference(model_type: str, auto_class, layers: list[int] | None = None, **request) -> float:
    """
    Upcycles a tiny model, compares its tokens, saves and loads it.

    Returns:
        `float`: The largest difference of logits, before or after saving, relative to the largest logit.
    """
    dense = tiny_model(model_type, auto_class)
    inputs = inputs_of(dense)
    sparse = upcycle(dense, num_experts=4, layers=layers, batch=inputs, **request)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        sparse.save_pretrained(folder)
        # The library lists some text models under the type of a larger one, and finds neither dense nor sparse ones.
        loader = auto_class if auto_class.__name__ in sparse.config.auto_map else type(sparse)
        reloaded = loader.from_pretrained(folder, trust_remote_code=True)
        assert type(reloaded).__name__ == type(sparse).__name__, f"loads as a {type(reloaded).__name__}"
        expected = dense(**inputs).logits
        assert torch.equal(generated(sparse, inputs), generated(dense, inputs)), "generates other tokens"
        logits = [model.eval()(**inputs).logits for model in (sparse, reloaded)]
        for block in find_blocks(dense, layers).blocks:
            for parameter in reloaded.get_submodule(block.name).parameters():
                parameter.mul_(10)
        changed = reloaded(**inputs).logits
    assert torch.equal(*logits) or not loads_again(dense, inputs), "has other logits after loading"
    assert relative_difference(changed, logits[0]) > 1e-3, "does not depend on its experts"
    return relative_difference(logits[0], expected)


def relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    allowed = expected > torch.finfo(expected.dtype).min  # Chameleon never generates image tokens
    logits, expected = logits[allowed], expected[allowed]
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def loads_again(dense: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    """Whether a saved dense model is the same after loading, which depends on the library."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        return torch.equal(type(dense).from_pretrained(folder)(**inputs).logits, dense(**inputs).logits)


def generated(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return model.generate(**inputs, **GREEDY)


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns two rows of words, with two placeholders of each modality. The encoders do not run."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (2, 12), generator=generator)
    for place, ids in enumerate(placeholder_ids(model.config).values()):
        input_ids[:, 2 + 3 * place : 4 + 3 * place] = ids[0]
    inputs = {"input_ids": input_ids}
    if model.config.model_type.endswith("idefics"):
        inputs["image_encoder_embeddings"] = torch.randn(2, 1, 4, 32, generator=generator)
        inputs["image_attention_mask"] = torch.ones(2, 12, 1, dtype=torch.long)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids
    return inputs


def table(entries: list[Entry]) -> str:
    """Returns the census as a page of the documentation."""
    lines = [
        "# Types of models that can be upcycled",
        "",
        f"Transformers {transformers.__version__}. `python scripts/upcycling_census.py` builds a tiny random model of",
        "every type in `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING` and `MODEL_FOR_CAUSAL_LM_MAPPING`, upcycles it, compares",
        "its logits and the tokens that it generates with those of the dense model, saves it and loads it. The figures",
        'are the largest difference of logits in float32, relative to the largest logit, with `start="copy"` (joint',
        'experts) and `start="residual"` (hybrid). "On request": only the layers named can become sparse.',
    ]
    for kind in KINDS:
        of_kind = [entry for entry in entries if entry.kind == kind]
        counts = Counter(entry.outcome for entry in of_kind)
        lines += [
            "",
            f"## {kind}",
            "",
            f"{len(of_kind)} types: {counts[EXACT]} exact, {counts[ON_REQUEST]} exact on request, "
            f"{counts[REFUSED] + counts[FAILED]} not.",
            "",
            "| type | upcycled | copy | residual | why not, or how |",
            "| --- | --- | --- | --- | --- |",
        ]
        for entry in of_kind:
            figures = [f"{entry.differences[start]:.1e}" if entry.differences else "" for start in STARTS]
            reason = " ".join(text for text in (entry.reason, NOTES.get(entry.model_type)) if text)
            reason = reason.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| `{entry.model_type}` | {entry.outcome} | {' | '.join(figures)} | {reason} |")
    return "\n".join(lines) + "\n"
