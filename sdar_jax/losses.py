"""Weighted cross-entropy of a linear head that never holds [tokens, vocabulary] and reads weighted tokens alone."""

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.devices.chips import platform
from sdar_jax.devices.sharding import current_mesh, mesh_axes
from sdar_jax.errors import ConfigError

# Logits held at once, in numbers. On a CPU 16 MB of float32, which stay in its cache; on accelerators 1 GB, as each
# chunk also reads and writes the head's whole gradient (docs/kernels.md).
_LOGITS_HELD = {"cpu": 2**22}
_LOGITS_HELD_ELSEWHERE = 2**28


class TokenScores(NamedTuple):
    """Scores of each token whose weight is not zero; zero and False elsewhere. No gradient flows through them.

    Attributes:
        nll: float32 [N] or [B, L], as the tokens, in nats.
        correct: bool [N] or [B, L], whether no token had a higher logit than the target.
        entropy: float32 [N] or [B, L], of the distribution where `correct`, in nats; None where it has no weight.
    """

    nll: Float[Array, "*N"]
    correct: Bool[Array, "*N"]
    entropy: Float[Array, "*N"] | None = None


SoftLoss = Literal["soft_cross_entropy", "kl"]


class Teacher(NamedTuple):
    """The outputs of another model, whose distributions over the vocabulary are targets. They get no gradient.

    Attributes:
        hidden: its states of the same tokens, [N, D'] or [B, L, D'].
        head: its own, [D', V], or [V, D'] with `vocab_axis` 0.
    """

    hidden: Float[Array, "*N E"]
    head: Float[Array, "E V"] | Float[Array, "V E"]


class LossSharding(NamedTuple):
    """The split of the loss over a mesh: hashable, for static arguments.

    Attributes:
        mesh: the mesh in force.
        tokens: mesh axes that split the first axis of hidden, targets and weights.
        vocab: the axis that splits the head's vocabulary, or None.
        length: mesh axes that split the second axis of hidden, targets and weights, where tokens are [B, L].
        width: one of `tokens` that splits the other side of the head, or None; the head is gathered over it, and its
            gradient scattered. A teacher's head is split and gathered likewise.
    """

    mesh: Mesh | AbstractMesh
    tokens: tuple[str, ...] = ()
    vocab: str | None = None
    length: tuple[str, ...] = ()
    width: str | None = None


def loss_sharding(
    tokens: tuple[int, ...], head: tuple[int, ...], vocab_axis: int
) -> LossSharding | None:
    """Finds how the mesh in force splits a loss over tokens [B, L] and a head of these shapes; None without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return None
    batch = mesh_axes("batch", tokens[0])
    (vocab,) = mesh_axes("vocab", head[vocab_axis]) or (None,)
    (width,) = mesh_axes("embed", head[1 - vocab_axis]) or (None,)
    return LossSharding(
        mesh,
        tokens=batch,
        vocab=vocab,
        length=mesh_axes("length", tokens[1]),
        width=width if width in batch else None,
    )


def linear_cross_entropy(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "*N"],
    weights: Float[Array, "*N"],
    *,
    entropy_weight: Float[Array, ""] | None = None,
    teacher: Teacher | None = None,
    soft_loss: SoftLoss = "soft_cross_entropy",
    vocab_axis: int = 1,
    chunk: int | None = None,
    sharding: LossSharding | None = None,
) -> tuple[Float[Array, ""], TokenScores]:
    """Computes sum_i w_i CE(hidden_i . head, target_i) with float32 accumulation, and each token's score.

    With an entropy_weight e, e sum_i H(softmax(hidden_i . head)) is added, over the tokens whose weight is not zero and
    whose first guess is right. Which these are carries no gradient (CAP, arXiv 2512.15745).

    With a teacher, whose distributions are p_i, CE is sum_v -p_i(v) log softmax(hidden_i . head)(v) (D2F, arXiv
    2508.09192), or with the name "kl" that minus the entropy of p_i: another value, the same gradient. Scores stay
    those of the targets.

    Tokens of weight zero cost nothing: a loop runs over ceil(weighted / chunk) chunks, a number known only at run time,
    so no capacity ever drops a token. Under differentiation the same loop makes the gradients (the loss is linear in
    its cotangent), and accumulates them in float32. Differentiable once, in hidden and head.

    Args:
        hidden: states of tokens [N, D], or of rows of them [B, L, D].
        head: [D, V], or [V, D] with `vocab_axis` 0.
        targets: int32 [N] or [B, L].
        weights: float [N] or [B, L].
        entropy_weight: float scalar e, without a gradient; None: no entropy is computed.
        teacher: gives soft targets in place of `targets`; its logits are held as the others are, a chunk at a time.
        soft_loss: the name of the loss to the teacher, "soft_cross_entropy" or "kl".
        vocab_axis: the axis of `head` that is the vocabulary: 1, or 0 for tied embeddings.
        chunk: tokens whose logits are held at once; by default what fits 16 MB (1 GB on accelerators), at least 128.
        sharding: on a mesh, each device computes its own tokens and its own part of the vocabulary.

    Raises:
        ConfigError: tokens or vocabulary do not divide over the mesh axes that split them, a teacher of other tokens or
            another vocabulary, or an unknown soft_loss.
    """
    if soft_loss not in get_args(SoftLoss):
        raise ConfigError(f"soft_loss {soft_loss!r} is unknown; use one of {get_args(SoftLoss)}")
    token_parts, vocab_parts = _checked_parts(hidden, head, vocab_axis, sharding)
    if teacher is not None:
        _check_teacher(teacher, hidden, head, vocab_axis, sharding)
    chunk = chunk or chunk_size(head.shape[vocab_axis] // vocab_parts)
    chunk = min(chunk, math.prod(hidden.shape[:-1]) // token_parts)
    kl = soft_loss == "kl"
    total, scores = _loss(
        hidden, head, targets, weights, entropy_weight, teacher, vocab_axis, chunk, sharding, kl
    )
    return total, jax.lax.stop_gradient(scores)


def chunk_size(vocabulary: int) -> int:
    """Chooses how many tokens' logits are held at once by default, for a device's part of the vocabulary."""
    return max(_LOGITS_HELD.get(platform(), _LOGITS_HELD_ELSEWHERE) // vocabulary, 128)


def _checked_parts(
    hidden: Array, head: Array, vocab_axis: int, sharding: LossSharding | None
) -> tuple[int, int]:
    """Counts the parts that tokens and vocabulary are split into, and checks that they are equal."""
    if sharding is None:
        return 1, 1

    def size(*axes: str | None) -> int:
        return math.prod(sharding.mesh.shape[axis] for axis in axes if axis is not None)

    row_parts = size(*sharding.tokens)
    length_parts = size(*sharding.length)
    vocab_parts = size(sharding.vocab)
    _check_equal_parts("tokens", hidden.shape[0], row_parts)
    _check_equal_parts("tokens per row", hidden.shape[-2], length_parts)
    _check_equal_parts("vocabulary entries", head.shape[vocab_axis], vocab_parts)
    _check_equal_parts("columns of the head", head.shape[1 - vocab_axis], size(sharding.width))
    return row_parts * length_parts, vocab_parts


def _check_teacher(
    teacher: Teacher, hidden: Array, head: Array, vocab_axis: int, sharding: LossSharding | None
) -> None:
    if teacher.hidden.shape[:-1] != hidden.shape[:-1]:
        raise ConfigError(
            f"the teacher's hidden states are of tokens {teacher.hidden.shape[:-1]} and the student's of "
            f"{hidden.shape[:-1]}; give both of the same tokens"
        )
    rows, own_rows = teacher.head.shape[vocab_axis], head.shape[vocab_axis]
    if rows != own_rows:
        raise ConfigError(
            f"the teacher's head has {rows} vocabulary entries and the student's {own_rows}; give both one vocabulary"
        )
    _checked_parts(teacher.hidden, teacher.head, vocab_axis, sharding)


def _check_equal_parts(what: str, size: int, parts: int) -> None:
    if size % parts:
        raise ConfigError(
            f"{size} {what} do not divide over {parts} devices; pad them or use fewer devices"
        )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _loss(hidden, head, targets, weights, entropy_weight, teacher, vocab_axis, chunk, sharding, kl):
    inputs = hidden, head, targets, weights, entropy_weight, teacher
    return _run(*inputs, vocab_axis, chunk, sharding, kl=kl, gradients=False)[0]


def _loss_fwd(
    hidden, head, targets, weights, entropy_weight, teacher, vocab_axis, chunk, sharding, kl
):
    inputs = hidden, head, targets, weights, entropy_weight, teacher
    out, gradients = _run(*inputs, vocab_axis, chunk, sharding, kl=kl, gradients=True)
    # Residuals are arrays, so empty ones carry the dtypes.
    like = jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), head.dtype)
    return out, (gradients, like)


def _loss_bwd(vocab_axis, chunk, sharding, kl, residuals, cotangents):
    gradients, like = residuals
    d_loss = cotangents[0]
    d_hidden = (gradients[0] * d_loss).astype(like[0].dtype)
    d_head = (gradients[1] * d_loss).astype(like[1].dtype)
    return d_hidden, d_head, None, None, None, None


_loss.defvjp(_loss_fwd, _loss_bwd)


def _run(
    hidden,
    head,
    targets,
    weights,
    entropy_weight,
    teacher,
    vocab_axis,
    chunk,
    sharding,
    *,
    kl,
    gradients,
):
    """Runs `_over_chunks`, on each device over its part of tokens and vocabulary where there is a mesh."""
    options = {"vocab_axis": vocab_axis, "chunk": chunk, "kl": kl, "gradients": gradients}
    compute = partial(_over_rows, **options)
    if sharding is None:
        return compute(hidden, head, targets, weights, entropy_weight, teacher)
    mesh, tokens, vocab, length, width = sharding
    by_token = (
        PartitionSpec(tokens or None, length or None) if length else PartitionSpec(tokens or None)
    )
    by_vocab = PartitionSpec(*((vocab, width) if vocab_axis == 0 else (width, vocab)))
    token_axes = (*tokens, *length)
    other_token_axes = tuple(axis for axis in token_axes if axis != width)

    def gathered(head, dtype):
        if width is None:
            return head
        return jax.lax.all_gather(head.astype(dtype), width, axis=1 - vocab_axis, tiled=True)

    def compute_part(hidden, head, targets, weights, entropy_weight, teacher):
        head = gathered(head, hidden.dtype)
        if teacher is not None:
            teacher = Teacher(teacher.hidden, gathered(teacher.head, teacher.hidden.dtype))
        (total, scores), grads = compute(
            hidden, head, targets, weights, entropy_weight, teacher, vocab=vocab
        )
        # The rest of the vocabulary adds to a token's gradient, the other tokens to that of the head.
        if grads:
            d_hidden, d_head = grads
            if width is not None:
                d_head = jax.lax.psum_scatter(
                    d_head, width, scatter_dimension=1 - vocab_axis, tiled=True
                )
            grads = _psum(d_hidden, vocab), _psum(d_head, other_token_axes)
        return (_psum(total, token_axes), scores), grads

    by_teacher = None if teacher is None else Teacher._make((by_token, by_vocab))
    on_mesh = jax.shard_map(
        compute_part,
        mesh=mesh,
        in_specs=(by_token, by_vocab, by_token, by_token, PartitionSpec(), by_teacher),
        out_specs=(
            (PartitionSpec(), by_token),
            (by_token, by_vocab) if gradients else (),
        ),
        check_vma=False,
    )
    return on_mesh(hidden, head, targets, weights, entropy_weight, teacher)


def _psum(x: Array, axes: str | tuple[str, ...] | None) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def _over_rows(hidden, head, targets, weights, entropy_weight, teacher, vocab=None, **options):
    """Runs `_over_chunks` over tokens [N] or [B, L], as they come."""
    if teacher is not None:
        teacher = Teacher(teacher.hidden.reshape(-1, teacher.hidden.shape[-1]), teacher.head)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    (total, scores), grads = _over_chunks(
        flat_hidden,
        head,
        targets.reshape(-1),
        weights.reshape(-1),
        entropy_weight,
        teacher,
        vocab,
        **options,
    )
    if grads:
        d_hidden, d_head = grads
        grads = d_hidden.reshape(hidden.shape), d_head
    return (total, jax.tree.map(lambda x: x.reshape(targets.shape), scores)), grads


def _over_chunks(
    hidden,
    head,
    targets,
    weights,
    entropy_weight,
    teacher,
    vocab=None,
    *,
    vocab_axis,
    chunk,
    kl,
    gradients,
):
    """Computes loss, scores and, with `gradients`, those of hidden and head in float32, over weighted tokens alone.

    vocab: the mesh axis that splits the vocabulary, inside shard_map.
    """
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    tokens = hidden.shape[0]
    weights = weights.astype(accumulate)
    if entropy_weight is not None:
        entropy_weight = entropy_weight.astype(accumulate)
    head = head.astype(hidden.dtype)
    if teacher is not None:
        teacher = teacher._replace(head=teacher.head.astype(teacher.hidden.dtype))
    weighted_first = jnp.argsort(weights == 0, stable=True)
    # One past the end: gathers give it a weight of zero, and scatters drop it.
    order = jnp.pad(weighted_first, (0, -tokens % chunk), constant_values=tokens)
    chunks = (jnp.count_nonzero(weights) + chunk - 1) // chunk

    def add_chunk(i, carry):
        total, scores, d_hidden, d_head = carry
        at = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        weight = jnp.take(weights, at, mode="fill", fill_value=0)
        loss_mask = weight != 0
        read = lambda x: jnp.where(loss_mask[:, None], jnp.take(x, at, axis=0, mode="clip"), 0)
        h = read(hidden)
        target = jnp.where(loss_mask, jnp.take(targets, at, mode="clip"), 0)
        soft = teacher and _Soft(teacher._replace(hidden=read(teacher.hidden)), kl)
        loss, found, d_logits = _chunk_scores(
            h, head, target, weight, entropy_weight, soft, vocab_axis, accumulate, vocab
        )
        total += loss
        scores = jax.tree.map(lambda x, new: x.at[at].set(new, mode="drop"), scores, found)
        if gradients:
            d_logits = d_logits.astype(hidden.dtype)
            d_hidden = d_hidden.at[at].set(
                _dot("nv,vd->nd", d_logits, head, vocab_axis, accumulate), mode="drop"
            )
            pair = (d_logits, h) if vocab_axis == 0 else (h, d_logits)
            d_head += jnp.einsum("na,nb->ab", *pair, preferred_element_type=accumulate)
        return total, scores, d_hidden, d_head

    start = (
        jnp.zeros((), accumulate),
        TokenScores(
            jnp.zeros(tokens, accumulate),
            jnp.zeros(tokens, bool),
            None if entropy_weight is None else jnp.zeros(tokens, accumulate),
        ),
        jnp.zeros(hidden.shape, accumulate) if gradients else None,
        jnp.zeros(head.shape, accumulate) if gradients else None,
    )
    # Planning finds the loop by this name.
    with jax.named_scope("loss"):
        total, scores, *grads = jax.lax.fori_loop(0, chunks, add_chunk, start)
    return (total, scores), tuple(grads) if gradients else ()


class _ChunkScores(NamedTuple):
    loss: Array
    scores: TokenScores
    d_logits: Array


class _Soft(NamedTuple):
    teacher: Teacher
    kl: bool


def _chunk_scores(
    h, head, target, weight, entropy_weight, soft, vocab_axis, accumulate, vocab
) -> _ChunkScores:
    logits = _dot("nd,vd->nv", h, head, vocab_axis, accumulate)
    size = logits.shape[-1]
    if vocab is not None:
        target = target - jax.lax.axis_index(vocab) * size
    largest, logsumexp = _logsumexp(logits, vocab)
    # Zero where the target belongs to another part of the vocabulary.
    wanted = jax.nn.one_hot(target, size, dtype=accumulate)
    here = (target >= 0) & (target < size)
    at_target = jnp.take_along_axis(logits, jnp.clip(target, 0, size - 1)[:, None], axis=-1)[:, 0]
    at_target = _psum(jnp.where(here, at_target, 0), vocab)
    log_probs = logits - logsumexp[:, None]
    loss_mask = weight != 0
    nll = jnp.where(loss_mask, logsumexp - at_target, 0)
    correct = loss_mask & (at_target >= largest)
    each_loss = nll
    if soft is not None:
        wanted, each_loss = _soft_targets(soft, log_probs, vocab_axis, accumulate, vocab)
    loss = jnp.sum(weight * each_loss)
    d_logits = weight[:, None] * (jnp.exp(log_probs) - wanted)
    if entropy_weight is None:
        return _ChunkScores(loss, TokenScores(nll, correct), d_logits)
    # dH / dz_j = -p_j (log p_j + H)
    entropy = -_psum((jnp.exp(log_probs) * log_probs).sum(axis=-1), vocab)
    each = jnp.where(correct, entropy_weight, 0)
    d_logits -= each[:, None] * jnp.exp(log_probs) * (log_probs + entropy[:, None])
    scores = TokenScores(nll, correct, jnp.where(correct, entropy, 0))
    return _ChunkScores(loss + jnp.sum(each * entropy), scores, d_logits)


def _soft_targets(soft: _Soft, log_probs, vocab_axis, accumulate, vocab) -> tuple[Array, Array]:
    """Computes the teacher's probabilities, [chunk, V], and the loss to them of each token."""
    hidden, head = soft.teacher
    logits = _dot("nd,vd->nv", hidden, head, vocab_axis, accumulate)
    wanted_log = logits - _logsumexp(logits, vocab)[1][:, None]
    wanted = jnp.exp(wanted_log)
    # Subtracted here and not from the sums, which may be close to each other.
    nats = wanted_log - log_probs if soft.kl else -log_probs
    return wanted, _psum((wanted * nats).sum(axis=-1), vocab)


def _logsumexp(logits, vocab) -> tuple[Array, Array]:
    """Computes the largest logit of each token and log sum exp, over all parts of the vocabulary."""
    largest = logits.max(axis=-1)
    largest = jax.lax.pmax(largest, vocab) if vocab else largest
    return largest, largest + jnp.log(_psum(jnp.exp(logits - largest[:, None]).sum(axis=-1), vocab))


def _dot(spec, x, head, vocab_axis, accumulate):
    if vocab_axis == 1:
        spec = spec.replace("vd", "dv")
    return jnp.einsum(spec, x, head, preferred_element_type=accumulate)
