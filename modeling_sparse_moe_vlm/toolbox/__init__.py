"""Tools around the models: nothing here travels with a checkpoint."""

from . import former_names as former_names
