"""Why a model cannot be upcycled."""


class UpcyclingError(ValueError):
    """A model, or what was asked for it, cannot be upcycled; the message says why and what to do."""
