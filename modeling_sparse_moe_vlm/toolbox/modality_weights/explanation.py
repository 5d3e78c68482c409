"""Explains one answer: where the model looked for each word, and which experts processed the image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL.Image import Image
from transformers import ProcessorMixin

from ...checks import check
from ...modeling_sparse_moe_vlm import SparseMoeVlmForConditionalGeneration
from ..demo.drawings import save_figure
from ..demo.scenes import to_messages


@dataclass
class Explanation:
    """
    Attention and routing of a model that answered one question about one image of S × S image tokens.

    Args:
        words (`list[str]`):
            Tokens of the answer, without special tokens.
        alpha (`torch.Tensor` of shape `(words,)`):
            α of each word: the share of attention that went to the image, averaged over layers and heads.
        count_free_alpha (`torch.Tensor` of shape `(words,)`):
            Count-free α of each word, which does not depend on the number of image tokens.
        looked (`torch.Tensor` of shape `(S, S)`):
            Distribution of the attention to the image over its tokens, averaged over words, layers and heads. Its sum
            is 1.
        experts (`torch.Tensor` of shape `(sparse layers, S, S)`):
            Number of the routed expert with the highest score, for every image token.
    """

    words: list[str]
    alpha: torch.Tensor
    count_free_alpha: torch.Tensor
    looked: torch.Tensor
    experts: torch.Tensor


@torch.no_grad()
def explain(
    model: SparseMoeVlmForConditionalGeneration, processor: ProcessorMixin, picture: Image, question: str
) -> Explanation:
    """
    Lets a model answer a question and records where it looked. `generate` itself returns the weights α. The attention
    within the image is read from the attention matrices of one more forward pass with eager attention.

    Args:
        model (`SparseMoeVlmForConditionalGeneration`):
            The model.
        processor (`ProcessorMixin`):
            Processor of the model.
        picture (`PIL.Image.Image`):
            The image.
        question (`str`):
            The question.

    Returns:
        [`Explanation`]: Words of the answer with their α, the attention within the image, and the experts.

    Raises:
        ValueError: If the answer consists of special tokens only.
    """
    messages = to_messages({"question": question, "answer": "", "image": picture})["messages"][:1]
    messages[0]["content"][0]["image"] = picture
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

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        whole = model(
            input_ids=outputs.sequences,
            pixel_values=inputs["pixel_values"],
            output_attentions=True,
            output_router_logits=True,
        )
    finally:
        model.set_attn_implementation(before)
    is_image = model.model.get_mm_token_type_ids(outputs.sequences)[0] == 1
    side = int(is_image.sum() ** 0.5)
    # The last token of the prompt predicts the first word.
    queries = torch.tensor(list(words)) + inputs["input_ids"].shape[1] - 1
    attention = torch.stack(whole.attentions)[:, 0][:, :, queries][..., is_image]
    looked = attention.mean(dim=(0, 1, 2))
    # `router_indices`, not `router_logits`: the logits do not include the biases of the routers.
    experts = torch.stack([chosen[is_image, 0] for chosen in whole.router_indices])
    return Explanation(
        words=list(words.values()),
        alpha=alpha,
        count_free_alpha=count_free_alpha,
        looked=(looked / looked.sum()).view(side, side),
        experts=experts.view(-1, side, side),
    )


def draw_explanation(explanation: Explanation, picture: Image, question: str, path: str | Path) -> None:
    """
    Draws the image with the attention that it got, α and β of every word, and the experts of its tokens.

    Args:
        explanation (`Explanation`):
            What [`explain`] returns.
        picture (`PIL.Image.Image`):
            The image.
        question (`str`):
            The question.
        path (`str` or `Path`):
            Where to write the PNG.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(f"{question}  –  {''.join(explanation.words)}", parse_math=False)
    shown, bars, chosen = figure.subplots(1, 3)
    extent = (0, picture.width, picture.height, 0)

    shown.imshow(picture, interpolation="nearest", extent=extent)
    shown.imshow(explanation.looked.numpy(), cmap="magma", alpha=0.45, extent=extent)
    shown.set_title("where attention to the image fell")

    positions = torch.arange(len(explanation.words)).numpy()
    alpha, beta = explanation.alpha.numpy(), 1 - explanation.alpha.numpy()
    bars.bar(positions, alpha, color="tab:orange", label="α: image")
    bars.bar(positions, beta, bottom=alpha, color="tab:blue", label="β: text")
    bars.plot(positions, explanation.count_free_alpha.numpy(), "ko", label="count-free α")
    bars.set_xticks(positions, explanation.words, rotation=45, parse_math=False)
    bars.set(ylim=(0, 1), ylabel="share of attention", title="word by word")
    bars.legend(loc="upper right", fontsize=8)

    chosen.imshow(picture, interpolation="nearest", extent=extent, alpha=0.5)
    side = explanation.looked.shape[0]
    for row in range(side):
        for column in range(side):
            numbers = " ".join(str(int(expert)) for expert in explanation.experts[:, row, column])
            chosen.text(
                (column + 0.5) * picture.width / side, (row + 0.5) * picture.height / side, numbers,
                ha="center", va="center", fontsize=12, bbox={"facecolor": "white", "alpha": 0.8},
            )  # fmt: skip
    chosen.set_title("experts of its tokens, layer by layer")
    for axes in (shown, chosen):
        axes.set_axis_off()
    save_figure(figure, path)
