"""rdkv: rate-distortion compression of the KV cache (arXiv 2605.08317).

The names below are the public API; each is imported when first used, so that ``import rdkv`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.attention import attach as attach
    from .runtime.attention import detach as detach
    from .runtime.cache import CompressedCache as CompressedCache
    from .runtime.config import CompressionConfig as CompressionConfig
    from .runtime.engine.answer import Completion as Completion
    from .runtime.engine.answer import Piece as Piece
    from .runtime.engine.engine import CompressedPrompt as CompressedPrompt
    from .runtime.engine.engine import Engine as Engine
    from .runtime.engine.sampling import Sampling as Sampling
    from .runtime.errors import BudgetError as BudgetError
    from .runtime.errors import CacheFileError as CacheFileError
    from .runtime.errors import ConfigError as ConfigError
    from .runtime.errors import PluginError as PluginError
    from .runtime.errors import RdkvError as RdkvError
    from .runtime.errors import UnsupportedModelError as UnsupportedModelError
    from .runtime.hookspecs import hookimpl as hookimpl
    from .runtime.interfaces import Allocator as Allocator
    from .runtime.interfaces import CacheFormat as CacheFormat
    from .runtime.interfaces import PackedSegment as PackedSegment
    from .runtime.interfaces import PluginOptions as PluginOptions
    from .runtime.interfaces import Scorer as Scorer
    from .runtime.ladder import Distortion as Distortion
    from .runtime.ladder import Ladder as Ladder
    from .runtime.observation import Observation as Observation
    from .runtime.plan import BitPlan as BitPlan
    from .runtime.plan import Budget as Budget
    from .runtime.plan import Scores as Scores
    from .runtime.recording import Recording as Recording
    from .runtime.store import load as load
    from .runtime.store import save as save

__version__ = "0.1.0"

_HOME = {
    "attach": "attention",
    "detach": "attention",
    "CompressedCache": "cache",
    "CompressionConfig": "config",
    "Completion": "engine.answer",
    "Piece": "engine.answer",
    "CompressedPrompt": "engine.engine",
    "Engine": "engine.engine",
    "Sampling": "engine.sampling",
    "BudgetError": "errors",
    "CacheFileError": "errors",
    "ConfigError": "errors",
    "PluginError": "errors",
    "RdkvError": "errors",
    "UnsupportedModelError": "errors",
    "hookimpl": "hookspecs",
    "Allocator": "interfaces",
    "CacheFormat": "interfaces",
    "PackedSegment": "interfaces",
    "PluginOptions": "interfaces",
    "Scorer": "interfaces",
    "Distortion": "ladder",
    "Ladder": "ladder",
    "Observation": "observation",
    "BitPlan": "plan",
    "Budget": "plan",
    "Scores": "plan",
    "Recording": "recording",
    "load": "store",
    "save": "store",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rdkv' has no attribute {name!r}")
    return getattr(import_module(f".runtime.{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
