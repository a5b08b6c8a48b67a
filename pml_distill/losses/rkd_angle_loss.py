from collections.abc import Iterator

import torch
from torch import Tensor

from .base_distillation_loss import BaseDistillationLoss, diagonal_mask

# Entries of the (vertices, B, B) cosines held at a time, a few times over: 2 MiB each in float32.
CHUNK = 2**19
# Into how many runs the arms are cut, unless they are short; only pairs of runs on and above the diagonal count.
PARTS, SHORTEST = 4, 64


class RKDAngleLoss(BaseDistillationLoss):
    r"""Relational distillation of the angles that the batch's pairs span at each sample as the vertex (RKD-A).

    .. math:: L_j = \frac{1}{(B-1)^2} \sum_{i, k \neq j} \ell\big(\cos \angle^s_{ijk}, \cos \angle^t_{ijk}\big), \quad
        \cos \angle_{ijk} = \frac{(f_i - f_j)^\top (f_k - f_j)}{\|f_i - f_j\| \, \|f_k - f_j\|}

    l is the smooth L1 loss, and i = k is among the pairs. The distance is not used. A miner's pairs restrict the arms
    at a vertex. Inner products come from the Gram matrix a few vertices at a time, and again in the backward: time
    grows with B^3, memory with B^2. An arm too short for its direction to be known, as of a duplicate, has cosine 0
    with all and no gradient. The loss can be differentiated once. Shapes: embeddings (B, Ds), ref_emb (B, Dt); one
    value per vertex. Source: Park et al., "Relational Knowledge Distillation", CVPR 2019. Multiply by ((B - 1) / B)^2
    for their mean over B^3 triplets.
    """

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        if len(embeddings) < 2:
            return self.zero_losses()
        mask = ~diagonal_mask(embeddings)
        if indices_tuple is not None:
            mask = indices_tuple = self.pair_mask(indices_tuple, embeddings)
        losses = vertex_losses(embeddings, *arms(ref_emb, mask), mask) / mask.sum(dim=1).clamp(min=1) ** 2
        return self.query_losses(losses, indices_tuple, embeddings)


def arms(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, B) inner products around the median and the inverse distances, 0 for arms left out."""
    # The difference of nearly equal inner products needs the digits; these are B^2 entries of the B^3. Around the mean
    # a single far sample would leave none for the others.
    centred = embeddings.double()
    # By sorting, because median() has no deterministic form on CUDA.
    centred = centred - centred.detach().sort(dim=0).values[centred.shape[0] // 2]
    gram = centred @ centred.t()
    radii = gram.diagonal()[:, None] + gram.diagonal()
    distances, info = radii - 2 * gram, torch.finfo(embeddings.dtype)
    known = mask & (distances > 50 * info.eps * radii) & (distances > info.tiny)
    inverse = distances.masked_fill(~known, 1).rsqrt().masked_fill(~known, 0)
    return gram.to(embeddings.dtype), inverse.to(embeddings.dtype)


def cosines(gram: Tensor, inverse: Tensor, rows: slice, left: slice, right: slice) -> tuple[Tensor, Tensor]:
    """Return the (V, L, R) cosines at the vertices ``rows`` between two runs of arms, and their inverse lengths."""
    scale = inverse[rows]
    scales = scale[:, left, None] * scale[:, None, right]
    shift = scale * (gram[rows] - gram.diagonal()[rows, None] / 2)
    shifts = torch.stack([shift, scale], dim=2)[:, left], torch.stack([scale, shift], dim=1)[:, :, right]
    return (scales * gram[left, right]).baddbmm_(*shifts, alpha=-1), scales


# Operators, so that torch.compile takes each as one and does not unroll the blocks, which at 512 rows takes minutes.
@torch.library.custom_op("pml_distill::vertex_losses", mutates_args=())
def vertex_losses(embeddings: Tensor, teacher_gram: Tensor, teacher_inverse: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of smooth L1 over all pairs of arms at each vertex; the cosines are recomputed in the backward."""
    gram, inverse = arms(embeddings, mask)
    losses = torch.zeros_like(gram[0])
    for rows, left, right in blocks(len(gram)):
        student, _ = cosines(gram, inverse, rows, left, right)
        teacher, _ = cosines(teacher_gram, teacher_inverse, rows, left, right)
        part = torch.nn.functional.smooth_l1_loss(student, teacher, reduction="none").sum(dim=(1, 2))
        losses[rows] += part if left == right else 2 * part
    return losses


@torch.library.custom_op("pml_distill::vertex_losses_backward", mutates_args=())
def vertex_losses_backward(
    weights: Tensor, embeddings: Tensor, teacher_gram: Tensor, teacher_inverse: Tensor, mask: Tensor
) -> Tensor:
    """Return the gradient of the vertices' losses, times their ``weights``, with respect to the embeddings."""
    gram, inverse = arms(embeddings, mask)
    # The derivatives with respect to the inner products of arms, summed over the vertices, and over the
    # second arm; of an arm's product with itself.
    by_pair, along, lengths = torch.zeros_like(gram), torch.zeros_like(gram), torch.zeros_like(gram)
    for rows, left, right in blocks(len(gram)):
        teacher, _ = cosines(teacher_gram, teacher_inverse, rows, left, right)
        student, scales = cosines(gram, inverse, rows, left, right)
        slopes, scale = teacher.neg_().add_(student).clamp_(-1, 1), inverse[rows]
        student.mul_(slopes)
        along[rows, left] += torch.bmm(slopes, scale[:, right, None])[:, :, 0]
        lengths[rows, left] += student.sum(dim=2)
        if left != right:
            along[rows, right] += torch.bmm(scale[:, None, left], slopes)[:, 0]
            lengths[rows, right] += student.sum(dim=1)
        part = (weights[None, rows] @ scales.mul_(slopes).flatten(1)).view(scales.shape[1:])
        by_pair[left, right] += part
        if left != right:
            by_pair[right, left] += part.t()
    lengths = weights[:, None] * inverse.square() * lengths
    by_arm = weights[:, None] * inverse * along - lengths
    by_pair.diagonal().sub_(lengths.sum(dim=0))
    # Each arm is (f_i - f_j), and both arms of a pair receive the same.
    gradient = by_pair @ embeddings - by_arm.t() @ embeddings - by_arm @ embeddings
    return 2 * (gradient + by_arm.sum(dim=1, keepdim=True) * embeddings)


vertex_losses.register_fake(lambda embeddings, *others: embeddings.new_empty(embeddings.shape[0]))
vertex_losses_backward.register_fake(lambda weights, embeddings, *others: torch.empty_like(embeddings))
vertex_losses.register_autograd(
    lambda ctx, weights: (vertex_losses_backward(weights, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def blocks(size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield (vertices, arms, arms) whose cosines are held at a time; arms i and k are seen once, not as k and i."""
    length = max(SHORTEST, -(-size // PARTS))
    runs = [slice(start, min(start + length, size)) for start in range(0, size, length)]
    step = max(1, CHUNK // length**2)
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        for number, left in enumerate(runs):
            for right in runs[number:]:
                yield rows, left, right
