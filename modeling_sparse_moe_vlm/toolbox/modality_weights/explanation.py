"""Explains one answer: where the model looked for each word, and which experts processed the image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL.Image import Image
from transformers import ProcessorMixin

from ...checks import check
from ...modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ..demo.drawings import save_figure
from ..demo.scenes import to_messages

MAX_SHOWN_LAYERS = 6  # spread evenly over the sparse layers
MAX_NUMBERED_SIDE = 6  # with more tokens, the numbers of the experts do not fit


@dataclass
class Explanation:
    """
    Attention and routing of a model that answered one question about one image of S × S image tokens. If the processor
    cuts the image into tiles, these are the tokens of its thumbnail.

    Args:
        words (`list[str]`):
            Tokens of the answer, without special tokens.
        alpha (`torch.Tensor` of shape `(words,)`):
            α of each word: the share of attention that went to the image, averaged over layers and heads.
        count_free_alpha (`torch.Tensor` of shape `(words,)`):
            Count-free α of each word, which does not depend on the number of image tokens.
        looked (`torch.Tensor` of shape `(rows, columns)`):
            Distribution of the attention to these tokens, averaged over words, layers and heads. Its sum is 1.
        experts (`torch.Tensor` of shape `(sparse layers, rows, columns)`):
            Number of the routed expert with the highest score, for every image token.
    """

    words: list[str]
    alpha: torch.Tensor
    count_free_alpha: torch.Tensor
    looked: torch.Tensor
    experts: torch.Tensor


@torch.no_grad()
def explain(
    model: SparseMoeVlmForConditionalGeneration, processor: ProcessorMixin, image: Image, question: str
) -> Explanation:
    """
    Lets a model answer a question and records where it looked. `generate` itself returns the weights α. The attention
    within the image is read from the attention matrices of one more forward pass with eager attention.

    Args:
        model (`SparseMoeVlmForConditionalGeneration`):
            The model.
        processor (`ProcessorMixin`):
            Processor of the model.
        image (`PIL.Image.Image`):
            The image.
        question (`str`):
            The question.

    Returns:
        [`Explanation`]: Words of the answer with their α, the attention within the image, and the experts.

    Raises:
        ValueError: If the answer consists of special tokens only.
    """
    messages = to_messages({"question": question, "answer": "", "image": image})["messages"][:1]
    messages[0]["content"][0]["image"] = image
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    outputs = model.generate(
        **inputs, max_new_tokens=32, do_sample=False, output_modality_weights=True, return_dict_in_generate=True
    )
    answer = outputs.sequences[0, inputs["input_ids"].shape[1] :]
    # By number of the decoding step.
    words = {
        step: word for step, token in enumerate(answer) if (word := processor.decode([token], skip_special_tokens=True))
    }
    check(bool(words), f"the answer to {question!r} is empty, so there is nothing to explain.")
    alpha, count_free_alpha = (
        torch.stack([torch.stack(weights[step])[:, 0, :, -1, 1].mean() for step in words])
        for weights in (outputs.modality_weights, outputs.count_free_modality_weights)
    )

    of_sizes = {name: inputs[name] for name in ("image_grid_thw",) if name in inputs}
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        whole = model(
            input_ids=outputs.sequences,
            pixel_values=inputs["pixel_values"],
            **of_sizes,
            output_attentions=True,
            output_router_logits=True,
        )
    finally:
        model.set_attn_implementation(before)
    (positions,) = torch.nonzero(model.model.get_mm_token_type_ids(outputs.sequences)[0] == 1, as_tuple=True)
    if "image_grid_thw" in inputs:
        rows, columns = (int(side) // processor.merge_size for side in inputs["image_grid_thw"][0, 1:])
    else:
        # With tiles, the last ones are those of the thumbnail, which shows the whole image.
        positions = positions[-getattr(processor, "image_seq_length", len(positions)) :]
        rows = columns = int(len(positions) ** 0.5)
    # The last token of the prompt predicts the first word.
    queries = torch.tensor(list(words)) + inputs["input_ids"].shape[1] - 1
    attention = torch.stack(whole.attentions)[:, 0][:, :, queries][..., positions]
    looked = attention.mean(dim=(0, 1, 2))
    # `router_indices`, not `router_logits`: the logits do not include the biases of the routers.
    experts = torch.stack([chosen[positions, 0] for chosen in whole.router_indices])
    return Explanation(
        words=list(words.values()),
        alpha=alpha,
        count_free_alpha=count_free_alpha,
        looked=(looked / looked.sum()).view(rows, columns),
        experts=experts.view(-1, rows, columns),
    )


def draw_explanation(explanation: Explanation, image: Image, question: str, path: str | Path) -> None:
    """
    Draws three panels: the image with the distribution of the attention to it, α and β of every word of the answer, and
    for every sparse layer a map of the routed experts that the image tokens went to.

    Args:
        explanation (`Explanation`):
            What [`explain`] returns.
        image (`PIL.Image.Image`):
            The image.
        question (`str`):
            The question.
        path (`str` or `Path`):
            Where to write the PNG.
    """
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    figure.suptitle(f"{question}  –  {''.join(explanation.words)}", parse_math=False)
    columns = figure.add_gridspec(1, 3, width_ratios=[1, 1.15, 1.35])
    _draw_attention(figure.add_subfigure(columns[0]), explanation, image)
    _draw_words(figure.add_subfigure(columns[1]), explanation)
    _draw_experts(figure.add_subfigure(columns[2]), explanation.experts, image)
    save_figure(figure, path)


def _draw_attention(panel: SubFigure, explanation: Explanation, image: Image) -> None:
    panel.suptitle("Attention to the image", fontsize=11)
    axes = panel.subplots()
    extent = (0, image.width, image.height, 0)
    axes.imshow(image.convert("L"), cmap="gray", interpolation="nearest", extent=extent)
    heat = axes.imshow(
        explanation.looked.numpy(), cmap="magma", vmin=0, alpha=0.6, extent=extent, interpolation="nearest"
    )
    panel.colorbar(heat, ax=axes, location="bottom", shrink=0.8, label="share of the attention to the image")
    axes.set_axis_off()


def _draw_words(panel: SubFigure, explanation: Explanation) -> None:
    panel.suptitle("Attention of each word", fontsize=11)
    axes = panel.subplots()
    positions = torch.arange(len(explanation.words)).numpy()
    alpha, beta = explanation.alpha.numpy(), 1 - explanation.alpha.numpy()
    axes.bar(positions, alpha, color="tab:orange", label="α: share on the image")
    axes.bar(positions, beta, bottom=alpha, color="tab:blue", label="β: share on the text")
    axes.plot(positions, explanation.count_free_alpha.numpy(), "ko", label="count-free α")
    axes.set_xticks(positions, explanation.words, rotation=45, parse_math=False)
    axes.set(ylim=(0, 1), ylabel="share of attention")
    panel.legend(loc="outside lower center", ncols=3, fontsize=8)


def _draw_experts(panel: SubFigure, experts: torch.Tensor, image: Image) -> None:
    panel.suptitle("Routed expert of each image token", fontsize=11)
    shown = torch.linspace(0, len(experts) - 1, min(len(experts), MAX_SHOWN_LAYERS)).round().long().tolist()
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    plots = panel.subplots(-(-len(shown) // columns), columns, squeeze=False).flat
    rows, width = experts.shape[-2:]
    numbers = sorted(set(experts[shown].flatten().tolist()))
    palette = colormaps["tab20" if len(numbers) > 10 else "tab10"]
    colours = {expert: palette(position % palette.N) for position, expert in enumerate(numbers)}
    extent = (0, image.width, image.height, 0)
    for axes in plots:
        axes.set_axis_off()
    for layer, axes in zip(shown, panel.axes, strict=False):
        axes.set_title(f"sparse layer {layer}", fontsize=9)
        axes.imshow(image.convert("L"), cmap="gray", interpolation="nearest", extent=extent)
        cells = [[colours[expert] for expert in row] for row in experts[layer].tolist()]
        axes.imshow(torch.tensor(cells).numpy(), alpha=0.65, extent=extent, interpolation="nearest")
        if max(rows, width) > MAX_NUMBERED_SIDE:
            continue
        for row, column in product(range(rows), range(width)):
            axes.text(
                (column + 0.5) * image.width / width, (row + 0.5) * image.height / rows,
                str(int(experts[layer, row, column])), ha="center", va="center", fontsize=9, color="white",
                path_effects=[withStroke(linewidth=2, foreground="black")],
            )  # fmt: skip
    if len(numbers) <= palette.N:
        key = [Patch(color=colours[expert], label=f"expert {expert}") for expert in numbers]
        panel.legend(handles=key, loc="outside lower center", ncols=min(len(key), 5), fontsize=8)
