"""Hessians are (2 / T) sum x xᵀ, shared by layers that get the same tensor and by no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchmix.capture import HessianAccumulator, LinearCall


def call(name: str, x: Tensor, expert: int | None = None, source: Tensor | None = None) -> LinearCall:
    return LinearCall(name, expert, x if source is None else source, x.reshape(-1, x.shape[-1]))


def expected(*batches: Tensor) -> Tensor:
    """float64 (K, K) over all tokens of all batches."""
    x = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches]).double()
    return 2 / len(x) * x.T @ x


def close(found: Tensor, wanted: Tensor) -> bool:
    """float32 sums of a few dozen products."""
    scale = wanted.diagonal().max()
    return bool(((found.double() - wanted).abs() <= 2.0**-18 * scale).all())


def test_running_mean_over_batches() -> None:
    batches = [torch.randn(2, 5, 6), torch.randn(1, 3, 6), torch.randn(4, 6)]
    accumulator = HessianAccumulator()
    for batch in batches:
        accumulator.add(call("a", batch))
    hessian = accumulator.hessians()["a"]
    assert hessian.dtype == torch.float32
    assert close(hessian, expected(*batches))
    assert accumulator.tokens == {"a": 17}
    assert accumulator.keys == {("a", None): "a"}


def test_the_same_tensor_means_the_same_hessian() -> None:
    accumulator, batches = HessianAccumulator(), [torch.randn(5, 6) for _ in range(3)]
    for x in batches:
        for name in ("q", "k", "v"):
            accumulator.add(call(name, x))
        accumulator.add(call("o", torch.randn(5, 6)))
        accumulator.forget_last()
    assert accumulator.keys == {("q", None): "q", ("k", None): "q", ("v", None): "q", ("o", None): "o"}
    hessians = accumulator.hessians()
    assert set(hessians) == {"q", "o"}
    assert close(hessians["q"], expected(*batches))
    assert accumulator.tokens == {"q": 15, "o": 15}


def test_equal_values_in_another_tensor_are_not_shared() -> None:
    accumulator, x = HessianAccumulator(), torch.randn(5, 6)
    accumulator.add(call("a", x))
    accumulator.add(call("b", x.clone()))
    assert accumulator.keys == {("a", None): "a", ("b", None): "b"}


@pytest.mark.parametrize("leaves", ["a", "b"])  # the layer that came first, or the other
@pytest.mark.parametrize("goes_first", [False, True])
def test_layers_that_part_keep_what_they_saw_together(leaves: str, goes_first: bool) -> None:
    both, one, other, end = (torch.randn(5, 6) for _ in range(4))
    stays = "b" if leaves == "a" else "a"
    accumulator = HessianAccumulator()
    for name in ("a", "b"):
        accumulator.add(call(name, both))
    parting = [call(leaves, one), call(stays, other)]
    for one_call in parting if goes_first else parting[::-1]:
        accumulator.add(one_call)
    for name in ("a", "b"):
        accumulator.add(call(name, end))
    assert accumulator.keys["a", None] != accumulator.keys["b", None]
    hessians = accumulator.hessians()
    assert close(hessians[accumulator.keys[leaves, None]], expected(both, one, end))
    assert close(hessians[accumulator.keys[stays, None]], expected(both, other, end))


def test_three_layers_of_which_two_stay_together() -> None:
    both, two, one = (torch.randn(5, 6) for _ in range(3))
    accumulator = HessianAccumulator()
    for name in ("a", "b", "c"):
        accumulator.add(call(name, both))
    accumulator.add(call("a", one))
    accumulator.add(call("b", two))
    accumulator.add(call("c", two))
    hessians, keys = accumulator.hessians(), accumulator.keys
    assert keys["b", None] == keys["c", None]
    assert close(hessians[keys["a", None]], expected(both, one))
    assert close(hessians[keys["b", None]], expected(both, two))


def test_a_layer_that_misses_an_input_does_not_get_it() -> None:
    """Called in the first and third of three samples only."""
    samples = [torch.randn(5, 6) for _ in range(3)]
    accumulator = HessianAccumulator()
    for index, x in enumerate(samples):
        accumulator.add(call("a", x))
        if index != 1:
            accumulator.add(call("b", x))
        accumulator.forget_last()
    hessians = accumulator.hessians()
    assert close(hessians[accumulator.keys["a", None]], expected(*samples))
    assert close(hessians[accumulator.keys["b", None]], expected(samples[0], samples[2]))


def test_a_layer_that_comes_later_does_not_get_what_was_before() -> None:
    first, second = torch.randn(5, 6), torch.randn(5, 6)
    accumulator = HessianAccumulator()
    accumulator.add(call("a", first))
    accumulator.add(call("a", second))
    accumulator.add(call("b", second))
    hessians = accumulator.hessians()
    assert close(hessians["a"], expected(first, second))
    assert close(hessians["b"], expected(second))


def test_a_layer_called_twice_with_one_tensor_counts_it_twice() -> None:
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    accumulator = HessianAccumulator()
    for name, tensor in (("a", x), ("b", x), ("a", x), ("a", y), ("b", y)):
        accumulator.add(call(name, tensor))
    hessians, keys = accumulator.hessians(), accumulator.keys
    assert close(hessians[keys["a", None]], expected(x, x, y))
    assert close(hessians[keys["b", None]], expected(x, y))
    assert accumulator.tokens == {keys["a", None]: 15, keys["b", None]: 10}


def test_experts_have_their_own() -> None:
    accumulator, xs = HessianAccumulator(), [torch.randn(4, 6), torch.randn(2, 6)]
    for expert, x in enumerate(xs):
        accumulator.add(call("gate", x, expert))
        accumulator.add(call("up", x, expert))
    assert accumulator.keys == {
        ("gate", 0): "gate[0]",
        ("up", 0): "gate[0]",
        ("gate", 1): "gate[1]",
        ("up", 1): "gate[1]",
    }
    for expert, x in enumerate(xs):
        assert close(accumulator.hessians()[f"gate[{expert}]"], expected(x))


def test_no_tokens_give_a_zero_hessian() -> None:
    accumulator = HessianAccumulator()
    accumulator.add(call("a", torch.empty(0, 6)))
    assert torch.equal(accumulator.hessians()["a"], torch.zeros(6, 6))
    assert accumulator.tokens == {"a": 0}


def test_short_floats_are_summed_in_float32() -> None:
    accumulator, x = HessianAccumulator(), torch.randn(300, 6).bfloat16()
    for chunk in x.split(3):
        accumulator.add(call("a", chunk))
    assert close(accumulator.hessians()["a"], expected(x))
