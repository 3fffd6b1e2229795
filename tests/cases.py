"""Random layers for the tests, and the rule by which results are compared.

Letters: T tokens, H hidden, E routed experts, K chosen, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flex_kernels import Experts, Personal, Routed, Router, Shared, reference


@dataclass(frozen=True)
class Case:
    """One random layer and its input."""

    x_TH: Tensor
    router: Router | Routed
    experts: Experts
    personal: Personal | None
    shared: Shared | None

    def tensors(self) -> dict[str, Tensor]:
        """Every float tensor by name."""
        found = {"x": self.x_TH}
        for part in ("router", "experts", "personal", "shared"):
            record = getattr(self, part)
            for name, value in vars(record).items() if record is not None else ():
                if (
                    isinstance(value, Tensor)
                    and value.is_floating_point()
                    and (part, name) != ("router", "bias")
                ):
                    found[f"{part}.{name}"] = value
        return found

    def to(self, dtype: torch.dtype) -> Case:
        """A copy in another dtype, detached; float64 turns the case into its own yardstick."""

        def convert(record):
            changed = {
                k: v.detach().to(dtype)
                for k, v in vars(record).items()
                if isinstance(v, Tensor) and v.is_floating_point()
            }
            return replace(record, **changed)

        parts = [
            None if r is None else convert(r) for r in (self.router, self.experts, self.personal, self.shared)
        ]
        return Case(self.x_TH.detach().to(dtype), *parts)

    def requiring(self, *names: str) -> Case:
        """The same case with ``requires_grad`` on the named tensors, on all of them without names."""
        for name, t in self.tensors().items():
            t.requires_grad_(not names or name in names)
        return self


def make_case(
    T: int = 7,
    H: int = 24,
    E: int = 5,
    K: int = 2,
    I: int = 12,
    dtype: torch.dtype = torch.float32,
    personal: bool = True,
    shared: str = "gated",
    seed: int = 0,
    personal_width: int = 10,
    shared_width: int = 14,
    router: dict | None = None,
) -> Case:
    """A layer of unit-scale activations. ``shared`` is "gated", "plain" or "none"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5).to(dtype)

    own = Personal(
        normal(2 * personal_width, H, fan_in=H),
        normal(H, personal_width, fan_in=personal_width),
        normal(H, fan_in=H),
        normal(),
    )
    common = Shared(
        normal(2 * shared_width, H, fan_in=H),
        normal(H, shared_width, fan_in=shared_width),
        normal(H, fan_in=H) if shared == "gated" else None,
    )
    return Case(
        normal(T, H),
        Router(normal(E, H, fan_in=H), K, **(router or {})),
        Experts(normal(E, 2 * I, H, fan_in=H), normal(E, H, I, fan_in=I)),
        own if personal else None,
        None if shared == "none" else common,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinite when ``got`` is not finite."""
    got, want = got.detach().double(), want.detach().double()
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_close(got: Tensor, exact: Tensor, plain: Tensor, multiple: float, what: str) -> None:
    """The error against the float64 result may be ``multiple`` times the one of plain torch in the same
    dtype.

    A floor of a few units in the last place keeps lucky roundings of the plain version from failing the test;
    of more units for a single number, a sum whose terms cancel.
    """
    floor = (4 if got.numel() > 1 else 32) * torch.finfo(got.dtype).eps
    allowed = multiple * relative_error(plain, exact) + floor
    found = relative_error(got, exact)
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    assert found <= allowed, f"{what}: relative error {found:.3g}, allowed {allowed:.3g}"


def with_fixed_routing(case: Case) -> Case:
    """The case with its float64 routing decision fixed, so that dtypes are compared on the same experts."""
    ids_TK, _, _ = reference.route(
        case.x_TH.detach().double(), replace(case.router, weight=case.router.weight.detach().double())
    )
    weights_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(1)).to(case.x_TH.dtype)
    return replace(case, router=Routed(ids_TK, weights_TK))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            # The interpreter moves storages about as bytes and with set_; neither is a buffer of the layer's.
            own = (
                isinstance(t, torch.Tensor)
                and t.is_floating_point()
                and func.overloadpacket != torch.ops.aten.set_
            )
            if own and not (t._is_view() or func.is_view):
                self.numel = max(self.numel, t.numel())
        return out
