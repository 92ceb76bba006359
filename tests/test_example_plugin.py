"""The example plugin, built and installed into an environment of its own, as a third party's would be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "rdkv-example-plugin"

USE = """
import json, torch, rdkv
from rdkv.runtime.registry import load_registry

entry = load_registry().scorers["value-norm"]
observation = rdkv.Observation(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 4, 9, 4), 0.5, 0)
scores = load_registry().scorer("value-norm", {"exponent": "2", "recent": "1"}).score(observation)
norm = observation.values.norm(dim=-1)
expected = (norm / norm.amax(-1, keepdim=True)) ** 2
torch.testing.assert_close(scores.token[..., :-1], expected[..., :-1])
print(json.dumps([entry.origin.distribution, entry.origin.version, entry.origin.module, entry.origin.file]))
"""

GENERATE = """
import torch, rdkv
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = rdkv.attach(LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None,
)).half().eval())
cache = rdkv.CompressedCache(model.config, rdkv.CompressionConfig(scorer="value-norm", budget=0.5))
prompt = torch.randint(1, 64, (1, 200))  # 0 is padding
text = model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)
assert text.shape == (1, 203)
assert 0 < cache.retention <= 0.5, cache.retention
print(cache.retention)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; its errors are the test's."""
    # The environment under test must see what is installed in it, not this process's path.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RDKV_PLUGINS", "COLUMNS")}
    environment["COLUMNS"] = "200"
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the example plugin."""
    folder = tmp_path_factory.mktemp("example")
    source = folder / "source"  # a copy: the build leaves files beside the sources
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder / "dist", source, cwd=folder)
    venv.create(folder / "venv", symlinks=os.name != "nt")
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # rdkv and torch are those of the running environment: addsitedir, so that editable installs count too.
    shared = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site_packages / "shared.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in shared))
    (wheel,) = (folder / "dist").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_is_found_by_name(python: Path, tmp_path: Path) -> None:
    found = run(python, "-c", USE, cwd=tmp_path)
    assert '"rdkv-example-plugin", "0.1.0", "rdkv_example_plugin.value_norm"' in found
    assert str(python.parents[1]) in found  # the installed copy, not the sources


def test_generates_by_name(python: Path, tmp_path: Path) -> None:
    assert 0 < float(run(python, "-c", GENERATE, cwd=tmp_path).split()[-1]) <= 0.5


def test_command_line_shows_it(python: Path, tmp_path: Path) -> None:
    assert re.search(r"value-norm.*rdkv-example-plugin 0\.1\.0", run(python, "-m", "rdkv", "plugins", cwd=tmp_path))
    shown = run(python, "-m", "rdkv", "plugins", "value-norm", cwd=tmp_path)
    for word in ("exponent", "1.0", "above 0", "how much a larger norm is worth", "recent"):
        assert word in shown


def test_is_not_installed_here() -> None:
    from rdkv.runtime.registry import load_registry

    assert "value-norm" not in load_registry().scorers


def test_own_tests_pass(python: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    assert "1 passed" in run(python, "-m", "pytest", "-p", "no:cacheprovider", "tests", cwd=tmp_path)


def test_imports_only_public_names() -> None:
    import rdkv

    for path in EXAMPLE.rglob("*.py"):
        text = path.read_text()
        assert "rdkv.runtime" not in text, path.name
        for names in re.findall(r"^from rdkv import (.+)$", text, re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= set(rdkv.__all__), path.name
