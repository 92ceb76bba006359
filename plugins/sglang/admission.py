"""What running requests will take of SGLang's pool and give back to it, where prompts are packed."""

from __future__ import annotations

from typing import Any

from .ledger import Ledger


def coming(adder: Any, ledger: Ledger) -> list[tuple[float, int]]:
    """For each running request, the tokens that it may still make and those that its end frees, the soonest first.

    SGLang's own list, for requests that ignore the end-of-sequence token, would count a packed prompt as slots that
    will be free one day, and admit too many requests.
    """
    running = [] if adder.running_batch is None else adder.running_batch.reqs
    states = []
    for request in (*running, *adder.can_run_list):
        ratio = 1.0 if request.sampling_params.ignore_eos else adder.new_token_ratio
        made = len(request.output_ids)
        left = request.sampling_params.max_new_tokens * ratio - made
        kept = 0 if ledger.region(request.rid) is not None else len(request.origin_input_ids)
        if left > 0:
            states.append((left, kept + made))
    return sorted(states)
