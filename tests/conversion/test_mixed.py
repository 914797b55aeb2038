"""The choice of types under a budget, against all combinations."""

import itertools

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

import aaac_gguf as aaac
from aaac_gguf import cli, resources
from aaac_gguf.conversion.calibrate import Calibration
from aaac_gguf.conversion.job import CalibrationInput, Job
from aaac_gguf.conversion.mixed import TypeOption, candidates, choose, measure, mix
from aaac_gguf.conversion.plan import Rounding, TensorPlan, make_plan
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files.gguf import read
from aaac_gguf.files.imatrix import Imatrix
from aaac_gguf.quantizer.moments import Moments
from aaac_gguf.quantizer.quantize import quantize

# Smallest first.
CANDIDATES = (T.Q2_K, T.Q3_K, T["AAAC4_G128"], T["AAAC4_G32"], T["AAAC4_G16"], T.Q5_K, T.Q6_K, T.Q8_0)

OPTIONS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=len(CANDIDATES), unique_by=lambda o: o[0]
)


def tensors(sizes) -> dict[str, list[TypeOption]]:
    return {
        f"t{i}": [TypeOption(t, n, loss / 7) for t, (n, loss) in zip(CANDIDATES, options, strict=False)]
        for i, options in enumerate(sizes)
    }


def total(chosen) -> tuple[int, float]:
    return sum(c.n_bytes for c in chosen), sum(c.loss for c in chosen)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 200))
def test_close_to_the_best_of_all_combinations(sizes, budget):
    choices = tensors(sizes)
    within = [total(c) for c in itertools.product(*choices.values()) if total(c)[0] <= budget]
    chosen = choose(choices, budget)
    if not within:
        assert chosen is None
        return
    assert chosen is not None
    n_bytes, loss = total(chosen.values())
    assert n_bytes <= budget
    # No worse than the best for what the largest step may leave unused.
    largest = max(o.n_bytes for options in choices.values() for o in options)
    assert loss <= min([b for n, b in within if n <= budget - largest], default=float("inf"))


def test_all_that_fits_is_used():
    choices = tensors([[(10, 70), (20, 35), (30, 7)]] * 3)
    for budget, expected in ((30, 30), (59, 50), (60, 60), (1000, 90)):
        chosen = choose(choices, budget)
        assert chosen
        assert total(chosen.values())[0] == expected
    assert choose(choices, 29) is None


def test_a_small_step_does_not_hide_a_good_large_one():
    chosen = choose(tensors([[(10, 700), (20, 693), (30, 0)], [(10, 350), (12, 315)]]), 40)
    assert chosen
    assert [c.n_bytes for c in chosen.values()] == [30, 10]


@pytest.mark.parametrize("losses", [(9, 1), (1, 9)])
def test_the_tensor_that_hurts_most_gets_the_bits(losses):
    choices = {
        name: [TypeOption(T.Q5_K, 10, loss), TypeOption(T.Q6_K, 12, loss / 10)]
        for name, loss in zip("ab", losses, strict=True)
    }
    chosen = choose(choices, 22)
    assert chosen
    assert chosen["ab"[losses.index(9)]].type == T.Q6_K
    assert chosen["ab"[losses.index(1)]].type == T.Q5_K


# Types for the first of four blocks: enough to see that they are chosen.
ONE_BLOCK = ("--calib-sequences", 2, "--calib-length", 32, "--tensor-type", r"blk\.[1-3]=AAAC4_G32")


def convert(source, out, *args) -> int:
    return cli.main(["convert", str(source), "-o", str(out), *map(str, args)])


def test_a_matrix_that_matters_costs_more():
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((32, 256))).float()
    plans = [
        TensorPlan(name, (32, 256), T.F32, T["AAAC4_G16"], Rounding.FEEDBACK, "")
        for name in ("small", "large", "unknown")
    ]
    stakes = {"small": 1.0, "large": 10.0}
    moments = {name: Moments(torch.eye(256), stake * torch.eye(32)) for name, stake in stakes.items()}
    choices = measure(plans, lambda _: weight, moments.get, lambda *_: None, Settings(bpw=4))
    for name, options in choices.items():
        assert [o.type for o in options] == list(CANDIDATES), name
        assert [o.n_bytes for o in options] == sorted(o.n_bytes for o in options)
        assert [o.loss for o in options] == sorted((o.loss for o in options), reverse=True)
    for small, large, unknown in zip(*choices.values(), strict=True):
        assert large.loss == pytest.approx(10 * small.loss, rel=0.05)
        assert small.loss < unknown.loss < large.loss
    # Half of the squared error of the outputs, here of the weights.
    q6_k = choices["small"][CANDIDATES.index(T.Q6_K)]
    assert q6_k.loss == pytest.approx(
        quantize(weight, T.Q6_K).relative_error * float(weight.square().sum()) / 2, rel=0.3
    )


@pytest.mark.parametrize(
    ("n_per_row", "stock", "expected"),
    [
        (256, False, "Q2_K Q3_K AAAC4_G128 AAAC4_G32 AAAC4_G16 Q5_K Q6_K Q8_0"),
        (256, True, "Q2_K Q3_K IQ4_XS Q4_K Q5_K Q6_K Q8_0"),
        (192, False, "AAAC4_G32 AAAC4_G16 Q5_0 Q8_0"),
        (96, True, "IQ4_NL Q5_0 Q8_0"),
        (40, True, ""),
    ],
)
def test_candidates_fit_the_rows(n_per_row, stock, expected):
    assert [t.name for t in candidates(n_per_row, stock)] == expected.split()


def test_without_gradients_the_relative_errors_of_weights_count_alike():
    """Synthetic moments: larger outputs, more of them, or a channel that outweighs the others change little."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 256))).float()
    weights = {"one": weight, "large": 10 * weight, "long": weight.repeat(4, 1), "skewed": weight}
    plans = [TensorPlan(name, tuple(w.shape), T.F32, T.Q4_K, Rounding.FEEDBACK, "") for name, w in weights.items()]
    diagonal = torch.ones(256)
    moments = {name: Moments(torch.diag(diagonal), None) for name in weights}
    diagonal[0] = 1e4
    moments["skewed"] = Moments(torch.diag(diagonal), None)
    choices = measure(plans, weights.get, moments.get, lambda *_: None, Settings(bpw=4, stock=True))
    for one, large, long, skewed in zip(*choices.values(), strict=True):
        assert large.loss == pytest.approx(one.loss, rel=0.02)
        assert long.loss == pytest.approx(one.loss, rel=0.02)
        assert skewed.loss == pytest.approx(one.loss, rel=0.3)


@pytest.mark.parametrize("settings", [{"feedback": False}, {"stock": True}])
def test_a_gguf_without_calibration_has_a_size_to_order(source, tmp_path, settings):
    out = tmp_path / "out.gguf"
    report = aaac.quantize(source, out, size=30_000, **settings)
    assert 29_000 < report.n_bytes <= 30_000
    file = read(out)
    types = {name: t.tensor_type for name, t in file.tensors.items() if name.startswith("blk.0.") and t.shape.size > 1}
    assert len(set(types.values())) > 1
    assert bool(file.codecs) == (not settings.get("stock"))
    assert T.Q8_0 in types.values()
    searched = {t.plan.type for t in report.tensors}
    assert searched
    assert T.Q8_0 not in searched  # without measured moments, search gains nothing at 8 bits


@pytest.mark.parametrize("asked", [(), (("attn_q", "AAAC4_G32"),)])
def test_every_matrix_gets_a_type_but_those_that_have_one(source, asked):
    """A budget for the largest types: all that the budget is for have them."""

    class Unmeasured:
        def moments(self, name):
            return None

    file, settings = read(source), Settings(bpw=16, tensor_types=asked)
    job = Job(source, settings, "measured", CalibrationInput("text", {}), make_plan(file, settings, "measured"), {})
    mixed = mix(job, file, Calibration(Imatrix({}), Unmeasured()))
    before, after = ({p.name: p.type for p in j.plans} for j in (job, mixed))
    free = {"blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.attn_k.weight"} - {
        f"blk.0.{name}.weight" for name, _ in asked
    }
    assert after == before | dict.fromkeys(free, T.Q8_0)


@pytest.mark.slow
@pytest.mark.llama
def test_convert_keeps_the_budget(llama_source, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    size = 2_710_000
    assert convert(resources.MODEL, out, "--size", str(size), *ONE_BLOCK) == 0
    file = read(out)
    assert 0.98 * size < out.stat().st_size <= size
    types = {name: t.tensor_type for name, t in file.tensors.items()}
    chosen = {t for name, t in types.items() if name.startswith("blk.0.") and "norm" not in name}
    assert len(chosen & set(CANDIDATES)) > 1
    assert types["token_embd.weight"] == T.Q6_K
    capsys.readouterr()
    bits = 8 * sum(t.n_bytes for t in file.tensors.values()) / sum(t.n_elements for t in file.tensors.values())
    assert convert(resources.MODEL, tmp_path / "x.gguf", "--bpw", bits + 1e-6, "--dry-run", *ONE_BLOCK) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("blk.") and " x " in line]
    planned = {words[0]: words[5] for words in lines}
    assert planned == {name: types[name].name for name in planned}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bpw", "5", "--size", "1G"], "--bpw and --size: give one of them"),
        (["--stock"], "--stock: is for --bpw and --size"),
        (["--bpw", "5", "--type", "Q4_K_M"], "--type Q4_K_M: --bpw and --size choose the types"),
        (["--size", "5K"], "give a number of bytes, M, G, MiB or GiB"),
        (["--size", "inf"], "give a number of bytes, M, G, MiB or GiB"),
        (["--bpw", "99"], "is not a number of bits per weight"),
    ],
)
def test_refusals(source, tmp_path, capsys, args, message):
    try:
        status = convert(source, tmp_path / "out.gguf", *args)
    except SystemExit as e:
        status = e.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
@pytest.mark.llama
def test_a_budget_that_is_too_small(llama_source, tmp_path, capsys):
    assert convert(resources.MODEL, tmp_path / "out.gguf", "--bpw", 3, *ONE_BLOCK) == 2
    assert "the smallest possible is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
