"""Mixture of experts (MoE): routing and its losses, and the experts' feed-forward on one device and over a mesh."""

from sdar_jax.experts.low_rank import ExpertAdapters as ExpertAdapters
from sdar_jax.experts.low_rank import LowRank as LowRank
from sdar_jax.experts.mesh import expert_mlp as expert_mlp
from sdar_jax.experts.routing import RouterSums as RouterSums
from sdar_jax.experts.routing import Routing as Routing
from sdar_jax.experts.routing import Scoring as Scoring
from sdar_jax.experts.routing import balance_loss as balance_loss
from sdar_jax.experts.routing import max_load as max_load
from sdar_jax.experts.routing import route as route
from sdar_jax.experts.routing import route_by_sigmoid as route_by_sigmoid
from sdar_jax.experts.routing import router_sums as router_sums
from sdar_jax.experts.routing import z_loss as z_loss
