"""Replaying a model block by block gives what the model itself computes, or says why it cannot."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchmix.capture import (
    NotReplayableError,
    chunk_samples,
    find_blocks,
    hidden_states_device,
    record_blocks,
    short_circuit,
)

D = 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, hidden_states, shift=None, scale=1.0):
        return (hidden_states + scale * self.linear(hidden_states) + shift,)


class Mask(Layer):
    """A block whose argument fits one sample only."""

    def forward(self, hidden_states, shift=None, scale=1.0):
        return super().forward(
            hidden_states, shift.expand_as(hidden_states[:1]).view_as(hidden_states), scale
        )


class Model(nn.Module):
    def __init__(self, blocks=3, broken=False):
        super().__init__()
        self.embed = nn.Embedding(10, D)
        self.blocks = nn.ModuleList(Layer() for _ in range(blocks))
        self.other = nn.ModuleList([nn.Linear(D, D)])
        self.broken = broken

    def forward(self, ids):
        hidden = self.embed(ids)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, torch.full((D,), float(index)), scale=0.5)[0]
            if self.broken:
                hidden = hidden * 2
        return self.other[0](hidden)


def names(model):
    return [name for name, _ in model.named_parameters() if "blocks" in name]


def test_blocks_are_found_by_the_weights_they_own():
    model = Model()
    assert list(find_blocks(model, names(model))) == ["blocks.0", "blocks.1", "blocks.2"]


@torch.no_grad()
def test_replay_gives_the_same_hidden_states_for_every_sample():
    model, ids = Model(), torch.randint(10, (4, 5))
    blocks, hidden = record_blocks(find_blocks(model, names(model)), model, ids)
    for sample, states in enumerate(hidden):
        assert torch.equal(states, model.embed(ids[sample : sample + 1]))
        for block in blocks:
            states = block.run(block.module, states)
        assert torch.equal(model.other[0](states), model(ids[sample : sample + 1]))
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_model_that_changes_hidden_states_between_blocks_is_refused():
    model = Model(broken=True)
    with pytest.raises(NotReplayableError, match=r"output of blocks\.0 is not the input of the next"):
        record_blocks(find_blocks(model, names(model)), model, torch.zeros(1, 3, dtype=torch.long))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(NotReplayableError, match="no ModuleList"):
        find_blocks(nn.Sequential(nn.Linear(D, D)), ["0.weight"])


@torch.no_grad()
def test_blocks_without_hidden_states_are_refused_by_name():
    model = Model()
    model.forward = lambda ids: model.blocks[0](shift=model.embed(ids), hidden_states=None)
    with pytest.raises(NotReplayableError, match=r"blocks\.0 is not called with hidden states"):
        record_blocks(find_blocks(model, names(model)), model, torch.zeros(1, 3, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_samples_go_through_together(chunk):
    model, ids = Model(), torch.randint(10, (5, 4))
    blocks, hidden = record_blocks(find_blocks(model, names(model)), model, ids, chunk)
    assert [len(states) for states in hidden] == [len(part) for part in ids.split(chunk)]
    for part, states in zip(ids.split(chunk), hidden, strict=True):
        for block in blocks:
            states = block.run(block.module, states)
        torch.testing.assert_close(model.other[0](states), model(part))


@torch.no_grad()
def test_blocks_that_take_one_sample_only_get_one():
    model, ids = Model(), torch.randint(10, (4, 5))
    model.blocks[1] = Mask()
    _, hidden = record_blocks(find_blocks(model, names(model)), model, ids, 2)
    assert [len(states) for states in hidden] == [1, 1, 1, 1]


@torch.no_grad()
def test_short_circuit_leaves_only_what_is_outside_the_blocks():
    model, ids = Model(), torch.randint(10, (1, 5))
    blocks, _ = record_blocks(find_blocks(model, names(model)), model, ids)
    hidden = torch.randn(1, 5, D)
    with short_circuit(blocks, hidden):
        assert torch.equal(model(ids), model.other[0](hidden))
    assert not any("forward" in vars(block.module) for block in blocks)
    assert not torch.equal(model(ids), model.other[0](hidden))


def test_chunks_are_larger_on_a_gpu_and_never_empty():
    assert chunk_samples(torch.device("cpu"), 512) == 4
    assert chunk_samples(torch.device("cuda"), 512) == 16
    assert chunk_samples(torch.device("cpu"), 100_000) == 1


def test_hidden_states_stay_on_a_gpu_that_has_room(monkeypatch):
    """A quarter of its memory; a device without a GPU's memory keeps them in main memory."""
    properties = SimpleNamespace(total_memory=400)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 1)
    assert hidden_states_device(gpu, 100) == gpu
    assert hidden_states_device(gpu, 101) == torch.device("cpu")
    assert hidden_states_device(torch.device("cpu"), 1) == torch.device("cpu")
