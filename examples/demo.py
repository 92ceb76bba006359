"""A question about a long text, answered with the full cache and with 5% of its bytes.

Run by ``make demo``. The text is made of the Python language reference, which every Python carries,
with one sentence in its middle that the question is about.
"""

from __future__ import annotations

import time

from rdkv.runtime.calibration import python_reference
from rdkv.runtime.cli_generate import summary
from rdkv.runtime.generation import GenerationRequest, run_generation
from rdkv.runtime.loading import load_model
from rdkv.runtime.quiet import log_to_stderr, silence_libraries

from rdkv import CompressionConfig

TOKENS = 3000
NEEDLE = "The pass key to the archive is 58213. Remember it: 58213 is the pass key to the archive."
QUESTION = "What is the pass key to the archive?"


def long_text(tokenizer, tokens):
    """The reference's first ``tokens`` tokens, the needle between two paragraphs in their middle."""
    ids = tokenizer(python_reference(), verbose=False).input_ids[:tokens]
    text = tokenizer.decode(ids)
    middle = text.index("\n\n", len(text) // 2)
    return f"{text[:middle]}\n\n{NEEDLE}{text[middle:]}"


def main():
    silence_libraries()
    log_to_stderr()
    begin = time.perf_counter()
    loaded = load_model("smollm2-135m")
    text = long_text(loaded.tokenizer, TOKENS - 120)  # room for the needle, the question and the chat template
    request = GenerationRequest(prompt=text, question=QUESTION, chat=True, max_new_tokens=20)
    compression = CompressionConfig(scorer="attention-distortion", allocator="waterfill", budget=0.05)
    print(f"{text[:60]!r} ... {NEEDLE!r} ...\nQuestion: {QUESTION}", flush=True)
    for name, config in (("full cache", None), ("5% of its bytes", compression)):
        report = run_generation(loaded, request, config)
        print(f"\n{name}: {report.text.strip()}")
        print("\n".join(f"  {line}" for line in summary(report)), flush=True)
    print(f"\n{time.perf_counter() - begin:.0f} seconds in all")


if __name__ == "__main__":
    main()
