"""Every operator under the kinds of differentiation that torch has: right, or refused by an error that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_opcheck import OPERATORS, samples
from torch import Tensor
from torch.autograd import forward_ad

NAMES = [name.removeprefix("mom::") for name in OPERATORS]
DIFFERENTIABLE = [name for name in NAMES if any(isinstance(x, Tensor) and x.requires_grad for x in samples()[name]())]
IN_PLACE = [name for name in NAMES if name.endswith("_")]


def _operator(name: str) -> Any:
    return getattr(torch.ops.mom, name).default


def _arguments(name: str) -> list[Any]:
    """Of the operator's sample, in float64."""
    arguments: list[Any] = []
    for x in samples()[name]():
        double = isinstance(x, Tensor) and x.is_floating_point()
        arguments.append(x.detach().double().requires_grad_(x.requires_grad) if double else x)
    return arguments


def _call(name: str, arguments: list[Any]) -> tuple[Any, list[Tensor]]:
    """A function of the leaves alone that gives the differentiable results, and the leaves."""
    places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]
    # Pad rows must stay zero.
    real = [(arguments[i].detach() != 0).flatten(1).any(1) if arguments[i].dim() > 1 else None for i in places]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = list(arguments)
        for place, leaf, rows in zip(places, leaves, real, strict=True):
            values[place] = leaf if rows is None else leaf * rows.view(-1, *[1] * (leaf.dim() - 1))
        results = _operator(name)(*values)
        return tuple(x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad)

    return function, [arguments[i] for i in places]


def _squares(results: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([x.square().sum() for x in results]).sum()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, leaves = _call(name, _arguments(name))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(name: str) -> None:
    function, leaves = _call(name, _arguments(name))
    with pytest.raises(
        RuntimeError, match=r"backward through mom\.\w+\.default but|mom::\w+ must be differentiated once"
    ):
        grads = torch.autograd.grad(_squares(function(*leaves)), leaves, create_graph=True)
        torch.autograd.grad(_squares(grads), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused(name: str) -> None:
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in samples()[name]()]
    message = f"mom::{name} must get arguments without a tangent, got forward-mode differentiation"
    for place, value in enumerate(arguments):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            continue
        values = list(arguments)

        def function(x: Tensor, place: int = place, values: list[Any] = values) -> Any:
            values[place] = x
            return _operator(name)(*values)

        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            function(forward_ad.make_dual(value, torch.ones_like(value)))
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(function, (value,), (torch.ones_like(value),))
    with forward_ad.dual_level():  # no tangent among the arguments
        _operator(name)(*arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_or_refused(name: str) -> None:
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in samples()[name]()]
    place = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        results = _operator(name)(*arguments[:place], x, *arguments[place + 1 :])
        return results if isinstance(results, tuple) else (results,)

    both = torch.stack([arguments[place], arguments[place].flip(0)])
    if name in IN_PLACE:
        with pytest.raises(RuntimeError, match=f"Batching rule not implemented for mom::{name}"):
            torch.vmap(function)(both)
        return
    expected = [torch.stack(parts) for parts in zip(*(function(x) for x in both), strict=True)]
    assert all(torch.equal(a, e) for a, e in zip(torch.vmap(function)(both), expected, strict=True))
