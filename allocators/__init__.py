"""Built-in allocators, as a plugin."""

from collections.abc import Mapping

from ..runtime.hookspecs import hookimpl
from ..runtime.interfaces import Allocator
from .eviction import Eviction
from .quantization import Quantization
from .waterfill import Waterfill


@hookimpl
def rdkv_allocators() -> Mapping[str, type[Allocator]]:
    """Allocators by name."""
    return {"waterfill": Waterfill, "eviction": Eviction, "quantization": Quantization}
