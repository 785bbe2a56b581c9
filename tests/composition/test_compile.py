"""``torch.compile(fullgraph=True)`` on quantized layers: how many graphs, and the same numbers as without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from tests.composition.mixed_models import (
    AdapterModel,
    GraphCounter,
    ReluBlock,
    expert_weight,
    quantize_linears,
    quantized,
)
from torchmix.tensor import MixedPrecisionTensor

F = nn.functional
TOKENS = (5, 3, 17, 64, 2)


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_zero_recompiles_over_tokens(
    mode: Callable[[], AbstractContextManager[None]], dynamic: bool | None, graphs: int
) -> None:
    """Left alone, PyTorch compiles for the first M, then for any M; one token is a graph of its own."""
    model, counter = quantize_linears(ReluBlock()), GraphCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    with mode():
        for tokens in TOKENS:
            x = torch.randn(tokens, 128)
            assert torch.equal(compiled(x), model(x))
        assert counter.count == graphs
        compiled(torch.randn(1, 128))
        assert counter.count == graphs + 1


def test_zero_recompiles_over_batch_and_tokens() -> None:
    model, counter = quantize_linears(ReluBlock()), GraphCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for shape in ((2, 5, 128), (3, 4, 128), (7, 2, 128)):
            x = torch.randn(shape)
            assert torch.equal(compiled(x), model(x))
    assert counter.count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = quantize_linears(ReluBlock().to(dtype))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 128, dtype=dtype)
    y = compiled(x)
    assert y.dtype == dtype
    assert torch.equal(y, model(x))


def test_inductor_gives_the_same_bits() -> None:
    """The block has only exact operations besides the op itself, so nothing may differ."""
    model, counter = quantize_linears(ReluBlock()), GraphCounter("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, 128)
            assert torch.equal(compiled(x), model(x))
    assert counter.count == 1


def gradients(model: nn.Module, ids: Tensor, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    y = forward(ids)
    weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
    return list(torch.autograd.grad(y, trained, weights))


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [("aot_eager", 0.0), pytest.param("inductor", 1e-5, marks=pytest.mark.slow)],  # inductor reorders sums
)
def test_gradients_flow_through_the_frozen_layer(backend: str, tolerance: float) -> None:
    """Embedding and adapters before and after it are trained."""
    model, counter = AdapterModel(), GraphCounter(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for tokens in TOKENS:
        ids = torch.randint(0, 32, (tokens,))
        expected, found = gradients(model, ids, model), gradients(model, ids, compiled)
        assert len(expected) == 6  # embedding, four adapter matrices and the bias of the quantized layer
        for reference, gradient in zip(expected, found, strict=True):
            assert reference.abs().max() > 0
            torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance)
    assert counter.count == 1


MATRIX_FUNCTIONS = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w.t(),
    "matmul_batch": lambda x, w: x[None] @ w.mT,
    "addmm": lambda x, w: torch.addmm(torch.ones(24), x, w.T),
    "left_operand": lambda x, w: (w @ x.t()).t(),
    "rows": lambda x, w: F.linear(x, w[4:12]),
    "chunk": lambda x, w: F.linear(x, w.chunk(2)[1]),
    "index": lambda x, w: F.linear(x, w[torch.tensor([5, 1, 1])]),
    "cat": lambda x, w: F.linear(x, torch.cat([w, w])),
    "dequantize": lambda x, w: x @ w.dequantize().t(),
}
OFFSETS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)
EXPERT_FUNCTIONS = {
    "grouped_mm": lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=OFFSETS),
    "private_grouped_mm": lambda x, w: torch._grouped_mm(x, w.mT, OFFSETS),
    "transformers": lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w.mT, offs=OFFSETS),
    "select": lambda x, w: F.linear(x, w[1]),
    "unbind": lambda x, w: torch.cat([F.linear(x, expert) for expert in w]),
    "bmm": lambda x, w: torch.bmm(x[:8].view(4, 2, 192), w.mT),
    "index_bmm": lambda x, w: torch.bmm(w[torch.tensor([2, 0, 2])], x[:3, :, None]),
}


def check_in_graph(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> None:
    """One graph, the same bits, the same gradient of the input."""
    counter = GraphCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight), function(x, weight))
    assert counter.count == 1
    x = x.clone().requires_grad_()
    expected, found = function(x, weight), compiled(x, weight)
    assert torch.equal(found, expected)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.equal(gradient, reference)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", MATRIX_FUNCTIONS)
def test_products_in_a_graph(name: str) -> None:
    weight = quantized(torch.randn(24, 192)).detach()
    check_in_graph(MATRIX_FUNCTIONS[name], torch.randn(10, 192), weight)


@pytest.mark.parametrize("name", EXPERT_FUNCTIONS)
def test_experts_in_a_graph(name: str) -> None:
    if name == "transformers":
        pytest.importorskip("transformers.integrations.moe")
    check_in_graph(EXPERT_FUNCTIONS[name], torch.randn(10, 192), expert_weight())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped_mm", "index_bmm", "transformers"])
def test_experts_with_inductor(name: str) -> None:
    """Gathered experts have a length that the compiler learns at run time only."""
    pytest.importorskip("transformers.integrations.moe")
    function, x, weight = EXPERT_FUNCTIONS[name], torch.randn(10, 192), expert_weight()
    with torch.no_grad():
        assert torch.equal(torch.compile(function, fullgraph=True)(x, weight), function(x, weight))


def test_grouped_mm_does_not_recompile_over_tokens() -> None:
    weight, counter = expert_weight(), GraphCounter()

    def function(x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for ends in ([2, 2, 5, 9], [0, 1, 1, 4], [6, 7, 20, 33]):
        x, offsets = torch.randn(ends[-1], 192), torch.tensor(ends, dtype=torch.int32)
        assert torch.equal(compiled(x, offsets), function(x, offsets))
    assert counter.count == 1


def test_autocast_around_and_inside_the_graph() -> None:
    weight = quantized(torch.randn(24, 192)).detach()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, weight)

    def around(x: Tensor) -> Tensor:
        return F.linear(x, weight)

    x = torch.randn(5, 192)
    expected = F.linear(x.bfloat16(), weight)
    assert torch.equal(inside(x), expected)
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.compile(around, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("bits", [3, 8])
def test_weights_are_quantized_in_a_graph(bits: int) -> None:
    """One width for all rows gives sizes that are known while tracing."""

    def quantize(weight: Tensor) -> Tensor:
        return MixedPrecisionTensor.from_hp(weight, bits, 64)

    weight = torch.randn(24, 192)
    found = torch.compile(quantize, fullgraph=True, backend="aot_eager")(weight)
    assert isinstance(found, MixedPrecisionTensor)
    found.check()
    assert torch.equal(found, quantize(weight))


@pytest.mark.parametrize("name", ["clone", "bfloat16"])
def test_weights_come_out_of_a_graph(name: str) -> None:
    weight = quantized(torch.randn(24, 192)).detach()
    found = torch.compile(lambda w: getattr(w, name)(), fullgraph=True, backend="aot_eager")(weight)
    assert torch.equal(found, getattr(weight, name)())


def test_cutting_inputs_in_a_graph_is_refused() -> None:
    weight = quantized(torch.randn(24, 192)).detach()
    with pytest.raises(Exception, match="cut the weight before"):
        torch.compile(lambda w: w[:, 64:], fullgraph=True, backend="aot_eager")(weight)
