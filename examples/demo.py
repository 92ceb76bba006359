"""A question about a long text, answered with the full cache and with 5% of its bytes.

Run by ``make demo``. The text is made of the Python language reference, which every Python carries,
with one sentence in its middle that the question is about.
"""

from __future__ import annotations

import time
from typing import Any

TOKENS = 2900  # of the reference; needle, question and chat template come on top
# Words that the full cache itself is sure of: where it hesitates, rounding decides what a smaller one answers.
NEEDLE = "The secret number of the lighthouse is 58213."
QUESTION = "What is the secret number of the lighthouse?"


def long_text(tokenizer: Any) -> str:
    """The beginning of the reference, with the needle between two paragraphs in its middle."""
    from rdkv.runtime.calibration import python_reference

    ids = tokenizer(python_reference(), verbose=False).input_ids[:TOKENS]
    text = tokenizer.decode(ids)
    middle = text.index("\n\n", len(text) // 2)
    return f"{text[:middle]}\n\n{NEEDLE}{text[middle:]}"


def main() -> None:
    """Load, ask twice, print."""
    begin = time.perf_counter()
    from rdkv.runtime.quiet import log_to_stderr, silence_libraries

    silence_libraries()  # before the libraries are imported, which is why the imports are here
    log_to_stderr()
    from rdkv import CompressionConfig
    from rdkv.runtime.cli_generate import summary
    from rdkv.runtime.generation import GenerationRequest, run_generation
    from rdkv.runtime.loading import load_model

    loaded = load_model("smollm2-135m")
    text = long_text(loaded.tokenizer)
    request = GenerationRequest(prompt=text, question=QUESTION, chat=True, max_new_tokens=14)
    compression = CompressionConfig(scorer="attention-distortion", allocator="waterfill", budget=0.05)
    print(f"Text:     {len(text):,} characters of the Python language reference, with '{NEEDLE}' in the middle")
    print(f"Question: {QUESTION}", flush=True)
    for name, config in (("Full cache", None), ("5% of its bytes", compression)):
        report = run_generation(loaded, request, config)
        print(f"\n{name}: {report.text.strip()}")
        print("\n".join(f"  {line}" for line in summary(report)), flush=True)
    print(f"\n{time.perf_counter() - begin:.0f} seconds in all")


if __name__ == "__main__":
    main()
