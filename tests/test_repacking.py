"""Repacked models: the same outputs, the plain bytes in everything that is stored, and memory given back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from tests.generators import row_bits
from tests.models.tiny_models import apply_plan, logits, quantized_model, random_ids, random_plan, sequential
from torchmix import repacking
from torchmix._extension import KernelLibrary, KernelStatus, disable_kernels, kernels_available
from torchmix.checkpoint import load_pretrained, save_pretrained
from torchmix.config import mixllm_config
from torchmix.huggingface import load_model
from torchmix.repacking import plain_state_dict, repack, to_plain
from torchmix.tensor import MixedPrecisionTensor, PackedTensor, TiledTensor
from torchmix.tuning import tune


class Mixed(nn.Module):
    """Linear layers of several kinds, a tied one, experts and a group size that tiles do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 150), nn.Linear(150, 200)
        self.tied, self.dense = nn.Linear(200, 150, bias=False), nn.Linear(200, 200)
        self.small, self.experts = nn.Linear(200, 200), nn.Module()
        pack = MixedPrecisionTensor.from_hp
        self.up.weight = self.tied.weight = frozen(pack(self.up.weight.detach(), row_bits(150)))
        self.down.weight = frozen(pack(self.down.weight.detach(), row_bits(200, (3, 4, 8))))
        self.small.weight = frozen(pack(self.small.weight.detach(), 4, 64))
        self.experts.weight = frozen(pack(torch.randn(2, 8, 128), 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.small(self.down(self.up(x) + self.tied(x))))


def frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, classes and values, inner tensors included."""
    if list(one) != list(other):
        return False
    for name, tensor in one.items():
        if type(tensor) is not type(other[name]) or not torch.equal(tensor, other[name]):
            return False
    return True


def test_outputs_and_report() -> None:
    model, x = Mixed(), torch.randn(3, 200)
    expected = model(x)
    report = repack(model, force=True)
    assert report.repacked == ("up.weight", "down.weight")
    assert report.left == (
        ("small.weight", "tiles have group_size=128, this weight has 64"),
        ("experts.weight", "tiles hold matrices, this weight has 3 dimensions"),
    )
    assert isinstance(model.up.weight, TiledTensor)
    assert model.up.weight is model.tied.weight
    assert isinstance(model.up.weight, nn.Parameter)
    assert not model.up.weight.requires_grad
    assert torch.equal(model(x), expected)
    assert repack(model, force=True).repacked == ()
    assert "weight=TiledTensor" not in repr(model.dense)


def test_back_again() -> None:
    model, x = Mixed(), torch.randn(3, 200)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    repack(model, force=True)
    assert to_plain(model) == ("up.weight", "down.weight")
    assert model.up.weight is model.tied.weight
    assert all(type(p) is not TiledTensor for p in model.parameters())
    assert same_bytes(model.state_dict(), before)
    assert torch.equal(model(x), expected)
    assert to_plain(model) == ()


def test_state_dict_holds_the_plain_bytes() -> None:
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    repack(model, force=True)
    assert same_bytes(model.state_dict(), before)
    nested = nn.ModuleDict({"inner": model})
    assert same_bytes(nested.state_dict(), {f"inner.{name}": tensor for name, tensor in before.items()})
    kept = model.state_dict(keep_vars=True)
    assert kept["up.weight"] is model.up.weight
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert same_bytes(torch.load(buffer, weights_only=True), before)
    other = Mixed()
    other.load_state_dict(model.state_dict())  # into plain weights
    assert same_bytes(other.state_dict(), before)
    again = Mixed()
    repack(again, force=True)
    again.load_state_dict(before)  # into tiles
    assert isinstance(again.up.weight, TiledTensor)
    assert same_bytes(again.state_dict(), before)


def test_copies_of_the_model_are_repacked_too() -> None:
    model, x = Mixed(), torch.randn(3, 200)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    repack(model, force=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.up.weight, TiledTensor)
        assert other.up.weight is other.tied.weight
        assert same_bytes(other.state_dict(), before)
        assert torch.equal(other(x), expected)
        assert list(other.up._state_dict_hooks.values()) == [plain_state_dict]


def test_dtype_casts_keep_the_tiles() -> None:
    model = Mixed()
    expected = copy.deepcopy(model).bfloat16()(torch.ones(2, 200).bfloat16())
    repack(model, force=True)
    model.bfloat16()
    assert isinstance(model.up.weight, TiledTensor)
    assert torch.equal(model(torch.ones(2, 200).bfloat16()), expected)


def test_the_plain_copy_is_freed() -> None:
    """One weight at a time: when the second is repacked, the first one's plain bytes are gone."""
    model = nn.Sequential(*(nn.Linear(128, 64, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight = frozen(MixedPrecisionTensor.from_hp(layer.weight.detach(), 4))
    alive = [weakref.ref(layer.weight.qdata) for layer in model]
    seen: list[int] = []
    make = TiledTensor.from_plain

    def count(weight: MixedPrecisionTensor) -> TiledTensor:
        gc.collect()
        seen.append(sum(reference() is not None for reference in alive))
        return make(weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiledTensor, "from_plain", count)
        repack(model, force=True)
    gc.collect()
    assert seen == [3, 2, 1]
    assert all(reference() is None for reference in alive)


def test_without_kernels_everything_stays_plain(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repacking, "kernel_status", lambda: KernelStatus(()))
    model = Mixed().to(device)
    report = repack(model)
    assert not report.repacked
    assert [name for name, _ in report.left] == ["up.weight", "down.weight", "small.weight", "experts.weight"]
    wanted = (
        "no compiled kernels"
        if device.type == "cuda"
        else "it is on cpu; kernels that read tiles run on cuda"
    )
    assert wanted in report.left[0][1]
    assert all(isinstance(layer.weight, MixedPrecisionTensor) for layer in (model.up, model.down))


@pytest.mark.parametrize(
    ("capability", "widths", "reason"),
    [
        ((9, 0), (3, 4, 5, 6, 8), None),
        ((8, 0), (4,), None),
        ((7, 5), (4,), r"need compute capability \(8, 0\), cuda.* has \(7, 5\)"),
        ((9, 0), (2, 4, 7), r"it has rows of \[2, 7\] bits; kernels read \(3, 4, 5, 6, 8\)"),
    ],
)
def test_reasons_on_a_gpu(
    capability: tuple[int, int],
    widths: tuple[int, ...],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decision itself needs no GPU."""
    library = KernelLibrary(Path("_C_cuda.so"), "cuda")
    monkeypatch.setattr(repacking, "kernel_status", lambda: KernelStatus((library,)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(MixedPrecisionTensor, "device", torch.device("cuda"))
    weight = MixedPrecisionTensor.from_hp(torch.randn(20, 128), row_bits(20, widths))
    found = repacking._no_kernel(weight)
    assert (found is None) == (reason is None)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


def test_meta_weights_stay_plain() -> None:
    report = repack(Mixed().to("meta"), force=True)
    assert report.left[0] == ("up.weight", "it has no values on the meta device")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with kernels: what can be tiled is repacked after loading."""
    monkeypatch.setattr(repacking, "_no_kernel", lambda weight: None)


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("shard", ["5GB", 30_000])
def test_saved_files_are_the_same(tmp_path: Path, shard: int | str) -> None:
    model = apply_plan(sequential(), random_plan(sequential()))
    save_pretrained(model, tmp_path / "plain" / "model", max_shard_size=shard)
    assert repack(model, force=True).repacked
    save_pretrained(model, tmp_path / "tiled" / "model", max_shard_size=shard)
    assert files_in(tmp_path / "tiled" / "model") == files_in(tmp_path / "plain" / "model")


@pytest.mark.usefixtures("kernels")
def test_load_pretrained_repacks_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMIX_REPACK", "1")
    model = apply_plan(sequential(), random_plan(sequential()))
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model", model=sequential())
    weights = [p for p in loaded.parameters() if isinstance(p, PackedTensor)]
    assert weights
    assert all(isinstance(weight, TiledTensor) for weight in weights)
    assert same_bytes(loaded.state_dict(), model.state_dict())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("choice", "measured", "tiled"), [(None, True, True), (None, False, False), ("0", True, False)]
)
def test_loading_repacks_where_kernels_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str | None, measured: bool, tiled: bool
) -> None:
    monkeypatch.setattr(repacking, "_on_measured_gpus", lambda model: measured)
    if choice is not None:
        monkeypatch.setenv("TORCHMIX_REPACK", choice)
    model = apply_plan(sequential(), random_plan(sequential()))
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model", model=sequential())
    assert any(isinstance(weight, TiledTensor) for weight in loaded.parameters()) == tiled


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_transformers_repacks_after_loading(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conv1D weights are transposed; experts stay plain."""
    monkeypatch.setenv("TORCHMIX_REPACK", "1")
    import transformers

    (model, _), ids = quantized_model(family), random_ids(2, 9)
    save_pretrained(model, tmp_path / "model")
    expected = logits(model, ids)
    for loaded in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        load_model(tmp_path / "model"),
        load_pretrained(tmp_path / "model"),
    ):
        weights = [p for p in loaded.parameters() if isinstance(p, PackedTensor)]
        assert any(isinstance(weight, TiledTensor) for weight in weights)
        assert all(isinstance(weight, TiledTensor) == (weight.dim() == 2) for weight in weights)
        assert torch.equal(logits(loaded, ids), expected)
    loaded.save_pretrained(tmp_path / "again")
    save_pretrained(loaded, tmp_path / "third", source=tmp_path / "model")
    name = "model.safetensors"
    assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert torch.equal(logits(load_model(tmp_path / "again"), ids), expected)


needs_kernels = pytest.mark.skipif(
    not (kernels_available("cuda") and torch.cuda.is_available()), reason="no CUDA kernels on this machine"
)


@needs_kernels
def test_kernels_serve_a_repacked_model() -> None:
    """Rows of 2 and 7 bits stay plain; the others give the numbers of the reference up to float32 rounding."""
    model, x = Mixed().cuda(), torch.randn(3, 200, device="cuda")
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    report = repack(model)
    assert report.repacked == ("down.weight",)
    assert report.left[0][0] == "up.weight"
    assert "rows of [2, 7] bits" in report.left[0][1]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    with disable_kernels():
        assert torch.equal(model(x), expected)
    assert same_bytes(model.state_dict(), before)


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
def test_kernels_in_a_compiled_model(backend: str) -> None:
    """Kernels serve every layer: the references look at their weights on the host, which no CUDA graph allows."""
    torch._dynamo.reset()
    plan = random_plan(sequential(), (3, 4, 5, 6, 8))
    model = apply_plan(sequential(), plan).cuda()
    assert not repack(model).left
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    inputs = model[0].in_features
    with torch.no_grad():
        for x in torch.randn(4, 3, inputs, device="cuda"):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_models_are_repacked_when_loaded_to_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHMIX_REPACK", "1")
    plan = random_plan(sequential(), (3, 4, 5, 6, 8))
    model = apply_plan(sequential(), plan)
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model", model=sequential(), device="cuda")
    weights = [p for p in loaded.parameters() if isinstance(p, PackedTensor)]
    assert all(isinstance(weight, TiledTensor) for weight in weights)
    save_pretrained(loaded, tmp_path / "again")
    assert files_in(tmp_path / "again").keys() == files_in(tmp_path / "model").keys()
    name = "model.safetensors"
    assert files_in(tmp_path / "again")[name] == files_in(tmp_path / "model")[name]


def test_repacked_models_are_not_quantized_or_tuned_again() -> None:
    original = sequential()
    model = apply_plan(copy.deepcopy(original), random_plan(original))
    repack(model, force=True)
    with pytest.raises(TypeError, match="already quantized"):
        quantize_(model, mixllm_config())
    with pytest.raises(ValueError, match=r"repacked.*torchmix\.to_plain\(model\)"):
        tune(model, original, torch.randint(0, 8, (2, 8)))
