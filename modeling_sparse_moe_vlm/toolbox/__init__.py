"""Tools for working with the models. Checkpoints contain no code from this package."""

from . import former_names as former_names
