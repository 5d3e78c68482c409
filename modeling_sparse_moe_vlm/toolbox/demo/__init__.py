"""Built-in data: images of single emoji, images of scenes of emoji, and questions about both."""

from .conversations import conversations
from .emoji import emoji_questions, load_emoji
from .pairs import scene_pairs
from .scenes import load_scenes, scenes, to_messages
from .tokenizer import train_tokenizer

__all__ = [
    "conversations",
    "emoji_questions",
    "load_emoji",
    "load_scenes",
    "scene_pairs",
    "scenes",
    "to_messages",
    "train_tokenizer",
]
