"""The supported releases of Transformers. Imported first, so that other releases fail with a clear error."""

import transformers

SUPPORTED_TRANSFORMERS = ">=5.20,<6"
TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

if not (5, 20) <= TRANSFORMERS_VERSION < (6, 0):
    raise ImportError(
        f"sparse_moe_vlm supports transformers{SUPPORTED_TRANSFORMERS}, but transformers {transformers.__version__} is "
        f"installed. Install a supported release: pip install 'transformers{SUPPORTED_TRANSFORMERS}'."
    )
