"""Which neurons of a dense feed-forward block go to which expert.

The neurons that matter for almost every token are copied into every expert: together they act as the shared
expert that Mixtral's architecture lacks. The rest are clustered into experts of equal size, so that neurons
that work on the same tokens share an expert (co-activation clustering, after MoEfication, arXiv 2110.01786,
section 3.2).

Letters: T tokens, M neurons of the dense block, E experts, R routed neurons (M minus the shared ones), S
shared.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared_neurons(contribution_TM: Tensor, count: int) -> Tensor:
    """The ``count`` neurons with the largest mean squared contribution.

    Args:
        contribution_TM: size of what each neuron adds to the block's output, any float dtype.
        count: how many; 0 gives an empty tensor.

    Returns: neuron numbers [count], int64, ascending.

    Raises:
        ValueError: ``count`` is negative or exceeds the neurons.
    """
    neurons = contribution_TM.shape[1]
    if not 0 <= count <= neurons:
        raise ValueError(f"count={count} is outside 0..{neurons}, the neurons of contribution_TM")
    power_M = contribution_TM.float().square().mean(0)
    return power_M.topk(count).indices.sort().values


def balanced_assignment(score_RE: Tensor) -> Tensor:
    """Gives every row one column and every column equally many rows, greedily, those that care most first.

    Args:
        score_RE: how well row r fits column e, larger is better.

    Returns: column of each row [R], int64.

    Raises:
        ValueError: R is no multiple of E.
    """
    rows, columns = score_RE.shape
    if rows % columns:
        raise ValueError(f"{rows} neurons cannot be split into {columns} equal groups")
    room = [rows // columns] * columns
    best_RE = score_RE.argsort(dim=1, descending=True, stable=True)
    ranked_RE = score_RE.gather(1, best_RE)
    # Rows with most to lose choose first.
    regret_R = ranked_RE[:, 0] - ranked_RE[:, min(1, columns - 1)]
    choice_R = torch.empty(rows, dtype=torch.int64)
    preference = best_RE.tolist()
    for r in regret_R.argsort(descending=True, stable=True).tolist():
        column = next(c for c in preference[r] if room[c])
        room[column] -= 1
        choice_R[r] = column
    return choice_R


def cluster_neurons(feature_RT: Tensor, experts: int, seed: int, rounds: int = 12) -> Tensor:
    """Balanced spherical k-means of neurons by their activity over tokens.

    Args:
        feature_RT: activity of each neuron on each token; only its direction matters.
        experts: number of groups E; must divide R.
        seed: of the initial centres (k-means++).

    Returns: expert of each neuron [R], int64; every expert gets exactly R / E neurons.

    Raises:
        ValueError: R is no multiple of E.
    """
    rows = feature_RT.shape[0]
    if experts < 1 or rows % experts:
        raise ValueError(f"{rows} neurons cannot be split into experts={experts} equal groups")
    unit_RT = torch.nn.functional.normalize(feature_RT.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centre = int(torch.randint(rows, (1,), generator=generator))
    centres = [unit_RT[centre]]
    distance_R = 1 - unit_RT @ centres[0]
    for _ in range(experts - 1):
        centre = int(torch.multinomial(distance_R.clamp_min(1e-9), 1, generator=generator))
        centres.append(unit_RT[centre])
        distance_R = torch.minimum(distance_R, 1 - unit_RT @ centres[-1])
    centre_ET = torch.stack(centres)
    choice_R = torch.full((rows,), -1)
    for _ in range(rounds):
        new_R = balanced_assignment(unit_RT @ centre_ET.T)
        if torch.equal(new_R, choice_R):
            break
        choice_R = new_R
        centre_ET = torch.stack([unit_RT[choice_R == e].mean(0) for e in range(experts)])
        centre_ET = torch.nn.functional.normalize(centre_ET, dim=1)
    return choice_R


def random_partition(rows: int, experts: int, seed: int) -> Tensor:
    """The control: every neuron in a random expert, all experts of equal size. Returns [rows], int64."""
    if experts < 1 or rows % experts:
        raise ValueError(f"{rows} neurons cannot be split into experts={experts} equal groups")
    order_R = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    choice_R = torch.empty(rows, dtype=torch.int64)
    choice_R[order_R] = torch.arange(rows) % experts
    return choice_R
