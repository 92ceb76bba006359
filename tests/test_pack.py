"""The Triton packers against plain PyTorch, bit for bit: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from waits import Waits

from rdkv.kernels import naive_pack
from rdkv.kernels.packed import NotFiniteError, Packed

pytest.importorskip("triton")
from rdkv.kernels import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUE_WIDTHS = (0, 2, 4, 8, 16)
KEY_WIDTHS = (0, 2, 4, 6, 8, 16)
# The interpreter takes seconds for a case; on a GPU all of these take no longer than compiling the kernels.
quick = settings(
    max_examples=200 if DEVICE == "cuda" else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Case:
    """What `pack` takes. Dropped tokens are NaN: nothing of them may be read."""

    keys: Tensor
    values: Tensor
    value_bits: Tensor
    key_bits: Tensor
    pinned: Tensor

    def arguments(self, device: str = "cpu") -> tuple[Tensor, ...]:
        return tuple(t.to(device) for t in (self.keys, self.values, self.value_bits, self.key_bits, self.pinned))


def make_case(
    value_bits: Tensor,
    key_bits: Tensor,
    pinned: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    strided: bool = False,
) -> Case:
    """Channels off centre and of different spread, some constant; ``strided``: as a model's projection lies."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens = value_bits.shape
    dim = key_bits.shape[2]
    data = torch.randn(2, batch, tokens, heads, dim, generator=generator).transpose(2, 3)
    offset, spread = torch.randn(2, 2, 1, 1, 1, dim, generator=generator)
    data = data * spread.exp() + 10 * offset
    data[..., ::5] = data[:, :, :, :1, ::5]
    pinned = torch.zeros(value_bits.shape, dtype=torch.bool) if pinned is None else pinned
    dropped = ~pinned & (value_bits == 0)
    keys, values = data.masked_fill(dropped.unsqueeze(3), float("nan")).to(dtype)
    if not strided:
        keys, values = keys.contiguous(), values.contiguous()
    return Case(keys, values, value_bits.byte(), key_bits.byte().contiguous(), pinned)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any of the widths, or one for all; heads without tokens; heads that quantise nothing; chunks and tiles."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 600 if DEVICE == "cuda" else 100))
    dim = draw(st.sampled_from([1, 5, 16, 33, 64, 80, 128, 256]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)

    def widths(known: tuple[int, ...], count: int) -> Tensor:
        allowed = draw(st.lists(st.sampled_from(known), min_size=1, max_size=5, unique=True))
        return torch.tensor(allowed)[torch.randint(len(allowed), (batch, heads, count), generator=generator)]

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))

    value_bits, key_bits, whole = widths(VALUE_WIDTHS, tokens), widths(KEY_WIDTHS, dim), some(batch, heads, 1)
    key_bits = key_bits.masked_fill(whole, 16)
    value_bits = value_bits.masked_fill(whole & some(batch, heads, 1) & (value_bits > 0), 16)
    value_bits = value_bits.masked_fill(some(batch, heads, 1), 0)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    return make_case(value_bits, key_bits, some(batch, heads, tokens), dtype, seed, draw(st.booleans()))


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs of each kernel, with several tiles, for few tokens."""
    if DEVICE == "cpu":
        monkeypatch.setattr(pack, "SPAN", 32)
        monkeypatch.setattr(pack, "CHUNK", 32)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def same(actual: Packed, expected: Packed) -> None:
    for name in ("batch", "heads", "dim", "host_counts", "raw"):
        assert getattr(actual, name) == getattr(expected, name), name
    names = [name for name, value in vars(expected).items() if isinstance(value, Tensor)]
    assert len(names) == len(list(expected.tensors())) == 9
    for name in names:
        a, e = getattr(actual, name).cpu(), getattr(expected, name)
        assert a.dtype == e.dtype, name
        assert a.shape == e.shape, name
        assert a.is_contiguous(), name
        assert torch.equal(a, e), name


def uniform(batch: int, heads: int, tokens: int, dim: int, value: int, key: int) -> Case:
    return make_case(torch.full((batch, heads, tokens), value), torch.full((batch, heads, dim), key))


@quick
@given(cases())
@example(uniform(1, 1, 1, 64, 2, 2))
@example(uniform(1, 2, 70, 64, 4, 8))
@example(uniform(1, 2, 70, 80, 4, 6))
@example(uniform(1, 2, 20, 128, 16, 16))
@example(uniform(1, 2, 20, 80, 16, 0))
@example(uniform(1, 2, 20, 80, 0, 4))
@example(uniform(1, 1, 33, 256, 8, 16))
@example(uniform(1, 2, 70, 64, 16, 8))
@example(make_case(torch.tensor([[[2, 4, 8, 16, 0, 4, 16], [0] * 7]]), torch.tensor(KEY_WIDTHS).repeat(1, 2, 7)))
def test_packs_as_plain_pytorch(case: Case) -> None:
    same(pack.pack(*case.arguments(DEVICE)), naive_pack.pack(*case.arguments()))


@quick
@given(st.integers(0, 2**31), st.sampled_from([(2, 2), (4, 4), (4, 6), (8, 8), (16, 8), (8, 16)]))
def test_affine_rounds_as_plain_pytorch(seed: int, widths: tuple[int, int]) -> None:
    """Tiny, huge and constant ranges, where float16 is subnormal or coarse."""
    case = uniform(1, 1, 64, 64, *widths)
    generator = torch.Generator().manual_seed(seed)
    gain = 10.0 ** torch.randint(-9, 4, (1, 1, 64, 1), generator=generator)
    data = torch.randn(1, 1, 64, 64, generator=generator) * gain
    plan = (case.value_bits, case.key_bits, case.pinned)
    for keys, values in ((data, data), (data.transpose(2, 3), data)):
        keys, values = keys.contiguous(), values.contiguous()
        actual = pack.pack(*(t.to(DEVICE) for t in (keys, values, *plan)))
        same(actual, naive_pack.pack(keys, values, *plan))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter computes with NumPy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e10, -1e10])
@pytest.mark.parametrize(
    ("what", "width"), [*(("keys", width) for width in KEY_WIDTHS), *(("values", width) for width in VALUE_WIDTHS[1:])]
)
def test_what_is_not_finite_is_named(bad: float, what: str, width: int) -> None:
    case = uniform(1, 2, 40, 32, *((4, width) if what == "keys" else (width, 4)))
    getattr(case, what)[0, 1, 17, 3] = bad
    for packer, device in ((naive_pack.pack, "cpu"), (pack.pack, DEVICE)):
        with pytest.raises(NotFiniteError, match=f"{what} are not finite"):
            packer(*case.arguments(device))


def test_begins_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [uniform(1, 2, 40, 32, 4, 8), uniform(1, 2, 70, 32, 8, 2)]
    waits = Waits(monkeypatch, "rdkv.kernels.pack")
    for kernel in ("_measure", "_write"):
        monkeypatch.setattr(pack, kernel, waits.unseen(getattr(pack, kernel)))
    begun = [pack.begin(*case.arguments(DEVICE)) for case in cases]
    assert not waits.seen
    packed = [part.finish() for part in begun]
    assert waits.seen == ["readback", "readback"]
    monkeypatch.undo()
    for case, actual in zip(cases, packed, strict=True):
        same(actual, naive_pack.pack(*case.arguments()))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_gpu_is_not_waited_for() -> None:
    case = uniform(1, 2, 70, 64, 4, 8)
    arguments = case.arguments(DEVICE)
    pack.pack(*arguments)  # compiles, and makes pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        begun, after = pack.begin(*arguments), torch.cuda.Event()
        after.record()
        assert not after.query()
        torch.cuda._sleep(2_000_000_000)
        after.record()
        packed = begun.finish()
        assert not after.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(packed, naive_pack.pack(*case.arguments()))


@pytest.mark.parametrize("width", [4, 16])
def test_what_is_stored_as_it_is_may_be_anything(width: int) -> None:
    """Pinned tokens, and all where every width is 16."""
    case = uniform(1, 1, 40, 32, width, width)
    held = torch.zeros(1, 1, 40, dtype=torch.bool) if width == 16 else torch.arange(40).reshape(1, 1, 40) < 5
    case = dataclasses.replace(case, pinned=held)
    case.values[0, 0, 4], case.keys[0, 0, 3] = -float("inf"), float("inf")
    same(pack.pack(*case.arguments(DEVICE)), naive_pack.pack(*case.arguments()))
