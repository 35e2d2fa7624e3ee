"""jraph: its graph networks, with update functions in Haiku."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jraph

from benchmarks.third_party.models import Model, normal


def _graph() -> jraph.GraphsTuple:
    """Two graphs in one."""
    return jraph.GraphsTuple(
        nodes=normal(7, 8),
        edges=normal(10, 6),
        globals=normal(2, 4),
        senders=jnp.array([0, 1, 2, 3, 0, 4, 5, 6, 4, 5]),
        receivers=jnp.array([1, 2, 3, 0, 2, 5, 6, 4, 6, 4]),
        n_node=jnp.array([4, 3]),
        n_edge=jnp.array([5, 5]),
    )


def _transformed(function: Callable[[jraph.GraphsTuple], Any]) -> Model:
    """The index arrays are closed over, the features are the arguments."""
    graph = _graph()

    def filled(nodes: jax.Array, edges: jax.Array, context: jax.Array) -> Any:
        return function(graph._replace(nodes=nodes, edges=edges, globals=context))

    net = hk.without_apply_rng(hk.transform(filled))
    args = (graph.nodes, graph.edges, graph.globals)
    return Model(net.apply, net.init(jax.random.key(0), *args), args)


def _mlp(width: int) -> Callable[..., Any]:
    return jraph.concatenated_args(lambda x: hk.nets.MLP([24, width])(x))


def graph_network() -> Model:
    def net(graph: jraph.GraphsTuple) -> Any:
        for _ in range(2):
            graph = jraph.GraphNetwork(_mlp(16), _mlp(16), _mlp(16))(graph)
        return hk.Linear(3)(graph.globals)

    return _transformed(net)


def interaction_network() -> Model:
    def net(graph: jraph.GraphsTuple) -> Any:
        graph = graph._replace(globals={})
        graph = jraph.InteractionNetwork(_mlp(16), _mlp(16))(graph)
        return hk.Linear(3)(graph.nodes)

    return _transformed(net)


def convolution() -> Model:
    def net(graph: jraph.GraphsTuple) -> Any:
        for width in (16, 24):
            layer = jraph.GraphConvolution(
                hk.Linear(width), add_self_edges=True, symmetric_normalization=True
            )
            graph = layer(graph)
            graph = graph._replace(nodes=jax.nn.relu(graph.nodes))
        return hk.Linear(3)(graph.nodes)

    return _transformed(net)


def attention() -> Model:
    def query(nodes: jax.Array) -> jax.Array:
        return hk.Linear(16, name="query")(nodes)

    def logits(sender: jax.Array, receiver: jax.Array, edges: Any) -> jax.Array:
        x = jnp.concatenate((sender, receiver), axis=1)
        return hk.Linear(1, name="logits")(jax.nn.leaky_relu(x))

    def net(graph: jraph.GraphsTuple) -> Any:
        layer = jraph.GAT(query, logits, lambda nodes: jax.nn.elu(nodes))
        return hk.Linear(3)(layer(graph._replace(edges=None)).nodes)

    return _transformed(net)


MODELS: dict[str, Callable[[], Model]] = {
    "graph network": graph_network,
    "interaction network": interaction_network,
    "graph convolution": convolution,
    "graph attention": attention,
}
