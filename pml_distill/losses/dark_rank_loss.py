from functools import lru_cache
from math import comb

import torch
from torch.nn import functional as F

from ..utils.tensors import own_gradient
from .base_distillation_loss import ABSENT, BaseDistillationLoss, check_positive
from .similarity_score import similarity_score

LONGEST_SOFT_LIST = 14


class DarkRankLoss(BaseDistillationLoss):
    r"""The teacher's ranking of the batch, seen from each sample as the query (DarkRank; ListNet and ListMLE).

    Scores S = -alpha * d^beta (for a similarity alpha * sign(d) * abs(d)^beta) define a Plackett-Luce model of
    rankings: from the candidates that remain, the next is c with probability exp S_c / sum exp S. The list c_1 ... c_L
    of a query are the ``list_length`` candidates nearest in the teacher's space.

    Hard (ListMLE), minus the log-likelihood of the teacher's order under the student:

    .. math:: L_q = \sum_{k=1}^{L} \Big( \log \sum_{j \in \{c_k, ..., c_L\} \cup rest} e^{S_j} - S_{c_k} \Big)

    Soft (ListNet), the cross entropy between the teacher's and the student's distribution over all L! orders, from the
    2^L subsets R of the list and the teacher's probability P_t(R) that just R remains at some point:

    .. math:: L_q = \sum_{R \neq \emptyset} P_t(R) \log \sum_{j \in R \cup rest} e^{S_j} - \sum_{k=1}^{L} S_{c_k}

    ``rest`` are the candidates outside of the list with ``tail=True`` and nothing with ``tail=False``. Only with the
    tail a student that puts a stranger before the list is penalised. A perfect student has a loss above zero (the
    teacher's entropy), and with the tail or the hard loss a gradient too. A miner's pairs restrict the candidates of a
    query; then, or for a list as long as the batch, the soft loss has no second derivatives.

    Source: Chen et al., "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer", AAAI
    2018, Eqs. 1-5, with alpha = beta = 3 and weight 2. Their code has alpha = 12.25 and beta = 4, soft with
    ``list_length=4, tail=False``; the repository of RKD ``transfer="hard", list_length=4, tail=False``.

    Args:
        transfer: ``"soft"`` or ``"hard"``.
        alpha: scale of the score, positive.
        beta: power of the distance, positive.
        list_length: L, how many of the teacher's nearest neighbours are ranked (cut to B - 1); None for all.
            The soft loss costs 2^L terms per query and takes up to 14.
        tail: whether the rest of the batch competes in every denominator.
        **kwargs: as in ``BaseDistillationLoss``.

    Shapes: embeddings (B, Ds), ref_emb (B, Dt). One value per query (``element``).

    Raises:
        ValueError: an argument is none of these, or the list is too long for the soft loss.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> loss = DarkRankLoss(transfer="hard")
        >>> bool(loss(teacher, ref_emb=teacher) < loss(teacher.flip(0).roll(1, 0), ref_emb=teacher))
        True
    """

    def __init__(
        self,
        transfer: str = "soft",
        alpha: float = 3.0,
        beta: float = 3.0,
        list_length: int | None = 8,
        tail: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if transfer not in ("soft", "hard"):
            raise ValueError(f'transfer must be "soft" or "hard", but is {transfer!r}.')
        check_positive(alpha=alpha, beta=beta)
        if list_length is not None and list_length < 1:
            raise ValueError(f"list_length must be None or at least 1, but is {list_length}.")
        if transfer == "soft" and list_length is not None:
            check_soft_list_length(list_length)
        self.transfer, self.alpha, self.beta = transfer, alpha, beta
        self.list_length, self.tail = list_length, tail
        self.add_to_recordable_attributes(list_of_names=["alpha", "beta"], is_stat=False)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        size = len(embeddings)
        if size < 2:
            return self.zero_losses()
        outside = torch.eye(size, dtype=torch.bool, device=embeddings.device)
        if indices_tuple is not None:
            indices_tuple = self.pair_mask(indices_tuple, embeddings)
            outside = ~indices_tuple
        student = less_the_best(self.scores(embeddings), outside)
        with torch.no_grad():
            teacher = less_the_best(self.scores(ref_emb), outside)
            # A list of fixed length, whose last places may be empty, is one graph for all batch sizes.
            whole = self.list_length is None or self.list_length > size
            length = size - 1 if self.list_length is None or whole else self.list_length
            ranked = teacher.masked_fill(outside, -torch.inf).topk(length, dim=1).indices
            missing = outside.gather(1, ranked)
            teacher_list = teacher.gather(1, ranked).masked_fill(missing, ABSENT)
        student_list = student.gather(1, ranked).masked_fill(missing, ABSENT)
        rest = None
        if self.tail and not whole:
            rest = student.masked_fill(outside.scatter(1, ranked, True), ABSENT).logsumexp(dim=1)
        if self.transfer == "hard":
            losses = hard_losses(student_list, rest, missing)
        else:
            losses = soft_losses(student_list, teacher_list, rest, missing)
        return self.query_losses(losses, indices_tuple, embeddings)

    def scores(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the (B, B) matrix of similarity scores; query along the rows."""
        return similarity_score(self.distance_matrix(embeddings), self.distance, self.alpha, self.beta)


def less_the_best(scores: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Subtract the best of each query's candidates: it drops out of the loss, but would cost the digits."""
    return scores - scores.detach().masked_fill(outside, ABSENT).amax(dim=1, keepdim=True)


def check_soft_list_length(length: int) -> None:
    """Raise ``ValueError`` for a list whose subsets are too many."""
    if length > LONGEST_SOFT_LIST:
        raise ValueError(
            f"list_length is {length}, but the soft loss sums over 2^list_length subsets for each query and takes "
            f'at most {LONGEST_SOFT_LIST}. Shorten the list, or use transfer="hard", which takes any length.'
        )


def hard_losses(student: torch.Tensor, rest: torch.Tensor | None, missing: torch.Tensor) -> torch.Tensor:
    """ListMLE: (Q, L) student scores in the teacher's order, (Q,) log-sum-exp of the rest -> (Q,) losses."""
    chain, counted = student.flip(1), ~missing.flip(1)
    if rest is not None:
        chain, counted = torch.cat([rest[:, None], chain], dim=1), F.pad(counted, (1, 0))
    picked = student.masked_fill(missing, 0).sum(dim=1, dtype=torch.float64)
    return (own_gradient(SummedLogCumSumExp, chain, counted) - picked).to(student.dtype)


class SummedLogCumSumExp(torch.autograd.Function):
    """The sum of ``logcumsumexp(chain, dim=1)`` over the counted places, None for all: (Q, N), (Q, N) -> (Q,).

    A log-sum-exp is kept as the largest entry and the sum of the exponentials above it. Added up, as
    ``torch.logcumsumexp`` does, large scores would round the sum away, and the gradient is made of such sums.
    """

    @staticmethod
    def forward(chain, counted):
        """Add up the scan."""
        largest, _, total = running_sums(chain)
        scan = largest + total.log()
        return (scan if counted is None else scan.masked_fill(~counted, 0)).sum(dim=1, dtype=torch.float64)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs alone: what is made of them would be a constant to a second derivative."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        """Entry j receives the sum over k >= j of exp(chain_j - scan_k), each at most 1."""
        chain, counted = ctx.saved_tensors
        largest, kept, total = running_sums(chain)
        shares = total.reciprocal() if counted is None else counted / total
        later = recurrence(shares.flip(1), kept.flip(1)).flip(1)
        return grad[:, None].to(chain.dtype) * (chain - largest).exp() * later, None


def running_sums(chain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest entry up to each place, how much of a sum above it is kept at the next, and these sums."""
    largest = chain.cummax(dim=1).values
    kept = (largest[:, :-1] - largest[:, 1:]).exp()
    return largest, kept, recurrence((chain - largest).exp(), kept)


def recurrence(added: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return x with x_0 = added_0 and x_k = added_k + kept_{k-1} x_{k-1}: (Q, N), (Q, N - 1) -> (Q, N).

    The reach of each place is doubled until it is the row, which takes log2(N) passes.
    """
    kept, step = F.pad(kept, (1, 0)), 1
    while step < added.shape[1]:
        nearer = kept[:, step:]
        added = added + F.pad(nearer * added[:, :-step], (step, 0))
        kept = F.pad(nearer * kept[:, :-step], (step, 0))
        step *= 2
    return added


def soft_losses(
    student: torch.Tensor, teacher: torch.Tensor, rest: torch.Tensor | None, missing: torch.Tensor
) -> torch.Tensor:
    """ListNet: (Q, L) scores of both sides, (Q,) log-sum-exp of the rest -> (Q,) losses."""
    length = student.shape[1]
    check_soft_list_length(length)
    with torch.no_grad():
        remains = remaining_probabilities(teacher.t(), subset_logsumexp(teacher.t()))
        # A list is filled from the front: without its missing places, a subset is empty if it shares no bit with the
        # places that are filled.
        filled = 2 ** (~missing).sum(dim=1) - 1
        remains = remains.masked_fill(torch.arange(2**length, device=student.device)[:, None] & filled == 0, 0)
    denominators = subset_logsumexp(student.t(), rest)
    picked = student.masked_fill(missing, 0).sum(dim=1, dtype=torch.float64)
    return ((remains[1:] * denominators[1:]).sum(dim=0, dtype=torch.float64) - picked).to(student.dtype)


def subset_logsumexp(scores: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """Log-sum-exp over each subset of L candidates and a base, if there is one: (L, Q), (Q,) -> (2^L, Q).

    Bit k of the row number says whether candidate k belongs to the subset.
    """
    table = scores.new_full((1, scores.shape[1]), ABSENT) if base is None else base[None]
    for score in scores:
        # Beside ABSENT, logaddexp would have no second derivative.
        single = score if base is None else torch.logaddexp(base, score)
        table = torch.cat([table, single[None], torch.logaddexp(table[1:], score)])
    return table


def remaining_probabilities(scores: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
    """Probability under Plackett-Luce that just the subset R remains at some point: (L, Q), (2^L, Q) -> (2^L, Q).

    P(all) = 1 and P(R) = sum over c outside R of P(R + c) * exp(S_c) / sum over R + c of exp(S).
    """
    length, queries = scores.shape
    probabilities = scores.new_zeros(2**length, queries)
    probabilities[-1] = 1
    levels = subset_levels(length, scores.device)
    if any(type(subsets) is not torch.Tensor for subsets, _, _ in levels):
        # Made while a program is exported, and of no use outside.
        subset_levels.cache_clear()
    for subsets, added, supersets in levels:
        picked = (scores[added] - logsumexp[supersets]).exp()
        probabilities[subsets] = (probabilities[supersets] * picked).sum(dim=1)
    return probabilities


@lru_cache(maxsize=64)
def subset_levels(length: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each subset size m = L - 1 ... 1: the subsets (n,), the L - m candidates outside, R with each added."""
    subsets = torch.arange(2**length)
    bits = subsets[:, None] >> torch.arange(length) & 1
    levels = []
    # Sorted and cut at places known beforehand: torch 2.4 cannot compile nonzero(), whose size depends on the values.
    by_size = bits.sum(dim=1).argsort(stable=True).split([comb(length, size) for size in range(length + 1)])
    for size in range(length - 1, 0, -1):
        members = by_size[size]
        added = bits[members].argsort(dim=1, stable=True)[:, : length - size]
        supersets = members[:, None] | 1 << added
        levels.append((members.to(device), added.to(device), supersets.to(device)))
    return levels
