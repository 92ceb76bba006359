"""What --rdkv-config takes."""

from __future__ import annotations

import pytest

from rdkv.plugins.sglang.options import parse
from rdkv.runtime.errors import ConfigError


def test_fields_side_by_side() -> None:
    config = parse('{"budget": 0.05, "arena": 0.3, "scorer_options": {"window": 16}, "min_tokens": 9}')
    assert (config.compression.budget, config.compression.scorer_options) == (0.05, {"window": 16})
    assert (config.options.arena, config.options.min_tokens, config.options.prefill) == (0.3, 9, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--attention-backend rdkv needs --rdkv-config, such as"),
        ("", "needs --rdkv-config"),
        ("0.05", "--rdkv-config is not a JSON object"),
        ("{budget: 1}", "--rdkv-config is not a JSON object"),
        ("{}", "no budget"),
        ('{"budget": 2}', "budget is 2"),
        ('{"budget": 0.1, "arena": 1.5}', r"--rdkv-config: .* `\$.arena`"),
        ('{"budget": 0.1, "buget": 1}', "unknown field `buget`"),
    ],
)
def test_refused(text: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)
