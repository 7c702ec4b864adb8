"""Distance from clusters of the sequence's tokens."""

import torch
from jaxtyping import Float
from torch import Tensor

from rsq_stream.algorithm.importance.base import Seen, Strategy

CLUSTERS = 100
CLUSTER_STEPS = 30


def cluster_distance(x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T"]:
    """Score tokens by their distance from the nearest of 100 k-means centres.

    There is a centre for 8 tokens at most. The centres start as tokens evenly spread
    over the sequence, so that the answer is always the same; a centre that loses all
    tokens stays where it is.
    """
    return torch.stack([_cluster_distance(x_TD.float()) for x_TD in x_BTD])


def _cluster_distance(x_TD: Tensor) -> Tensor:
    tokens = x_TD.shape[0]
    count = max(1, min(CLUSTERS, tokens // 8))
    start_C = torch.arange(count, device=x_TD.device) * tokens // count
    centre_CD = x_TD[start_C].clone()
    before_T = torch.full_like(x_TD[:, 0], -1).long()
    for _ in range(CLUSTER_STEPS):
        nearest_T = _distances(x_TD, centre_CD).argmin(1)
        if torch.equal(nearest_T, before_T):
            break  # all further steps would find the same centres
        before_T = nearest_T
        # One product per step, not a sum of scattered rows: the same bits each time.
        member_TC = torch.nn.functional.one_hot(nearest_T, count).float()
        size_C = member_TC.sum(0)
        mean_CD = (member_TC.T @ x_TD) / size_C.clamp(min=1)[:, None]
        centre_CD = torch.where(size_C[:, None] > 0, mean_CD, centre_CD)
    return _distances(x_TD, centre_CD).amin(1)


def _distances(x_TD: Tensor, centre_CD: Tensor) -> Tensor:
    # Not by products: beside a sink, the differences of the others would cancel.
    exactly = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x_TD, centre_CD, compute_mode=exactly)


def score(seen: Seen) -> Float[Tensor, "B T"]:
    """Score tokens by their distance from clusters of the block's input."""
    return cluster_distance(seen.x_BTD)


STRATEGY = Strategy(help="distance from clusters of tokens", score=score)
