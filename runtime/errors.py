"""Errors of rdkv. Every message names the culprit and, where there is one, the remedy."""


class RdkvError(Exception):
    """Base of every error that rdkv raises on purpose; the command line prints it as one line."""


class ConfigError(RdkvError, ValueError):
    """A setting is out of range, unknown or contradicts another."""


class PluginError(RdkvError):
    """A plugin could not be loaded, clashes with another, or broke the contract of its interface."""


class UnsupportedModelError(RdkvError):
    """The model, or the way it is asked to generate, cannot work with a compressed cache."""


class BudgetError(RdkvError, ValueError):
    """No plan of the chosen allocator fits the byte budget."""


class ModelLoadError(RdkvError):
    """A model or tokenizer could not be read."""


class CacheFileError(RdkvError):
    """A saved cache could not be read or written, or belongs to another model."""
