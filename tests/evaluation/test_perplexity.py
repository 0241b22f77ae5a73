"""Perplexity and KL against values known in closed form, float64 loops, and transformers' own loss."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB, build
from torch import Tensor, nn

from quantkit.calib.datasets import EvalWindows
from quantkit.errors import NumericalError, RequestError
from quantkit.evaluation.perplexity import TextResult, evaluate_windows

EPS = torch.finfo(torch.float32).eps
N_TOKENS = 50


def windows_of(ids: Tensor, name: str = "text") -> EvalWindows:
    return EvalWindows(ids, name, sha256="", protocol="a protocol")


def random_windows(n_windows: int = 5, seq_len: int = 12, vocab_size: int = N_TOKENS, seed: int = 0) -> EvalWindows:
    generator = torch.Generator().manual_seed(seed)
    return windows_of(torch.randint(vocab_size, (n_windows, seq_len), generator=generator))


class Bigram(nn.Module):
    """The next token's logits are a row of a table: small enough to be scored by hand."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def bigram(seed: int, scale: float = 2.0, vocab_size: int = N_TOKENS) -> Bigram:
    generator = torch.Generator().manual_seed(seed)
    return Bigram(scale * torch.randn(vocab_size, vocab_size, generator=generator))


def log_probabilities(model: Bigram) -> list[list[float]]:
    rows = []
    for row in model.table.double().tolist():
        total = math.log(math.fsum(math.exp(logit) for logit in row))
        rows.append([logit - total for logit in row])
    return rows


def tolerance(model: Bigram) -> float:
    """Of one float32 log-softmax: a sum of N_TOKENS terms, then a difference of numbers up to the largest logit."""
    return EPS * (N_TOKENS + 2 * float(model.table.detach().abs().max()))


def test_uniform_model_is_as_perplexed_as_its_vocabulary() -> None:
    for vocab_size in (2, 50, 1000):
        windows = random_windows(vocab_size=vocab_size)
        result = evaluate_windows(Bigram(torch.zeros(vocab_size, vocab_size)), windows)
        assert result.ppl == pytest.approx(vocab_size, rel=4 * EPS * math.log(vocab_size) + 4 * EPS)
        assert result.nll == pytest.approx(math.log(vocab_size), rel=4 * EPS)


def test_certain_model_has_perplexity_one() -> None:
    table = torch.full((4, 4), -math.inf)
    for token in range(4):
        table[token, (token + 1) % 4] = 3.0
    result = evaluate_windows(Bigram(table), windows_of(torch.tensor([[0, 1, 2, 3, 0], [3, 0, 1, 2, 3]])))
    assert result.ppl == 1.0


def test_perplexity_is_the_mean_over_windows_of_shifted_positions() -> None:
    model, windows = bigram(0), random_windows()
    table = log_probabilities(model)
    means = []
    for row in windows.input_ids.tolist():
        means.append(-sum(table[now][after] for now, after in pairwise(row)) / (len(row) - 1))
    result = evaluate_windows(model, windows)
    assert result.nll == pytest.approx(sum(means) / len(means), abs=tolerance(model))
    assert result.ppl == math.exp(result.nll)
    assert (result.windows, result.seq_len, result.protocol) == (5, 12, "a protocol")
    assert result.kl_mean is result.kl_p99 is result.top1_agreement is None


def test_distance_to_a_reference() -> None:
    model, reference, windows = bigram(0), bigram(1), random_windows(40, 12)
    log_q, log_p = log_probabilities(model), log_probabilities(reference)
    kl, agree = [], []
    for token in windows.input_ids[:, :-1].flatten().tolist():
        q, p = log_q[token], log_p[token]
        kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        agree.append(p.index(max(p)) == q.index(max(q)))
    result = evaluate_windows(model, windows, reference=reference)
    assert result.kl_mean == pytest.approx(math.fsum(kl) / len(kl), abs=4 * tolerance(model))
    assert result.kl_p99 == pytest.approx(sorted(kl)[math.ceil(0.99 * len(kl)) - 1], abs=4 * tolerance(model))
    assert result.top1_agreement == sum(agree) / len(agree)
    assert result.ppl == evaluate_windows(model, windows).ppl


def test_a_model_has_no_distance_to_itself() -> None:
    table = bigram(0).table.detach()
    table[:, 7] = -math.inf  # tokens that no one ever predicts, such as the padding of a vocabulary
    windows = windows_of(random_windows().input_ids.where(random_windows().input_ids != 7, 8))
    for model, reference in [(Bigram(table), Bigram(table.clone())), (build("llama"), build("llama"))]:
        result = evaluate_windows(model, windows, reference=reference)
        assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (0.0, 0.0, 1.0)


def test_agrees_with_the_loss_of_transformers() -> None:
    model, windows = build("llama"), random_windows(3, 40, VOCAB)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows.input_ids]
    result = evaluate_windows(model, windows)
    assert result.nll == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_batches_change_nothing_but_the_last_bits() -> None:
    model, reference, windows = build("llama", 0), build("llama", 1), random_windows(5, 24, VOCAB)
    one = evaluate_windows(model, windows, reference=reference)
    for batch_size in (2, 5, 64):
        many = evaluate_windows(model, windows, reference=reference, batch_size=batch_size)
        assert many.nll == pytest.approx(one.nll, rel=1e-5)
        assert many.kl_mean == pytest.approx(one.kl_mean, rel=1e-4)
    table = bigram(0)  # no arithmetic mixes windows here: the same bits
    assert evaluate_windows(table, windows_of(windows.input_ids % 50)) == evaluate_windows(
        table, windows_of(windows.input_ids % 50), batch_size=3
    )


def test_large_vocabularies_are_scored_in_pieces() -> None:
    vocab_size = 1 << 20  # 16 positions at a time, so a window of 20 takes two pieces

    class Ramp(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            peak = torch.zeros(*input_ids.shape, vocab_size)
            return SimpleNamespace(logits=peak.scatter_(-1, input_ids[..., None], math.log(vocab_size)))

    ids = torch.arange(20)[None] * 1000
    ids[0, 18:] = ids[0, 17]  # the last two positions repeat the one before, which the model favours
    # Weights: the favoured token vocab_size, all others 1, so their sum is 2 * vocab_size - 1.
    total = math.log(2 * vocab_size - 1)
    expected = (17 * total + 2 * (total - math.log(vocab_size))) / 19
    assert evaluate_windows(Ramp(), windows_of(ids)).nll == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_scored_in_float32() -> None:
    model, windows = bigram(0), random_windows(30, 40)
    half = Bigram(model.table.detach().bfloat16())
    rounded = Bigram(half.table.detach().float())
    assert evaluate_windows(half, windows) == evaluate_windows(rounded, windows)


def test_dropout_is_off_and_the_mode_restored() -> None:
    class Dropping(Bigram):
        def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            logits = nn.functional.dropout(super().forward(input_ids, use_cache).logits, 0.5, self.training)
            return SimpleNamespace(logits=logits)

    table, windows = bigram(0).table.detach(), random_windows()
    model = Dropping(table).train()
    assert evaluate_windows(model, windows, reference=model.train()).nll == evaluate_windows(Bigram(table), windows).nll
    assert model.training
    assert not evaluate_windows(model.eval(), windows).kl_mean
    assert not model.training


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    evaluate_windows(
        bigram(0), random_windows(5), batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_json_entry_has_the_distance_only_with_a_reference() -> None:
    result = TextResult(ppl=2.0, nll=math.log(2), windows=3, seq_len=4, protocol="p")
    assert result.to_json() == {"ppl": 2.0, "windows": 3, "seq_len": 4}
    result = TextResult(
        ppl=2.0, nll=0.7, windows=3, seq_len=4, protocol="p", kl_mean=0.0, kl_p99=0.0, top1_agreement=1.0
    )
    assert result.to_json() == {"ppl": 2.0, "windows": 3, "seq_len": 4, "kl_mean": 0.0, "top1_agreement": 1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_window_and_position(value: float) -> None:
    ids = torch.arange(24).view(4, 6)
    table = torch.zeros(24, 24)
    table[15, 3] = value  # read at window 2, position 3
    broken, sound = Bigram(table), Bigram(torch.zeros(24, 24))
    for batch_size in (1, 3):
        message = r"^text, window 2: the model's logits are not finite at position 3; load it in a wider dtype"
        with pytest.raises(NumericalError, match=message):
            evaluate_windows(broken, windows_of(ids), batch_size=batch_size)
        message = r"^text, window 2: the KL divergence to the reference is not finite at position 3"
        with pytest.raises(NumericalError, match=message):
            evaluate_windows(sound, windows_of(ids), reference=broken, batch_size=batch_size)


def test_a_perplexity_beyond_all_numbers_is_an_error() -> None:
    table = torch.zeros(3, 3)
    table[:, 2] = 5000.0
    with pytest.raises(
        NumericalError, match=r"^text: the mean cross entropy is 5000 nats, so the perplexity overflows"
    ):
        evaluate_windows(Bigram(table), windows_of(torch.tensor([[0, 1, 0, 1]])))


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(RequestError, match=r"^the reference has a vocabulary of 60 tokens, the model of 50; pass"):
        evaluate_windows(bigram(0), random_windows(), reference=bigram(0, vocab_size=60))
    with pytest.raises(RequestError, match=r"^batch_size is 0; it must be at least 1"):
        evaluate_windows(bigram(0), random_windows(), batch_size=0)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    windows = random_windows(5, 40, VOCAB)
    here = evaluate_windows(build("llama", 0), windows, reference=build("llama", 1))
    model = build("llama", 0).cuda()
    there = evaluate_windows(model, windows, reference=build("llama", 1).cuda(), batch_size=2)
    assert there.nll == pytest.approx(here.nll, rel=1e-5)
    assert there.kl_mean == pytest.approx(here.kl_mean, rel=1e-4)
    apart = evaluate_windows(model, windows, reference=build("llama", 0))  # the reference stays on the CPU
    assert apart.nll == pytest.approx(here.nll, rel=1e-5)
    assert apart.kl_mean == pytest.approx(0.0, abs=1e-6)
