"""A web page to try a model: a chat, with panels that show how the model generated an answer. `page` needs gradio."""

from .chat_model import ChatModel
from .settings import Settings

__all__ = [
    "ChatModel",
    "Settings",
]
