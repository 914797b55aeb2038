"""Error feedback: against a literal float64 transcription, and on Hessians that are hard to factor."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.files.format import G16, TYPES, decode
from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.grid import Grid
from aaac_gguf.quantizer.moments import factor
from aaac_gguf.quantizer.moments import output_error as module_output_error
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.search import decode as decode_encoded
from aaac_gguf.quantizer.search import encode

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
N, K = 96, 256


def weights(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_t(5, (N, K)) * 0.05).astype(np.float32))


def hessian(n_tokens: int = 2048, seed: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_tokens, K)) @ (np.eye(K) + 0.15 * rng.standard_normal((K, K))) * rng.lognormal(0, 0.7, K)
    return torch.from_numpy(x.T @ x / n_tokens).float()


def output_error(weight: torch.Tensor, decoded: np.ndarray, h: torch.Tensor) -> float:
    d = weight.double() - torch.from_numpy(decoded).double()
    w, h = weight.double(), h.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def both(qtype, h: torch.Tensor) -> tuple[float, float]:
    """Output error with and without feedback."""
    w = weights()
    fed, diagonal = quantize(w, T[qtype.name], hessian=h), quantize(w, T[qtype.name], importance=h.diagonal())
    return tuple(output_error(w, decode(qtype, q.data, q.codec), h) for q in (fed, diagonal))


@ALL_TYPES
def test_feedback_lowers_the_output_error(qtype):
    fed, diagonal = both(qtype, hessian())
    assert fed < 0.8 * diagonal
    assert quantize(weights(), T[qtype.name], hessian=hessian()).weighted_error == pytest.approx(fed, rel=1e-3)


def test_factor_inverts_the_damped_hessian():
    h = hessian()
    factored = factor(h, 0.01)
    u = factored.u
    assert factored.damping == 0.01
    assert torch.equal(u, u.triu())
    damped = h.double() / h.diagonal().mean() + 0.01 * torch.eye(K)
    assert torch.allclose(factored.hessian.double(), damped)
    assert torch.allclose(u.double().T @ u.double() @ damped, torch.eye(K, dtype=torch.float64), atol=1e-4)


@ALL_TYPES
def test_without_correlation_nothing_is_fed_back(qtype):
    """Then every weight has the level nearest to it, and groups do not see each other."""
    w = weights()
    grid = Grid.of_codec(quantize(w, T[qtype.name]).codec, qtype, "cpu")
    fed = feedback(w, factor(torch.eye(K)), grid, qtype)
    scales = grid.scales[fed.scale_codes.long()].repeat_interleave(qtype.group_size, 1)
    books = grid.levels[fed.selectors.long().repeat_interleave(16, 1)]
    assert torch.equal(fed.indices.long(), (w[..., None] - scales[..., None] * books).abs().argmin(2))
    direct = encode(w, torch.ones(K), grid, qtype.group_size)
    errors = [(w - decode_encoded(e, grid)).square().sum() for e in (fed, direct)]
    assert errors[0] < 1.002 * errors[1]


def literal_feedback(w, h, encoded, grid):
    """Columns one by one: after each, the others move to the least-squares optimum for what is fixed (float64, no factorisation shared)."""
    w, scales, levels = w.double().clone(), grid.scales.double(), grid.levels.double()
    n = w.shape[1]
    for j in range(n):
        scale = scales[encoded.scale_codes[:, j // 16].long()]
        book = levels[encoded.selectors[:, j // 16].long()]
        index = (w[:, j, None] / scale[:, None] - book).abs().argmin(1)
        q = scale * book.gather(1, index[:, None])[:, 0]
        error, w[:, j] = w[:, j] - q, q
        if j + 1 < n:
            # d/dw of the quadratic form over the free columns is zero: dw = error * H_fj H_ff^-1
            w[:, j + 1 :] += error[:, None] * torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j])
    return w


def test_feedback_is_the_conditional_optimum_column_by_column():
    w, h = weights()[:24, :128], hessian()[:128, :128]
    codec = quantize(w, T[G16.name]).codec
    grid = Grid.of_codec(codec, G16, "cpu")
    factored = factor(h)
    encoded = feedback(w, factored, grid, G16, sweeps=0)
    damped = h.double() + factored.damping * h.diagonal().double().mean() * torch.eye(128)
    expected = literal_feedback(w, damped, encoded, grid)
    assert (decode_encoded(encoded, grid) - expected).abs().gt(
        1e-6
    ).double().mean() < 0.02  # float32 may round a near-tie the other way


@ALL_TYPES
def test_dead_channels_are_rounded_for_themselves(qtype):
    h = hessian()
    h[32:64] = 0
    h[:, 32:64] = 0
    u = factor(h, 0.01).u
    assert torch.allclose(u.diagonal()[32:64], torch.tensor(1.01**-0.5))
    assert (u[32:64, 64:] == 0).all()
    assert (u[:32, 32:64] == 0).all()
    w = weights()
    q = quantize(w, T[qtype.name], hessian=h)
    difference = w - torch.from_numpy(decode(qtype, q.data, q.codec))
    assert difference[:, 32:64].square().sum() < 0.03 * w[:, 32:64].square().sum()
    fed, diagonal = both(qtype, h)
    assert fed < 0.85 * diagonal


@ALL_TYPES
@pytest.mark.parametrize("n_tokens", [1, 5, K // 4])
def test_fewer_tokens_than_channels(qtype, n_tokens):
    """The Hessian has rank n_tokens. The tokens that were seen come out better, and the weights do not run away."""
    h = hessian(n_tokens)
    fed, diagonal = both(qtype, h)
    assert fed < diagonal
    w = weights()
    q = quantize(w, T[qtype.name], hessian=h)
    assert 0 < q.damping < 1
    assert q.relative_error < 0.5


def test_a_hessian_that_is_not_definite_takes_more_damping_and_says_so():
    h = torch.ones(K, K) - 0.05 * torch.eye(K)  # smallest eigenvalue -0.05, diagonal 0.95
    factored = factor(h, 0.01)
    assert factored.damping == pytest.approx(0.1)
    assert torch.isfinite(factored.u).all()


def test_the_hessians_magnitude_does_not_matter():
    w, h = weights(), hessian()
    assert (
        quantize(w, T[G16.name], hessian=h).data.tobytes()
        == quantize(w, T[G16.name], hessian=h * 2.0**40).data.tobytes()
    )


def test_all_dead():
    q = quantize(weights(), T[G16.name], hessian=torch.zeros(K, K))
    assert q.relative_error < 0.01
    assert q.weighted_error == 0


def test_experts_each_have_their_hessian():
    w = torch.stack([weights(0), weights(1), weights(2)])
    h = torch.stack([hessian(seed=1), torch.zeros(K, K), hessian(seed=3)])
    q = quantize(w, T[G16.name], hessian=h)
    plain = quantize(w, T[G16.name], importance=h.diagonal(dim1=1, dim2=2))
    for e in (0, 2):
        fed, diagonal = (output_error(w[e], decode(G16, x.data[e], x.codec), h[e]) for x in (q, plain))
        assert fed < 0.8 * diagonal


@ALL_TYPES
def test_sweeps_lower_the_output_error(qtype):
    w, h = weights(), hessian()
    factored = factor(h)
    grid = Grid.of_codec(quantize(w, T[qtype.name], h.diagonal()).codec, qtype, "cpu")
    errors = [
        float(
            module_output_error(
                w - decode_encoded(feedback(w, factored, grid, qtype, sweeps=n), grid), factored.hessian
            )
        )
        for n in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.97 * errors[0]
    assert errors[3] > 0.97 * errors[2]  # two are enough


def output_moment() -> torch.Tensor:
    rng = np.random.default_rng(5)
    g = rng.standard_normal((1000, N)) @ (np.eye(N) + 0.3 * rng.standard_normal((N, N)))
    return torch.from_numpy(g.T @ g).float()


@ALL_TYPES
def test_rows_are_fed_back_where_outputs_are_coupled(qtype):
    w, h, o = weights()[:, :128], hessian()[:128, :128], output_moment()
    columns, both = quantize(w, T[qtype.name], hessian=h), quantize(w, T[qtype.name], hessian=h, outputs=o)
    errors = []
    for q in (columns, both):
        d = w.double() - torch.from_numpy(decode(qtype, q.data, q.codec)).double()
        errors.append(float(((o.double() @ d @ h.double()) * d).sum()))
    assert errors[1] < 0.8 * errors[0]
    whole = ((o.double() @ w.double() @ h.double()) * w.double()).sum()
    assert both.weighted_error == pytest.approx(errors[1] / float(whole), rel=1e-3)


@pytest.mark.parametrize("n_rows", [1, 7, 96])
def test_rows_of_uncoupled_outputs_stay_as_they_are(n_rows):
    w, h = weights()[:n_rows, :128], hessian()[:128, :128]
    o = torch.diag(torch.rand(n_rows) + 0.1)
    assert (
        quantize(w, T[G16.name], hessian=h, outputs=o).data.tobytes()
        == quantize(w, T[G16.name], hessian=h).data.tobytes()
    )


def test_outputs_go_with_a_hessian_and_one_matrix():
    for kwargs in ({"weight": weights()}, {"weight": weights()[None], "hessian": hessian()}):
        with pytest.raises(ValueError, match="single matrix"):
            quantize(type=T[G16.name], outputs=torch.eye(N), **kwargs)


def test_the_paper_has_no_feedback():
    with pytest.raises(ValueError, match="no error feedback"):
        quantize(weights(), T[G16.name], hessian=hessian(), method="paper")
