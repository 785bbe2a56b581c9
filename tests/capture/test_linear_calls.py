"""Linear layers are seen however a module applies its weight, with the gradients autograd itself finds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmix.capture import LinearCall, LinearCalls


class Recorder:
    """Keeps every call, and for every call the gradients of its output."""

    def __init__(self, gradients: bool = True) -> None:
        self.calls: list[LinearCall] = []
        self.gradients: list[list[Tensor]] = []
        self._wants_gradients = gradients

    def __call__(self, call: LinearCall) -> Callable[[Tensor], None] | None:
        self.calls.append(call)
        self.gradients.append([])
        return self.gradients[-1].append if self._wants_gradients else None

    @property
    def found(self) -> list[tuple[str, int | None]]:
        return [(call.name, call.expert) for call in self.calls]

    def weight_gradient(self, index: int) -> Tensor:
        """dL/dW (N, K) = sum over tokens of dL/dy xᵀ."""
        return self.gradients[index][0].T @ self.calls[index].x


def conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """What GPT-2's Conv1D does with a weight (K, N)."""
    flat = torch.addmm(torch.zeros(weight.shape[1]), x.view(-1, x.shape[-1]), weight)
    return flat.view(*x.shape[:-1], weight.shape[1])


PLAIN = {  # weight (5, 4) as (N, K)
    "F.linear": lambda x, w: F.linear(x, w),
    "F.linear, keywords": lambda x, w: F.linear(input=x, weight=w, bias=torch.ones(5)),
    "x @ w.T": lambda x, w: x @ w.T,
    "x.matmul(w.t())": lambda x, w: x.matmul(w.t()),
    "torch.matmul, keywords": lambda x, w: torch.matmul(input=x, other=w.transpose(0, 1)),
    "mm": lambda x, w: torch.mm(x.flatten(0, 1), w.t()).view(2, 3, 5),
    "x.mm": lambda x, w: x.flatten(0, 1).mm(w.t()).view(2, 3, 5),
    "Conv1D": lambda x, w: conv1d(x, w.t()),
    "a module": lambda x, w: module_with(w)(x),
}


def module_with(weight: Tensor) -> nn.Module:
    module = nn.Linear(4, 5, bias=False)
    module.weight = weight  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("apply", PLAIN.values(), ids=PLAIN.keys())
def test_a_weight_is_recognised(apply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Same result as without the mode, and grad^T x is the weight gradient that autograd accumulates."""
    weight, x = nn.Parameter(torch.randn(5, 4)), torch.randn(2, 3, 4)
    expected = apply(x, weight)
    factors = torch.randn(2, 3, 5)
    (expected * factors).sum().backward()
    weight.requires_grad_(False)
    recorder = Recorder()
    with LinearCalls({"w": weight}, recorder):
        y = apply(x, weight)
    (y * factors).sum().backward()
    assert recorder.found == [("w", None)]
    assert torch.equal(y, expected)
    assert torch.equal(recorder.calls[0].x, x.view(6, 4))
    assert not recorder.calls[0].x.requires_grad
    assert weight.grad is not None
    assert torch.equal(recorder.gradients[0][0], factors.view(6, 5))
    assert torch.allclose(
        recorder.weight_gradient(0), weight.grad, rtol=1e-5, atol=1e-6
    )  # other order of sums


EXPERTS = {  # weight (3, 4, 5) as (E, K, N), x (3, 2, 4)
    "index": lambda x, w: torch.stack([x[e] @ w[e] for e in range(3)]),
    "0-d tensor index": lambda x, w: torch.stack([torch.matmul(x[e], w[torch.tensor(e)]) for e in range(3)]),
    "F.linear": lambda x, w: torch.stack([F.linear(x[e], w[e].t()) for e in range(3)]),
    "F.linear of the transposed": lambda x, w: torch.stack(
        [F.linear(x[e], w.transpose(1, 2)[e]) for e in range(3)]
    ),
    "unbind": lambda x, w: torch.stack([x_e @ w_e for x_e, w_e in zip(x, w.unbind(), strict=True)]),
    "bmm": lambda x, w: torch.bmm(x, w),
    "bmm, keywords": lambda x, w: torch.bmm(input=x, mat2=w),
    "x.bmm": lambda x, w: x.bmm(w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "@": lambda x, w: x @ w,
}


@pytest.mark.parametrize("apply", EXPERTS.values(), ids=EXPERTS.keys())
def test_experts_are_told_apart(apply: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight, x = nn.Parameter(torch.randn(3, 4, 5)), torch.randn(3, 2, 4)
    expected = apply(x, weight)
    factors = torch.randn(3, 2, 5)
    (expected * factors).sum().backward()
    weight.requires_grad_(False)
    recorder = Recorder()
    with LinearCalls({"w": weight}, recorder):
        y = apply(x, weight)
    (y * factors).sum().backward()
    assert recorder.found == [("w", 0), ("w", 1), ("w", 2)]
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)  # a batched product sums in another order
    assert weight.grad is not None
    for e in range(3):
        assert torch.equal(recorder.calls[e].x, x[e])
        assert torch.allclose(recorder.weight_gradient(e).T, weight.grad[e], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4), (1, 2, 4), (6, 3, 2, 4), (6, 1, 2, 4)])
def test_inputs_that_are_broadcast_over_experts(shape: tuple[int, ...]) -> None:
    weight, x = nn.Parameter(torch.randn(3, 4, 5), requires_grad=False), torch.randn(shape)
    recorder = Recorder()
    with LinearCalls({"w": weight}, recorder):
        y = torch.matmul(x, weight)
    assert recorder.found == [("w", 0), ("w", 1), ("w", 2)]
    assert torch.allclose(y, torch.matmul(x, weight), rtol=1e-5, atol=1e-6)


def test_experts_that_start_in_the_middle_of_a_storage() -> None:
    """Parameters of a model loaded from one buffer have a storage offset of their own."""
    buffer = torch.randn(1000)
    weight = nn.Parameter(buffer[27:87].view(3, 4, 5), requires_grad=False)
    recorder = Recorder()
    with LinearCalls({"w": weight}, recorder):
        torch.randn(2, 4) @ weight[2]
    assert recorder.found == [("w", 2)]


def test_other_operands_are_not_reported() -> None:
    weight, other = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 4))
    recorder = Recorder()
    with LinearCalls({"w": weight}, recorder):
        F.linear(torch.randn(2, 4), other)
        F.linear(torch.randn(2, 4), weight.clone())
        F.linear(torch.randn(2, 4), weight[:3])
        torch.matmul(weight, torch.randn(4, 2))  # the weight is the left operand
        torch.randn(3, 2, 4) @ torch.randn(3, 4, 5)
    assert recorder.calls == []


def test_layers_in_a_chain_get_the_gradient_of_their_own_output() -> None:
    """Two layers and a nonlinearity, parameters frozen, input without gradient: like an LM after its embedding."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(7, 4)
    model(x).square().sum().backward()
    expected = [model[0].weight.grad, model[2].weight.grad]
    model.zero_grad()
    model.requires_grad_(False)
    recorder = Recorder()
    with LinearCalls({"a": model[0].weight, "b": model[2].weight}, recorder):
        y = model(x)
    y.square().sum().backward()
    assert recorder.found == [("a", None), ("b", None)]
    for index, gradient in enumerate(expected):
        assert torch.allclose(recorder.weight_gradient(index), gradient, rtol=1e-5, atol=1e-6)


def test_every_backward_pass_calls_again() -> None:
    weight, recorder = nn.Parameter(torch.randn(5, 4), requires_grad=False), Recorder()
    with LinearCalls({"w": weight}, recorder):
        y = F.linear(torch.randn(2, 4), weight)
    y.sum().backward(retain_graph=True)
    (2 * y).sum().backward()
    assert [gradient.unique().tolist() for gradient in recorder.gradients[0]] == [[1.0], [2.0]]


def test_without_gradients_nothing_is_hooked() -> None:
    weight, x = nn.Parameter(torch.randn(5, 4), requires_grad=False), torch.randn(2, 4)
    with LinearCalls({"w": weight}, Recorder(gradients=False)):
        assert not F.linear(x, weight).requires_grad
    recorder = Recorder()
    with LinearCalls({"w": weight}, recorder), torch.no_grad():
        assert not F.linear(x, weight).requires_grad
    assert recorder.found == [("w", None)]


def test_nothing_is_left_behind() -> None:
    """No hook, no gradient, no flag; and after the block, or an error in it, calls are seen no more."""
    model, x = nn.Linear(4, 5).requires_grad_(False), torch.randn(2, 4)
    before = {key: value for key, value in vars(model).items() if not key.startswith("_parameters")}
    recorder = Recorder()
    with LinearCalls({"w": model.weight}, recorder):
        model(x).sum().backward()
    with pytest.raises(ZeroDivisionError), LinearCalls({"w": model.weight}, recorder):
        raise ZeroDivisionError
    assert {key: value for key, value in vars(model).items() if not key.startswith("_parameters")} == before
    assert model.weight.grad is None
    assert not model.weight.requires_grad
    assert not x.requires_grad
    assert x.grad is None
    model(x)
    assert len(recorder.calls) == 1


def test_the_source_tells_who_shares_an_input() -> None:
    first, second = (nn.Parameter(torch.randn(5, 4), requires_grad=False) for _ in range(2))
    x, recorder = torch.randn(2, 4), Recorder()
    with LinearCalls({"a": first, "b": second}, recorder):
        F.linear(x, first)
        F.linear(x, second)
        F.linear(x.clone(), second)
    assert [call.source is x for call in recorder.calls] == [True, True, False]
