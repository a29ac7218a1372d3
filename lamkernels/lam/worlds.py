"""Synthetic worlds whose endogenous and exogenous parts are known: samples, and exact population moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lamkernels.validation import check_integer, check_number


class PopulationCovariance:
    """Exact moments of blocks that are linear in independent sources of mean 0 and variance 1.

    Args:
        forms: by block name, (d, S + 1) fp64: the coefficients of the S sources, then the mean.
    """

    def __init__(self, forms: Mapping[str, Tensor]) -> None:
        self.forms = dict(forms)

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """By block name: (d,) fp64."""
        return {name: form[:, -1] for name, form in self.forms.items()}

    def covariance(self, first: str, second: str) -> Tensor:
        """Cov(first, second), (d_first, d_second) fp64.

        Raises:
            KeyError: there is no such block.
        """
        return self.forms[first][:, :-1] @ self.forms[second][:, :-1].mT


@dataclass(frozen=True)
class World:
    """o = E s + F ξ, s' = A_s s + B_s a + w, ξ' = A_ξ ξ + ε: an agent that acts before a background that does not care.

    Blocks, all (N, ·) fp64, by name:

    - "s", "s_next" (m), "xi", "xi_next" (n), "a" (p), "eps" (n): the states, the action and the exogenous innovation;
    - "o", "o_next" (d), and "o_ahead" (d), ``horizon`` steps after o, with new actions in between;
    - "o_view", "o_next_view" (d₂): the same (s, a, w) in front of another background "xi_view", "xi_next_view", whose
      innovation is "eps_view" (n);
    - "flow" (m): s' − s with noise.

    s and ξ are normal, the action of a policy without determinism is uniform, everything else is normal.

    Attributes:
        E: (d, m) fp64.
        F: (d, n).
        A_s: (m, m).
        B_s: (m, p), p ≤ m.
        A_xi: (n, n).
        action_covariance: (p, p), of the actions that are played, at any determinism.
        eps_covariance: (n, n), Σ_ε.
        w_covariance: (m, m), of the endogenous noise; zero by default.
        s_covariance: (m, m), positive definite; the identity by default.
        xi_covariance: (n, n); the identity by default.
        s_mean: (m,); zero by default.
        xi_mean: (n,); zero by default.
        determinism: δ in [0, 1]: the share of the action's variance that is linear in s; 0 plays at random, 1 is affine
            in s.
        coupling: c in [−1, 1]: correlation of ε with what the policy plays at random, whitened entry by whitened entry.
        view_correlation: in [−1, 1], of the two backgrounds, in ξ and ε.
        E_view: (d₂, m), E by default.
        F_view: (d₂, n), F by default.
        flow_noise: standard deviation of the noise of "flow", in units of s.
        horizon: h ≥ 1, steps from "o" to "o_ahead".

    Raises:
        TypeError: a number has the wrong type.
        ValueError: shapes do not fit, or a number is out of range.
    """

    E: Tensor
    F: Tensor
    A_s: Tensor
    B_s: Tensor
    A_xi: Tensor
    action_covariance: Tensor
    eps_covariance: Tensor
    w_covariance: Tensor | None = None
    s_covariance: Tensor | None = None
    xi_covariance: Tensor | None = None
    s_mean: Tensor | None = None
    xi_mean: Tensor | None = None
    determinism: float = 0.0
    coupling: float = 0.0
    view_correlation: float = 0.0
    E_view: Tensor | None = None
    F_view: Tensor | None = None
    flow_noise: float = 0.0
    horizon: int = 1
    _forms: dict[str, Tensor] = field(init=False, repr=False, compare=False)
    _uniform: slice = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("E", "F", "B_s"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.ndim != 2:
                raise ValueError(f"{name} is {value!r}; it must be a tensor with two axes")
        check_integer("horizon", self.horizon)
        check_number("flow_noise", self.flow_noise, lambda v: 0 <= v < math.inf, "at least 0 and finite")
        check_number("determinism", self.determinism, lambda v: 0 <= v <= 1, "in [0, 1]")
        for name in ("coupling", "view_correlation"):
            check_number(name, getattr(self, name), lambda v: -1 <= v <= 1, "in [-1, 1]")
        (d, m), n, p = self.E.shape, self.F.shape[-1], self.B_s.shape[-1]
        if p > m:
            raise ValueError(f"B_s is {tuple(self.B_s.shape)}; it must be (m, p) with p at most m")
        d_view = d if self.E_view is None else len(self.E_view)
        eye_m, eye_n = (torch.eye(size, dtype=torch.float64) for size in (m, n))
        wanted = {
            "E": (d, m), "F": (d, n), "A_s": (m, m), "B_s": (m, p), "A_xi": (n, n), "action_covariance": (p, p),
            "eps_covariance": (n, n), "w_covariance": (m, m), "s_covariance": (m, m), "xi_covariance": (n, n),
            "s_mean": (m,), "xi_mean": (n,), "E_view": (d_view, m), "F_view": (d_view, n),
        }  # fmt: skip
        defaults = {
            "w_covariance": 0 * eye_m, "s_covariance": eye_m, "xi_covariance": eye_n, "s_mean": 0 * eye_m[0],
            "xi_mean": 0 * eye_n[0], "E_view": self.E, "F_view": self.F,
        }  # fmt: skip
        for name, shape in wanted.items():
            value = getattr(self, name)
            value = defaults[name] if value is None else value
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} is {got}; it must be a tensor {shape}")
            object.__setattr__(self, name, value.double())
        forms, uniform = _linear_forms(self)
        object.__setattr__(self, "_forms", forms)
        object.__setattr__(self, "_uniform", uniform)

    def population(self) -> PopulationCovariance:
        """The exact moments of all blocks."""
        return PopulationCovariance(self._forms)

    def sample(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws n independent transitions.

        Args:
            n: N ≥ 1.
            generator: on the CPU.

        Returns:
            The blocks by name, (N, ·) fp64 on the CPU.

        Raises:
            TypeError: n is not an int.
            ValueError: n is below 1.
        """
        check_integer("n", n)
        sources = torch.randn(n, self._forms["o"].shape[1], generator=generator, dtype=torch.float64)
        noise = sources[:, self._uniform]
        noise.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        sources[:, -1] = 1  # the place of the mean
        return {name: sources @ form.mT for name, form in self._forms.items()}

    @property
    def q_covariance(self) -> Tensor:
        """Σ_q (m, m) = B_s Cov(a | s) B_sᵀ + Σ_w: the covariance of the endogenous innovation."""
        played = (1 - self.determinism) * self.action_covariance
        covariance: Tensor = self.B_s @ played @ self.B_s.mT
        return covariance + self._given("w_covariance")

    @property
    def endogenous_rows(self) -> Tensor:
        """(p, d): B_s⁺ times the rows of [E F]⁺ that read s: an ideal encoder, D E B_s = I and D F = 0.

        It needs [E F] and B_s of full column rank.
        """
        reads: Tensor = torch.linalg.pinv(torch.cat([self.E, self.F], 1))[: self.E.shape[1]]
        rows: Tensor = torch.linalg.pinv(self.B_s) @ reads
        return rows

    def _given(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        return value


def make_world(
    *,
    endogenous: int = 4,
    exogenous: int = 4,
    observation: int | None = None,
    actions: int | None = None,
    action_variance: float | Tensor = 1.0,
    eps_variance: float | Tensor = 1.0,
    condition: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> World:
    """A random world: [E F] with a chosen condition number, stable dynamics, B_s with orthonormal columns.

    With ``condition`` 1 the columns of [E F] are orthonormal, and Σ_q = σ_a² I where p = m.

    Args:
        endogenous: m.
        exogenous: n.
        observation: d ≥ m + n; m + n by default.
        actions: p ≤ m; m by default.
        action_variance: σ_a², or (p,) for each entry.
        eps_variance: σ_ε², or (n,) for each entry.
        condition: of [E F], at least 1: its singular values go from 1 down to 1 / condition in equal ratios.
        seed: of the matrices.
        options: further attributes of :class:`World`.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range.
    """
    m, n = endogenous, exogenous
    d, p = m + n if observation is None else observation, m if actions is None else actions
    for name, size in (("endogenous", m), ("exogenous", n), ("observation", d), ("actions", p)):
        check_integer(name, size)
    if p > m:
        raise ValueError(f"actions is {p}; it must be at most endogenous = {m}")
    if d < m + n:
        raise ValueError(f"observation is {d}; it must be at least endogenous + exogenous = {m + n}")
    check_number("condition", condition, lambda value: 1 <= value < math.inf, "at least 1 and finite")
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> Tensor:
        normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(normal)[0]
        return basis

    def diagonal(variance: float | Tensor, size: int) -> Tensor:
        return torch.diag(torch.as_tensor(variance, dtype=torch.float64).expand(size))

    singular = torch.logspace(0, -math.log10(condition), m + n, dtype=torch.float64)
    mixing = orthonormal(d, m + n) * singular @ orthonormal(m + n, m + n).mT
    return World(
        E=mixing[:, :m],
        F=mixing[:, m:],
        A_s=0.8 * orthonormal(m, m),
        B_s=orthonormal(m, p),
        A_xi=0.9 * orthonormal(n, n),
        action_covariance=diagonal(action_variance, p),
        eps_covariance=diagonal(eps_variance, n),
        **options,
    )


def _linear_forms(world: World) -> tuple[dict[str, Tensor], slice]:
    """Every block as a matrix over the sources and the constant 1, and which sources are uniform."""
    m, p, n, h = world.E.shape[1], world.B_s.shape[1], world.F.shape[1], world.horizon
    sizes = {f"u{t}": p for t in range(h)}  # what the policy plays at random comes first: it is uniform
    sizes |= {f"{kind}{t}": size for t in range(h) for kind, size in (("w", m), ("eps", n))}
    sizes |= {"s": m, "xi": n, "xi_view": n, "eps_view": n, "flow": m}
    total = sum(sizes.values()) + 1
    sources, start = {}, 0
    for name, size in sizes.items():
        sources[name] = torch.eye(total, dtype=torch.float64)[start : start + size]
        start += size

    def constant(mean: Tensor) -> Tensor:
        return torch.cat([mean.new_zeros(len(mean), total - 1), mean[:, None]], 1)

    roots = {name: _root(name, world._given(f"{name}_covariance")) for name in ("action", "eps", "w", "s", "xi")}
    coupled = torch.zeros(n, p, dtype=torch.float64)
    coupled.fill_diagonal_(world.coupling)  # the first min(n, p) entries of ε follow the action
    own = torch.diag((1 - coupled.square().sum(1)).sqrt())
    policy = roots["action"] @ torch.linalg.solve(roots["s"], torch.eye(m, dtype=torch.float64))[:p]  # K Σ_s Kᵀ = Σ_a
    r, d = world.view_correlation, world.determinism

    s = roots["s"] @ sources["s"]
    steps = [(s + constant(world._given("s_mean")), roots["xi"] @ sources["xi"] + constant(world._given("xi_mean")))]
    actions, innovations = [], []
    for t in range(h):
        s, xi = steps[-1]
        a = math.sqrt(d) * policy @ s + math.sqrt(1 - d) * roots["action"] @ sources[f"u{t}"]
        eps = roots["eps"] @ (coupled @ sources[f"u{t}"] + own @ sources[f"eps{t}"])
        steps.append((world.A_s @ s + world.B_s @ a + roots["w"] @ sources[f"w{t}"], world.A_xi @ xi + eps))
        actions.append(a)
        innovations.append(eps)
    (s, xi), (s_next, xi_next), (s_ahead, xi_ahead) = steps[0], steps[1], steps[-1]
    mean = constant(world._given("xi_mean"))
    xi_view = mean + r * (xi - mean) + math.sqrt(1 - r * r) * roots["xi"] @ sources["xi_view"]
    eps_view = r * innovations[0] + math.sqrt(1 - r * r) * roots["eps"] @ sources["eps_view"]
    xi_next_view = world.A_xi @ xi_view + eps_view
    E, F, E_view, F_view = world.E, world.F, world._given("E_view"), world._given("F_view")
    forms = {
        "s": s, "s_next": s_next, "xi": xi, "xi_next": xi_next, "a": actions[0], "eps": innovations[0],
        "o": E @ s + F @ xi, "o_next": E @ s_next + F @ xi_next, "o_ahead": E @ s_ahead + F @ xi_ahead,
        "xi_view": xi_view, "xi_next_view": xi_next_view, "eps_view": eps_view,
        "o_view": E_view @ s + F_view @ xi_view, "o_next_view": E_view @ s_next + F_view @ xi_next_view,
        "flow": s_next - s + world.flow_noise * sources["flow"],
    }  # fmt: skip
    return forms, slice(0, h * p)


def _root(name: str, covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    least, slack = float(values[0]), 1e-12 * float(values[-1].abs())
    if least < -slack or (name == "s" and least <= slack):  # the policy divides by the scale of s
        kind = "definite" if name == "s" else "semi-definite"
        raise ValueError(f"{name}_covariance has the eigenvalue {least}; it must be positive {kind}")
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return root
