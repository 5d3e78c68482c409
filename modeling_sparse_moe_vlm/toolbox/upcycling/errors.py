"""Why a model cannot be upcycled."""


class UpcyclingError(ValueError):
    """Raised if a model cannot be upcycled as requested. The message says why, and what to do."""
