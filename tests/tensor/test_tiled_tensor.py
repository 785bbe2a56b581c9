"""Weights in the tile layout: the same numbers through every door, and the plain bytes whenever they are asked for."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchao.utils import unwrap_tensor_subclass

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor, TiledTensor

F = torch.nn.functional
X = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(150, 200), row_bits(150))


@pytest.fixture
def tiled(plain: MixedPrecisionTensor) -> TiledTensor:
    return TiledTensor.from_plain(plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_tensors_come_back(transposed: bool, per_token: bool, dtype: torch.dtype) -> None:
    dense = torch.randn(200, 150) if transposed else torch.randn(150, 200)
    options = {"per_token": per_token, "transposed": transposed}
    plain = MixedPrecisionTensor.from_hp(dense.to(dtype), row_bits(150), **options)
    tiled = TiledTensor.from_plain(plain)
    assert (tiled.shape, tiled.dtype, tiled.device) == (plain.shape, plain.dtype, plain.device)
    back = tiled.to_plain()
    assert type(back) is MixedPrecisionTensor
    for name in plain.tensor_data_names:
        assert torch.equal(getattr(back, name), getattr(plain, name))
    assert all(getattr(back, name) == getattr(plain, name) for name in plain.tensor_attribute_names)
    assert torch.equal(tiled.dequantize(), plain.dequantize())
    assert tiled.dequantize(torch.float16).dtype == torch.float16
    assert torch.equal(tiled.row_bits, plain.row_bits)


def test_weights_that_tiles_do_not_hold() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 128\) cannot be tiled.*experts one by one"):
        TiledTensor.from_plain(MixedPrecisionTensor.from_hp(torch.randn(2, 8, 128), 4))
    with pytest.raises(ValueError, match="group_size=64"):
        TiledTensor.from_plain(MixedPrecisionTensor.from_hp(torch.randn(8, 128), 4, 64))


DOORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "bias": lambda x, w: F.linear(input=x, weight=w, bias=torch.arange(150.0)),
    "module_shape": lambda x, w: F.linear(x[None, :, None], w),
    "mm": lambda x, w: torch.mm(x, w.t()),
    "matmul": lambda x, w: x @ w.T,
    "batch": lambda x, w: x[None] @ w.mT,
    "left": lambda x, w: (w @ x.t()).t(),
    "addmm": lambda x, w: torch.addmm(torch.ones(150), x, w.t()),
    "scaled_addmm": lambda x, w: torch.addmm(torch.ones(150), x, w.t(), alpha=2, beta=3),
    "input_side": lambda x, w: F.linear(x[:, :150], w.t()),
    "rows": lambda x, w: F.linear(x, w[10:50]),
    "chunk": lambda x, w: F.linear(x, w.chunk(3)[1]),
    "index": lambda x, w: F.linear(x, w[torch.tensor([5, 1, 1])]),
    "cat": lambda x, w: F.linear(x, torch.cat([w, w])),
    "dequantize": lambda x, w: x @ w.dequantize().t(),
}


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_door_gives_the_numbers_of_the_plain_weight(
    name: str, mode: Callable[[], torch.no_grad], plain: MixedPrecisionTensor, tiled: TiledTensor
) -> None:
    with mode():
        assert torch.equal(DOORS[name](X, tiled), DOORS[name](X, plain))


def test_gradients_are_those_of_the_plain_weight(plain: MixedPrecisionTensor, tiled: TiledTensor) -> None:
    found = []
    for weight in (plain, tiled):
        x, bias = X.clone().requires_grad_(), torch.zeros(150, requires_grad=True)
        parameter = nn.Parameter(weight, requires_grad=False)
        F.linear(x, parameter, bias).square().sum().backward()
        found.append((x.grad, bias.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_inputs_of_another_layer_are_refused(tiled: TiledTensor) -> None:
    """The tiles alone would take any number of inputs with as many groups."""
    with pytest.raises(ValueError, match="has 180 features, but the weight takes 200"):
        F.linear(X[:, :180], tiled)


def test_autocast(tiled: TiledTensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(X, tiled)
    assert torch.equal(y, F.linear(X.bfloat16(), tiled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_stay_tiled(dtype: torch.dtype, tiled: TiledTensor) -> None:
    for found in (
        tiled.to(dtype, copy=True),
        tiled.to("cpu", dtype),
        tiled.detach().to(dtype),
        tiled.clone().to(dtype),
    ):
        assert isinstance(found, TiledTensor)
        assert found.dtype == found.dequantize().dtype == dtype
        assert torch.equal(found.float(), tiled)
    assert tiled.detach().tiles.data_ptr() == tiled.tiles.data_ptr()
    assert tiled.clone().tiles.data_ptr() != tiled.tiles.data_ptr()
    with pytest.raises(TypeError, match=r"a TiledTensor cannot become torch\.float64"):
        tiled.double()


def test_equal_compares_what_is_stored(plain: MixedPrecisionTensor, tiled: TiledTensor) -> None:
    assert torch.equal(tiled, tiled.clone())
    assert torch.equal(tiled, plain)
    assert torch.equal(plain, tiled)
    changed = tiled.clone()
    changed.tiles[0] ^= 1
    assert not any(torch.equal(tiled, other) for other in (changed, tiled.t(), tiled.bfloat16(), plain[:3]))


def test_copy_takes_either_order(plain: MixedPrecisionTensor, tiled: TiledTensor) -> None:
    other = MixedPrecisionTensor.from_hp(torch.randn(150, 200), row_bits(150))
    target = tiled.clone()
    assert target.copy_(other) is target
    assert isinstance(target, TiledTensor)
    assert torch.equal(target, other)
    again = other.clone().copy_(tiled)
    assert torch.equal(again, plain)
    with pytest.raises(ValueError, match=r"differ in size of tiles.*assign=True"):
        target.copy_(MixedPrecisionTensor.from_hp(torch.randn(150, 200), 8))
    with pytest.raises(ValueError, match=r"order of the bytes \(TiledTensor and MixedPrecisionTensor\)"):
        target.copy_(MixedPrecisionTensor.from_hp(torch.randn(150, 200), row_bits(150), 64))


def test_meta_keeps_sizes(tiled: TiledTensor) -> None:
    meta = tiled.to("meta")
    assert isinstance(meta, TiledTensor)
    assert meta.tiles.shape == tiled.tiles.shape
    assert "device=meta" in repr(meta)


@pytest.mark.parametrize("parameter", [False, True])
def test_pickle_holds_the_plain_bytes(parameter: bool, tiled: TiledTensor) -> None:
    weight = nn.Parameter(tiled, requires_grad=False) if parameter else tiled
    data = pickle.dumps(weight)
    assert b"tile_table" not in data
    copies = (pickle.loads(data), copy.deepcopy(weight), copy.copy(weight))
    for other in copies:
        assert isinstance(other, TiledTensor)
        assert isinstance(other, nn.Parameter) == parameter
        assert torch.equal(other, tiled)
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    for device, kind in (("cpu", TiledTensor), ("meta", MixedPrecisionTensor)):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=device, weights_only=False)
        assert type(loaded) is kind
        assert loaded.device.type == device


def test_graphs_do_not_unpack(tiled: TiledTensor) -> None:
    with FakeTensorMode() as mode:
        fake = tiled.with_parts(**{n: mode.from_tensor(getattr(tiled, n)) for n in tiled.tensor_data_names})
        with pytest.raises(NotImplementedError, match=r"torchmix.to_plain\(model\) before compiling"):
            fake.to_plain()
        assert fake.dequantize().shape == (150, 200)


class Layer(nn.Module):
    """Linear layer with a residual of its first inputs, exact in a fused kernel too."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :150] + torch.relu(F.linear(x, self.weight))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled(dynamic: bool | None, plain: MixedPrecisionTensor, tiled: TiledTensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layer(tiled), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 3, 1):
        assert torch.equal(compiled(X[:tokens]), Layer(plain)(X[:tokens]))
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(Layer(plain)(other).square().sum(), other)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, plain: MixedPrecisionTensor, tiled: TiledTensor) -> None:
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(Layer(tiled), (X[:3],), dynamic_shapes=batch, strict=strict)
    flat = program.run_decompositions({})
    for tokens in (1, 4):
        expected = Layer(plain)(X[:tokens])
        assert torch.equal(program.module()(X[:tokens]), expected)
        assert torch.equal(flat.module()(X[:tokens]), expected)
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in flat.state_dict.values())
    called = [str(node.target) for node in flat.graph.nodes if node.op == "call_function"]
    assert "torchmix.mixed_linear_tiled.default" in called


def test_unwrapped(plain: MixedPrecisionTensor, tiled: TiledTensor) -> None:
    """torchao's way to export."""
    model = nn.Sequential(nn.Linear(200, 150, bias=False))
    model[0].weight = nn.Parameter(tiled, requires_grad=False)
    unwrapped = unwrap_tensor_subclass(model)
    assert not any(isinstance(tensor, TiledTensor) for tensor in unwrapped.state_dict().values())
    assert torch.equal(unwrapped(X), F.linear(X, plain))
