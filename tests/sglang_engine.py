"""One SGLang engine in a process of its own: reads a case as JSON, writes what came of it; `sglang_cases` runs it."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any


def main(case: dict[str, Any], result: Path) -> None:
    """Serve the case's prompts; ``abort`` says which requests to abort a little later."""
    import sglang
    import torch

    place = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    engine = sglang.Engine(
        device=place[0],
        dtype=place[1],
        sampling_backend="pytorch",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        mem_fraction_static=0.5,
        **case["engine"],
    )
    answers = engine.loop.run_until_complete(_serve(engine, case))
    (state,) = engine.get_server_info()["internal_states"]
    # A server that has lost slots dies as soon as it is idle.
    again = engine.generate(input_ids=case["prompts"][:1], sampling_params=_sampling(case["new"][0]))
    engine.shutdown()
    report = {"answers": answers, "state": state.get("rdkv"), "again": again[0]["output_ids"]}
    result.write_text(json.dumps(report))


async def _serve(engine: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    draw = random.Random(0)
    tasks = []
    for i, (prompt, new) in enumerate(zip(case["prompts"], case["new"], strict=True)):
        tasks.append(asyncio.create_task(_ask(engine, prompt, new, f"request-{i}")))
        if case.get("spread"):
            await asyncio.sleep(draw.random() * case["spread"])
        for j in case.get("abort", {}).get(str(i), []):
            engine.tokenizer_manager.abort_request(f"request-{j}")
    return list(await asyncio.gather(*tasks))


async def _ask(engine: Any, prompt: list[int], new: int, name: str) -> dict[str, Any]:
    out = await engine.async_generate(input_ids=prompt, sampling_params=_sampling(new), rid=name)
    info = out["meta_info"]
    return {
        "tokens": out["output_ids"],
        "finish": info["finish_reason"]["type"],
        "retractions": info.get("num_retractions", 0),
    }


def _sampling(new: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
