"""Muon: hidden matrices move along the nearest orthogonal matrix of their momentum (Jordan et al. 2024, "Muon").

All singular values of an update are then about alike, so directions that gradients seldom show are learnt as fast as the others.
torch.optim.Muon takes matrices alone; here kernels are matrices, too, and whatever else there is stays with SGD.
"""

import torch
from torch import Tensor, nn

_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic that drives singular values to about 1 fastest (Jordan 2024)
_ITERATIONS = 3  # enough for image classifiers (Jordan 2024, airbench); language models take 5


def takes_muon(p: nn.Parameter, name: str, head: str, moves: str) -> bool:
    """Whether Muon moves the parameter: kernels and matrices of several inputs, but for the last layer's.

    head: name of the last layer; moves: "matrices", or "kernels" for these alone.
    """
    is_hidden = p.dim() >= 2 and p.shape[1] > 1 and name != f"{head}.weight"
    return is_hidden and (p.dim() > 2 or moves == "matrices")


class Orthogonalize:
    """Hook before an optimizer's step: the gradients of groups that carry "muon_momentum" become Muon's directions.

    With plain SGD (no momentum) behind it this is Muon with decoupled weight decay. dtype: in which the iteration is
    computed; bfloat16 does where the processor has it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        for group in optimizer.param_groups:
            momentum = group.get("muon_momentum")
            for p in group["params"] if momentum is not None else ():
                if p.grad is None:
                    continue
                state = optimizer.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(momentum).add_(p.grad)
                p.grad.copy_(self._direction(p.grad.add(buffer, alpha=momentum)))  # Nesterov's momentum

    def _direction(self, momentum: Tensor) -> Tensor:
        kernel = momentum.movedim(1, -1)  # as channels-last memory lies: no copy is made to flatten it
        matrix = kernel.flatten(1)
        scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
        return orthogonalized(matrix.to(self.dtype)).mul_(scale).view(kernel.shape).movedim(-1, 1)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V' of a matrix U S V', (rows, columns), by Newton-Schulz iterations.

    Singular values from a fiftieth of the matrix's norm become 0.65 to 1.25, smaller ones up to 41 times what they are.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    x = _by_gram(x) if x.shape[1] >= 3 * x.shape[0] else _by_itself(x)
    return (x.T if is_tall else x).contiguous()


def _by_itself(x: Tensor) -> Tensor:
    for _ in range(_ITERATIONS):
        x = torch.addmm(x, _quadratic(x @ x.T), x, beta=_COEFFICIENTS[0])
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same polynomial of x x', worked out on that small square and multiplied to x once: half the time for kernels."""
    gram = x @ x.T
    product = factor = _factor(gram)
    for _ in range(_ITERATIONS - 1):
        gram = factor @ (gram @ factor)
        factor = _factor(gram)
        product = factor @ product
    return product @ x


def _factor(gram: Tensor) -> Tensor:
    factor = _quadratic(gram)
    factor.diagonal().add_(_COEFFICIENTS[0])
    return factor


def _quadratic(gram: Tensor) -> Tensor:
    return torch.addmm(gram, gram, gram, beta=_COEFFICIENTS[1], alpha=_COEFFICIENTS[2])
