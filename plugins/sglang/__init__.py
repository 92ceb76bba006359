"""SGLang with compressed prompts: an SGLang plugin (entry-point group ``sglang.srt.plugins``), see docs/serving.md."""

from .hooks import activate as activate
