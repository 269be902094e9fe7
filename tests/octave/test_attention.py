import numpy as np
import pytest
import torch
from torch import nn

from octvideo.octave import GlobalReasoning, NonLocal, Octave


def randomized(alpha: float, form: str = "softmax", pool: tuple[int, ...] = (1, 2, 2)) -> NonLocal:
    torch.manual_seed(0)
    block = NonLocal(16, 8, form=form, alpha=alpha, pool=pool).double().eval()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if name == "bn.weight" else 0.0, std=0.5)
    nn.init.normal_(block.bn.running_mean)
    nn.init.uniform_(block.bn.running_var, 0.5, 2)
    return block


def linear(layer: nn.Conv3d, x: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    weight = layer.weight.detach().numpy()[rows, columns, 0, 0, 0]
    return np.einsum("oc,ncl->nol", weight, x) + layer.bias.detach().numpy()[rows][None, :, None]


def attention(
    block: NonLocal, queries: np.ndarray, keys: np.ndarray, high: slice, low: slice, inner: int
) -> np.ndarray:
    """The block in NumPy: queries [N, C, L], keys [N, C', S] -> [N, C, L]."""
    rows = slice(0, inner)
    theta = linear(block.theta, queries, rows, high)
    phi, g = linear(block.phi, keys, rows, low), linear(block.g, keys, rows, low)
    scores = np.einsum("ncl,ncs->nls", theta, phi)
    if block.form == "softmax":
        scores = np.exp(scores / np.sqrt(inner))
        scores /= scores.sum(2, keepdims=True)
    else:
        scores /= keys.shape[2]
    y = linear(block.out, np.einsum("nls,ncs->ncl", scores, g), high, rows)
    mean, var, weight, bias = (
        t.detach().numpy()[high][None, :, None]
        for t in (block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias)
    )
    return queries + (y - mean) / np.sqrt(var + block.bn.eps) * weight + bias


@pytest.mark.parametrize("form", ["softmax", "dot_product"])
def test_one_frequency_against_numpy(form: str) -> None:
    block, x = randomized(0.0, form), torch.randn(2, 16, 3, 4, 6, dtype=torch.float64)
    pooled = x.numpy().reshape(2, 16, 3, 2, 2, 3, 2).max((4, 6))
    everything = slice(None)
    expected = attention(block, x.flatten(2).numpy(), pooled.reshape(2, 16, -1), everything, everything, 8)
    np.testing.assert_allclose(block(x).flatten(2).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("form", ["softmax", "dot_product"])
@pytest.mark.parametrize("pool", [(1, 2, 2), (2, 2, 2)])
def test_queries_from_high_keys_and_values_from_low(form: str, pool: tuple[int, ...]) -> None:
    block = randomized(0.25, form, pool)
    x = Octave(
        torch.randn(2, 12, 3, 5, 6, dtype=torch.float64),
        torch.randn(2, 4, -(-3 // pool[0]), 3, 3, dtype=torch.float64),
    )
    y = block(x)
    queries, keys = x.high.flatten(2).numpy(), x.low.flatten(2).numpy()
    expected = attention(block, queries, keys, slice(0, 12), slice(12, None), 6)
    np.testing.assert_allclose(y.high.flatten(2).detach().numpy(), expected, atol=1e-10)
    assert y.low is x.low


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
def test_state_dict_is_the_vanilla_block_s(alpha: float) -> None:
    vanilla, octave = NonLocal(512, 256).state_dict(), NonLocal(512, 256, alpha=alpha).state_dict()
    assert [(k, v.shape) for k, v in octave.items()] == [(k, v.shape) for k, v in vanilla.items()]


def test_a_new_block_changes_nothing_and_trains() -> None:
    block = NonLocal(16, 8, alpha=0.25)
    x = Octave(torch.randn(2, 12, 2, 4, 4), torch.randn(2, 4, 2, 2, 2))
    y = block(x)
    assert torch.equal(y.high, x.high)
    y.high.square().sum().backward()
    assert block.bn.weight.grad[:12].abs().sum() > 0 and block.bn.weight.grad[12:].abs().sum() == 0
    assert block.bn.num_batches_tracked == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="form is 'mean'; allowed: softmax, dot_product"):
        NonLocal(16, 8, form="mean")
    with pytest.raises(ValueError, match="leaves the non-local block no high channels"):
        NonLocal(16, 8, alpha=1.0)
    with pytest.raises(ValueError, match="12 \\+ 4 channels"):
        NonLocal(16, 8, alpha=0.25)(torch.randn(1, 16, 2, 4, 4))


def test_global_reasoning_against_numpy() -> None:
    """X + out(GCN(X_state X_proj^T) X_proj) of arXiv 1811.12814, with the norm at rest."""
    torch.manual_seed(0)
    unit = GlobalReasoning(8, 3).eval()
    nn.init.ones_(unit.bn.weight)
    x = torch.randn(2, 8, 4, 5)
    w = {name: value.double().numpy() for name, value in unit.state_dict().items()}
    flat = x.double().flatten(2).numpy()
    state = np.einsum("sc,ncp->nsp", w["state.weight"][:, :, 0, 0], flat) + w["state.bias"][:, None]
    projection = np.einsum("gc,ncp->ngp", w["projection.weight"][:, :, 0, 0], flat) + w["projection.bias"][:, None]
    nodes = np.einsum("nsp,ngp->nsg", state, projection)
    mixed = np.einsum("gh,nsh->nsg", w["node_mix.weight"][:, :, 0], nodes) + w["node_mix.bias"] + nodes
    reasoned = np.einsum("st,ntg->nsg", w["state_mix.weight"][:, :, 0], np.maximum(mixed, 0))
    back = np.einsum("nsg,ngp->nsp", reasoned, projection)
    out = np.einsum("cs,nsp->ncp", w["out.weight"][:, :, 0, 0], back) / np.sqrt(1 + 1e-5)
    expected = (flat + out).reshape(x.shape)
    np.testing.assert_allclose(unit(x).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_new_global_reasoning_unit_changes_nothing() -> None:
    torch.manual_seed(0)
    x = Octave(torch.randn(2, 6, 5, 7), torch.randn(2, 2, 3, 4))
    y = GlobalReasoning(8, 4, alpha=0.25)(x)
    assert torch.equal(y.high, x.high) and torch.equal(y.low, x.low)
