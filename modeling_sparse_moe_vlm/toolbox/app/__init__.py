"""A web page to try a model: a chat, with panels that show how an answer was made. `page` needs gradio."""

from .chat_model import ChatModel
from .settings import Settings

__all__ = [
    "ChatModel",
    "Settings",
]
