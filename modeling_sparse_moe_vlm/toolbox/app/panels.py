"""HTML of the panels beside the chat."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from .answers import Answer
from .drawings import alpha_html, draw_experts, draw_heat

WAITING = '<p class="note">Ask something, and this panel shows how the answer was made.</p>'


def panels(answer: Answer, images: Sequence[Image.Image]) -> tuple[str, str, str]:
    """
    Returns the panels of an answer.

    Args:
        answer ([`~answers.Answer`]):
            The answer.
        images (`Sequence[PIL.Image.Image]`):
            All images of the conversation.

    Returns:
        `tuple[str, str, str]`: HTML of α by word, of the attention heat maps, and of the experts of the image tokens.
    """
    alpha = alpha_html(answer.words, answer.alpha, answer.count_free_alpha) if answer.alpha else note(answer.alpha_note)
    # All images have the same scale, so that they can be compared.
    highest = max((float(cells.max()) for cells in answer.heat), default=0.0)
    heat = [draw_heat(image, cells, highest) for image, cells in zip(images, answer.heat)]
    experts = [draw_experts(image, cells, answer.layers, answer.groups) for image, cells in zip(images, answer.experts)]
    return (
        alpha,
        figures(heat, "heat over image") if heat else note(answer.heat_note),
        figures(experts, "experts of image") if experts else note(answer.experts_note),
    )


def note(text: str) -> str:
    """Returns a line that says why a panel is empty."""
    return f'<p class="note">{html.escape(text)}</p>'


def problem(text: str) -> str:
    """Returns a line with an error message."""
    return f'<p class="problem">{html.escape(" ".join(text.split()))}</p>'


def figures(drawings: Sequence[Image.Image], description: str) -> str:
    """
    Returns drawings side by side, numbered if there are several.

    Args:
        drawings (`Sequence[PIL.Image.Image]`):
            The drawings.
        description (`str`):
            Description for readers who do not see them, which the number completes.
    """
    captions = [f"<figcaption>image {i}</figcaption>" if len(drawings) > 1 else "" for i in range(1, len(drawings) + 1)]
    return (
        '<div class="figures">'
        + "".join(
            f'<figure><img src="{data_uri(drawing)}" width="{drawing.width}" alt="{description} {i}">{caption}</figure>'
            for i, (drawing, caption) in enumerate(zip(drawings, captions), start=1)
        )
        + "</div>"
    )


def data_uri(drawing: Image.Image) -> str:
    """Returns a drawing as a PNG data URI."""
    buffer = BytesIO()
    drawing.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
