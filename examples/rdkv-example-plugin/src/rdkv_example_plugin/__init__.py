"""The plugin: rdkv imports this module, found through the entry point, and calls its hooks."""

from collections.abc import Mapping

from rdkv import Scorer, hookimpl

from .value_norm import ValueNorm


@hookimpl
def rdkv_scorers() -> Mapping[str, type[Scorer]]:
    """Scorers by name."""
    return {"value-norm": ValueNorm}
