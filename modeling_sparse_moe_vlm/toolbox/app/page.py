"""The web page: a chat, its settings, and panels that show how the model generated an answer."""

from __future__ import annotations

import os
import queue
import socket
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
import gradio as gr

from ...checks import check
from .answers import Answer
from .chat_model import ChatModel, read_image
from .conversation import Turn, image_paths, to_bubbles, to_messages, turn_of_bubble
from .panels import WAITING, panels, problem
from .settings import NO_ADAPTER, Settings

GREETING = "Attach an image and ask about it. Click on an answer to see how the model generated it."
ODDS = "<small>modality_priors = {{'image': {}}}</small>"
HOUR = 3600  # seconds
FONTS = ["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
CSS = """
.alpha .words { display: flex; flex-wrap: wrap; gap: 6px; }
.alpha .word { display: inline-flex; flex-direction: column; align-items: center; padding: 3px 8px;
  border-radius: 6px; border: 1px solid rgba(128, 128, 128, 0.35); font-size: 1rem; line-height: 1.25; }
.alpha .word small { font-size: 0.72rem; opacity: 0.75; font-variant-numeric: tabular-nums; }
.alpha .scale { display: flex; align-items: center; gap: 8px; margin: 10px 0 4px; font-size: 0.8rem; }
.alpha .scale i { flex: 0 1 220px; height: 10px; border-radius: 5px; border: 1px solid rgba(128, 128, 128, 0.35);
  background: linear-gradient(to right, rgba(234, 108, 16, 0), rgba(234, 108, 16, 1)); }
.alpha p { margin: 2px 0 0; font-size: 0.85rem; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; }
.figures figure { margin: 0; max-width: 100%; }
.figures img { max-width: 100%; height: auto; border-radius: 6px; }
.figures figcaption { font-size: 0.8rem; text-align: center; }
#alpha .html-container, #heat .html-container, #experts .html-container, #trouble .html-container { padding: 0; }
#factor .html-container { padding: 0 2px; }
#trouble:not(:has(.problem)), #chat [aria-label="Share"] { display: none; }
.note { opacity: 0.75; font-size: 0.9rem; margin: 4px 0; }
.problem { color: #b91c1c; background: #fef2f2; border: 1px solid #fecaca; border-radius: 6px; padding: 6px 10px;
  margin: 0; }
.dark .problem { color: #fecaca; background: #450a0a; border-color: #7f1d1d; }
"""


class Page:
    """
    The web page of a model.

    Args:
        chat ([`~chat_model.ChatModel`]):
            The model.
        name (`str`):
            Name of the model, for the title.

    Attributes:
        blocks (`gradio.Blocks`): The page.
    """

    def __init__(self, chat: ChatModel, name: str):
        self.chat = chat
        self.stops: dict[str | None, threading.Event] = {}  # by session, while an answer is being generated
        with gr.Blocks(
            title=f"{name} – sparse-moe-vlm",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(HOUR, 24 * HOUR),  # uploaded images are deleted after a day
        ) as self.blocks:
            gr.Markdown(f"## {name}")
            turns = gr.State([])
            with gr.Row():
                with gr.Column(scale=5, min_width=380):
                    chatbot = gr.Chatbot(label="Chat", height=430, elem_id="chat", buttons=[], placeholder=GREETING)
                    message = gr.MultimodalTextbox(
                        show_label=False,
                        placeholder="Ask, with or without images" if chat.reads_images else "Ask",
                        file_count="multiple",
                        file_types=["image"],
                        sources=["upload"] if chat.reads_images else [],
                        elem_id="message",
                    )
                    trouble = gr.HTML("", elem_id="trouble", padding=False)
                    with gr.Row():
                        again = gr.Button("Ask again", size="sm", elem_id="again")
                        stop = gr.Button("Stop", size="sm", elem_id="stop")
                        clear = gr.Button("New conversation", size="sm", elem_id="clear")
                    controls = self._controls()
                with gr.Column(scale=6, min_width=380):
                    gr.Markdown("### α by word\nShare of attention that went to the images when each word was chosen")
                    alpha = gr.HTML(WAITING, elem_id="alpha", padding=False)
                    gr.Markdown("### Attention to the images\nShare of the attention to the images, by image token")
                    heat = gr.HTML(WAITING, elem_id="heat", padding=False)
                    gr.Markdown("### Experts of the image tokens\nThe routed expert with the largest weight, by layer")
                    experts = gr.HTML(WAITING, elem_id="experts", padding=False)
            shown = [alpha, heat, experts]
            outputs = [chatbot, turns, message, trouble, *shown]
            message.submit(self.ask, [turns, message, *controls], outputs, concurrency_id="model")
            again.click(self.ask_again, [turns, *controls], outputs, concurrency_id="model")
            stop.click(self.stop, None, None, queue=False)
            gr.on([clear.click, chatbot.clear], self.clear, None, outputs, queue=False)
            chatbot.select(self.show, [turns], shown, queue=False)

    def _controls(self) -> list[Any]:
        """Creates the controls for [`Settings`], in the order of its fields."""
        reads_images = self.chat.reads_images
        with gr.Accordion("Settings", open=True):
            adapter = gr.Dropdown(
                self.chat.adapters,
                value=NO_ADAPTER,
                label="Adapter",
                elem_id="adapter",
                visible=len(self.chat.adapters) > 1,
            )
            with gr.Row(visible=reads_images):
                odds = gr.Slider(
                    -2, 2, value=0, step=0.1, label="Image odds", elem_id="odds",
                    info="Power of two: 0 is the model's own, 2 is four times",
                )  # fmt: skip
                guidance = gr.Slider(
                    0, 4, value=0, step=0.1, label="Image guidance", elem_id="guidance",
                    info="Moves the attention output away from that of the text tokens",
                )  # fmt: skip
            factor = gr.HTML(ODDS.format(1), elem_id="factor", padding=False, visible=reads_images)
            odds.change(None, odds, factor, js="(x) => `" + ODDS.format("${(2 ** x).toFixed(2)}") + "`")
            with gr.Row():
                new_tokens = gr.Slider(1, 1024, value=128, step=1, label="Max new tokens", elem_id="new-tokens")
                temperature = gr.Slider(
                    0, 2, value=0, step=0.05, label="Temperature", elem_id="temperature", info="0: greedy decoding"
                )
        return [adapter, odds, guidance, new_tokens, temperature]

    def ask(self, turns: list[Turn], message: dict[str, Any], request: gr.Request, *controls: Any) -> Iterator[tuple]:
        """Answers a new question."""
        turn = Turn((message["text"] or "").strip(), list(message["files"]))
        yield from self._respond([*turns, turn], turns, message, controls, request)

    def ask_again(self, turns: list[Turn], request: gr.Request, *controls: Any) -> Iterator[tuple]:
        """Answers the last question again, with the current settings."""
        again = [*turns[:-1], replace(turns[-1], answer=None)] if turns else []
        yield from self._respond(again, turns, None, controls, request)

    def _respond(
        self, turns: list[Turn], before: list[Turn], message: Any, controls: tuple[Any, ...], request: gr.Request
    ) -> Iterator[tuple]:
        """
        Shows the answer to the last question word by word, and then its panels. After an error, the conversation is
        restored, so that the user can correct the message.
        """
        stop = self.stops[request.session_hash] = threading.Event()
        unchanged = gr.skip()
        try:
            check(bool(turns), "There is no question yet: type one first.")
            check(bool(turns[-1].question or turns[-1].images), "The message is empty: type a question.")
            messages = to_messages(turns)
            sent = unchanged if message is None else {"text": "", "files": []}
            yield to_bubbles(turns), unchanged, sent, "", unchanged, unchanged, unchanged
            words = _Words(self.chat, messages, as_settings(*controls), stop)
            for text in words:
                yield to_bubbles(turns, text), *[unchanged] * 6
            turns[-1].answer = words.answer()
            yield to_bubbles(turns), turns, unchanged, "", *panels_of(turns, len(turns) - 1)
        except Exception as error:
            if not isinstance(error, ValueError | OSError):  # a bug, or too little memory
                traceback.print_exc()
            line = problem(str(error) or type(error).__name__)
            back = unchanged if message is None else message
            yield to_bubbles(before), before, back, line, unchanged, unchanged, unchanged
        finally:
            stop.set()
            self.stops.pop(request.session_hash, None)

    def stop(self, request: gr.Request) -> None:
        """Stops generating the answer of this session. The text so far is kept."""
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()

    def clear(self) -> tuple:
        """Starts a new conversation."""
        return [], [], {"text": "", "files": []}, "", WAITING, WAITING, WAITING

    def show(self, turns: list[Turn], event: gr.SelectData) -> tuple:
        """Shows the panels of the answer that the user has clicked on."""
        return panels_of(turns, turn_of_bubble(turns, int(event.index)))


class _Words:
    """Generates an answer in a thread. Iterating over it yields the text so far."""

    def __init__(self, chat: ChatModel, messages: list[dict[str, Any]], settings: Settings, stop: threading.Event):
        self.pieces: queue.Queue[str | None] = queue.Queue()
        self.result: Answer | BaseException | None = None

        def run() -> None:
            try:
                self.result = chat.answer(messages, settings, self.pieces.put, stop)
            except BaseException as error:
                self.result = error
            finally:
                self.pieces.put(None)

        threading.Thread(target=run, daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        text = ""
        while (piece := self.pieces.get()) is not None:
            if piece:
                text += piece
                yield text

    def answer(self) -> Answer:
        """Returns the complete answer after the last word, or raises the error of the model."""
        assert self.result is not None
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def as_settings(adapter: str, log_odds: float, guidance: float, max_new_tokens: float, temperature: float) -> Settings:
    """Converts the values of the controls to settings. The control of the image odds is a power of two."""
    return Settings(adapter, 2.0**log_odds, float(guidance), int(max_new_tokens), float(temperature))


def panels_of(turns: list[Turn], number: int) -> tuple[str, str, str]:
    """Returns the panels of the answer of a turn."""
    answer = turns[number].answer if turns else None
    if answer is None:
        return WAITING, WAITING, WAITING
    return panels(answer, [read_image(path) for path in image_paths(turns[: number + 1])])


def serve(
    chat: ChatModel, name: str, host: str | None = None, port: int | None = None, share: bool = False, **options: Any
) -> tuple[Any, str, str | None]:
    """
    Starts the web page. It sends no data to third parties, and uses the fonts of the visitor's computer.

    Args:
        chat ([`~chat_model.ChatModel`]):
            The model.
        name (`str`):
            Name of the model, for the title.
        host (`str`, *optional*):
            Address to listen on; by default that of `GRADIO_SERVER_NAME`, or 127.0.0.1.
        port (`int`, *optional*):
            Port to listen on, 0 for a free port; by default that of `GRADIO_SERVER_PORT`, or the first free one from
            7860 on.
        share (`bool`, defaults to `False`):
            Whether to make the page public through gradio's servers, for a week.
        options:
            Further arguments for `gradio.Blocks.launch`.

    Returns:
        `tuple`: The return value of `gradio.Blocks.launch`, whose second element is the local address.
    """
    page = Page(chat, name).blocks.queue(default_concurrency_limit=1, api_open=False)
    return page.launch(
        server_name=host,
        server_port=_free_port(host) if port == 0 else port,
        share=share,
        theme=gr.themes.Default(primary_hue="orange", font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        max_file_size="20mb",
        show_error=True,
        **options,
    )


def _free_port(host: str | None) -> int:
    with socket.socket() as listener:
        listener.bind((host or "127.0.0.1", 0))
        return listener.getsockname()[1]
