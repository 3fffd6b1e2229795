"""How rows become clients: by a field's value, a few categories each, Dirichlet shares, or at random.

Every scheme is a table of shares: which part of each category's rows goes to which client. The rows of a
category are shuffled from the seed and dealt in those parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flex.config import ConfigError, Partition
from flex.rows import Row
from flex.seeds import generator

Shares = dict[str, dict[str, float]]
"""Category (or field value) -> client -> part of that category's rows; parts of a category add up to 1 (or it
is unused).
"""


def shares_for(rows: Sequence[Row], partition: Partition, seed: int) -> Shares:
    """Draws the table of shares.

    ``field``: each value of ``partition.field`` is a client.
    ``pathological``: ``categories_per_client`` categories each, dealt in turn from a shuffled list; clients
        with the same category share it equally (after McMahan et al., arXiv 1602.05629, section 3).
    ``dirichlet``: a category's parts are drawn from Dirichlet(alpha, ..., alpha) (Hsu et al., arXiv
    1909.06335). ``iid``: equal parts of everything.

    Raises:
        ConfigError: more categories per client than there are.
    """
    groups = sorted({group_of(row, partition) for row in rows})
    if partition.scheme == "field":
        return {value: {value: 1.0} for value in groups}
    width = len(str(partition.clients - 1))
    clients = [f"client-{i:0{width}d}" for i in range(partition.clients)]
    if partition.scheme == "iid":
        return {group: dict.fromkeys(clients, 1 / len(clients)) for group in groups}
    rng = generator(seed, "partition")
    if partition.scheme == "dirichlet":
        drawn = {group: rng.dirichlet(np.full(len(clients), partition.alpha)) for group in groups}
        return {group: dict(zip(clients, parts.tolist())) for group, parts in drawn.items()}
    each = partition.categories_per_client
    if each > len(groups):
        raise ConfigError(
            f"partition.categories_per_client={each} exceeds the {len(groups)} categories of the data: "
            f"{', '.join(groups)}"
        )
    order = [groups[i] for i in rng.permutation(len(groups))]
    holders: dict[str, list[str]] = {group: [] for group in groups}
    for c, client in enumerate(clients):
        for j in range(each):
            holders[order[(c * each + j) % len(order)]].append(client)
    return {group: {client: 1 / len(held) for client in held} for group, held in holders.items()}


def deal(
    rows: Sequence[Row], shares: Shares, partition: Partition, seed: int, purpose: str
) -> list[tuple[str, list[Row]]]:
    """(client, its rows in the data's order) for every client of ``shares``, also those that get no row."""
    dealt: dict[str, list[int]] = {client: [] for parts in shares.values() for client in parts}
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(group_of(row, partition), []).append(i)
    for group, indices in sorted(members.items()):
        parts = shares.get(group)
        if not parts:
            continue
        shuffled = [indices[i] for i in generator(seed, "deal", purpose, group).permutation(len(indices))]
        # Rounded, so that equal parts of n rows never differ by more than one.
        cuts = np.rint(np.cumsum(list(parts.values())) * len(shuffled)).astype(int).tolist()
        for client, start, end in zip(parts, [0, *cuts], cuts):
            dealt[client].extend(shuffled[start:end])
    return [(client, [rows[i] for i in sorted(indices)]) for client, indices in sorted(dealt.items())]


def group_of(row: Row, partition: Partition) -> str:
    return getattr(row, partition.field) if partition.scheme == "field" else row.category
