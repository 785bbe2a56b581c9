"""The evaluation protocol against a plain loop, its errors, and what it leaves untouched."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from torchmix.evaluation import Evaluation, divergence, evaluate, evaluate_many, window_tokens

VOCAB = 37


class Bigram(nn.Module):
    """Next-token logits looked up by the current token, after a dropout that must be off."""

    def __init__(self, seed: int = 0, vocab: int = VOCAB) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)
        nn.init.normal_(self.table.weight, std=2.0, generator=torch.Generator().manual_seed(seed))
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.dropout(self.table(input_ids)))


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, VOCAB, (103,), generator=torch.Generator().manual_seed(1))


def plain_protocol(model: Bigram, ids: Tensor, window: int) -> tuple[list[float], Tensor]:
    """Negative log-likelihoods and log-probabilities, window by window, in float64."""
    nll, log_probs = [], []
    for start in range(0, (len(ids) - 1) // window * window, window):
        for position in range(start, start + window):
            row = model.table.weight.detach()[ids[position]].double().log_softmax(-1)
            nll.append(-row[ids[position + 1]].item())
            log_probs.append(row)
    return nll, torch.stack(log_probs)


def test_window_tokens():
    inputs, targets = window_tokens(list(range(10)), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert inputs.dtype == targets.dtype == torch.int64
    inputs, _ = window_tokens(torch.arange(9, dtype=torch.int32), 3)  # the last window lacks its last target
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("window, batch_size", [(10, 4), (10, 1), (34, 8), (102, 2)])
def test_matches_a_plain_loop(token_ids, window, batch_size):
    model, reference = Bigram(0), Bigram(1)
    result = evaluate(
        model, token_ids, reference=reference, window=window, batch_size=batch_size, num_bytes=250
    )
    nll, log_q = plain_protocol(model, token_ids, window)
    _, log_p = plain_protocol(reference, token_ids, window)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    mean = sum(nll) / len(nll)
    assert result.tokens == len(nll)
    assert result.windows == len(nll) // window
    assert result.nll == pytest.approx(mean, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(mean * 103 / 250 / math.log(2), rel=1e-6)
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-5)
    assert result.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
    assert result.top1_agreement == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())


def test_chunked_tokens_give_the_same(token_ids, monkeypatch):
    whole = evaluate(Bigram(0), token_ids, reference=Bigram(1), window=10)
    monkeypatch.setattr(divergence, "chunk_elements", lambda device: 3 * VOCAB)
    assert evaluate(Bigram(0), token_ids, reference=Bigram(1), window=10) == whole


def test_without_reference_and_bytes(token_ids):
    result = evaluate(Bigram(), token_ids, window=10)
    assert result.bits_per_byte is result.kl_mean is result.kl_p99 is result.kl_max is None
    assert result.top1_agreement is None


def test_many_models_run_the_reference_once(token_ids):
    reference, first, second = Bigram(0), Bigram(1), Bigram(2)
    results = evaluate_many(
        {"original": reference, "first": first, "second": second},
        token_ids,
        reference=reference,
        window=10,
        batch_size=5,
    )
    assert (reference.calls, first.calls, second.calls) == (2, 2, 2)
    assert list(results) == ["original", "first", "second"]
    assert results["original"].kl_max == 0.0
    assert results["original"].top1_agreement == 1.0
    assert results["second"] == evaluate(second, token_ids, reference=Bigram(0), window=10)


def test_a_model_may_be_called_reference(token_ids):
    model = Bigram(0).train()
    results = evaluate_many({"reference": model}, token_ids, reference=Bigram(1), window=10)
    assert results["reference"] == evaluate(model, token_ids, reference=Bigram(1), window=10)


def test_plain_callables_and_plain_tensors(token_ids):
    model = Bigram(0).eval()
    assert evaluate(lambda input_ids: model(input_ids).logits, token_ids, window=10) == evaluate(
        model, token_ids, window=10
    )


def test_nothing_of_the_caller_changes(token_ids):
    model, reference = Bigram(0), Bigram(1)
    model.train()
    model.dropout.eval()  # modules may differ in mode
    reference.eval()
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    evaluate(model, token_ids, reference=reference, window=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.table.training, model.dropout.training) == (True, True, False)
    assert not reference.training
    assert torch.equal(model.state_dict()["table.weight"], before["table.weight"])
    assert torch.is_grad_enabled()


def test_mode_is_restored_after_an_error(token_ids):
    model = Bigram(0).train()
    with pytest.raises(ValueError, match="vocabulary"):
        evaluate(model, token_ids, reference=Bigram(1, vocab=VOCAB + 1), window=10)
    assert model.training
    assert model.dropout.training


def test_progress_reaches_the_total(token_ids):
    seen: list[tuple[int, int]] = []
    evaluate(
        Bigram(), token_ids, window=10, batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_to_dict_has_the_contract_keys(token_ids):
    result = evaluate(Bigram(0), token_ids, reference=Bigram(1), window=10, num_bytes=250)
    content = json.loads(json.dumps(result.to_dict()))
    assert {"perplexity", "bits_per_byte", "tokens", "kl_mean", "kl_p99", "top1_agreement"} <= content.keys()
    assert Evaluation(**content) == result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(token_ids, dtype):
    model, reference = Bigram(0).to(dtype), Bigram(1).to(dtype)
    result = evaluate(model, token_ids, reference=reference, window=10)
    expected = evaluate(model.float(), token_ids, reference=reference.float(), window=10)
    assert result == expected  # the table is the logits: widening is exact, all arithmetic is float32


def test_a_huge_loss_is_infinite_perplexity():
    def hopeless(input_ids: Tensor) -> Tensor:
        return torch.tensor([1000.0, 0.0]).expand(*input_ids.shape, 2)

    assert evaluate(hopeless, torch.ones(11, dtype=torch.int64), window=5).perplexity == math.inf


class TestErrors:
    def test_too_short(self):
        with pytest.raises(ValueError, match=r"has 10 tokens, one window of 10 needs 11.*smaller window"):
            evaluate(Bigram(), torch.zeros(10, dtype=torch.int64), window=10)

    def test_empty(self):
        with pytest.raises(ValueError, match=r"has 0 tokens"):
            evaluate(Bigram(), torch.zeros(0, dtype=torch.int64), window=10)

    def test_shape_and_type_of_ids(self):
        with pytest.raises(ValueError, match=r"1-D.*\(2, 8\)"):
            window_tokens(torch.zeros(2, 8, dtype=torch.int64), 4)
        with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
            window_tokens(torch.zeros(8), 4)
        with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
            window_tokens(torch.zeros(8, dtype=torch.int64), 0)

    def test_batch_size_and_models(self, token_ids):
        with pytest.raises(ValueError, match="batch_size must be at least 1 window, got 0"):
            evaluate(Bigram(), token_ids, window=10, batch_size=0)
        with pytest.raises(ValueError, match="at least one model"):
            evaluate_many({}, token_ids, window=10)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_logits_name_window_and_position(self, bad):
        model = Bigram()
        with torch.no_grad():
            model.table.weight[5, 0] = bad
        ids = torch.zeros(101, dtype=torch.int64)
        ids[73] = 5
        with pytest.raises(ValueError, match="quantized: logits are NaN or infinite in window 7, position 3"):
            evaluate_many({"quantized": model}, ids, window=10)
        with pytest.raises(ValueError, match="reference: logits are NaN or infinite in window 7, position 3"):
            evaluate(Bigram(), ids, reference=model, window=10)

    def test_vocabularies_differ(self, token_ids):
        with pytest.raises(ValueError, match=f"small has a vocabulary of {VOCAB} entries, the reference 40"):
            evaluate_many({"small": Bigram()}, token_ids, reference=Bigram(vocab=40), window=10)

    def test_negative_ids(self, token_ids):
        token_ids[4] = -100
        with pytest.raises(ValueError, match="negative, got -100"):
            evaluate(Bigram(), token_ids, window=10)

    def test_output_without_logits(self, token_ids):
        with pytest.raises(TypeError, match=r"logits or an object with \.logits, got str"):
            evaluate(lambda input_ids: "text", token_ids, window=10)
        with pytest.raises(ValueError, match=r"\(4, 10, vocabulary\), got \(4, 37\)"):
            evaluate(lambda input_ids: torch.zeros(4, VOCAB), token_ids, window=10)

    def test_meta_model(self, token_ids):
        with pytest.raises(ValueError, match="meta device"):
            evaluate(Bigram().to("meta"), token_ids, window=10)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


class TestTransformers:
    """A small random Llama through its own forward."""

    def test_default_window_is_the_context(self, llama, token_ids):
        result = evaluate(llama, token_ids)
        assert result.windows == 102 // 16
        inputs, targets = window_tokens(token_ids, 16)
        with torch.no_grad():
            logits = llama.eval()(inputs).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten())
        assert result.nll == pytest.approx(float(expected), rel=1e-6)

    def test_no_cache_is_filled(self, llama, token_ids):
        outputs = []
        handle = llama.register_forward_hook(lambda module, args, output: outputs.append(output))
        evaluate(llama, token_ids)
        handle.remove()
        assert [output.past_key_values for output in outputs] == [None, None]

    def test_limits_of_the_model(self, llama, token_ids):
        with pytest.raises(ValueError, match="window=17 is beyond its context of 16"):
            evaluate(llama, token_ids, window=17)
        token_ids[3] = VOCAB
        with pytest.raises(ValueError, match=f"token id {VOCAB} is outside its vocabulary of {VOCAB}"):
            evaluate(llama, token_ids)

    def test_compiled_module_is_a_module(self, llama, token_ids):
        compiled = torch.compile(llama, backend="eager")
        assert evaluate(compiled, token_ids).nll == pytest.approx(evaluate(llama, token_ids).nll, rel=1e-6)
