from math import comb

import torch
from torch.nn import functional as F

from .base_distillation_loss import ABSENT, BaseDistillationLoss, diagonal_mask, set_numbers

LONGEST_SOFT_LIST = 14


class DarkRankLoss(BaseDistillationLoss):
    r"""The teacher's ranking of the batch, seen from each sample as the query (DarkRank; ListNet and ListMLE).

    Scores S = -alpha * d^beta (for a similarity alpha * sign(d) * abs(d)^beta) define a Plackett-Luce model: from the
    candidates that remain, the next is c with probability exp S_c / sum exp S. c_1 ... c_L are the ``list_length``
    candidates nearest to a query in the teacher's space. ``transfer="hard"`` (ListMLE) is minus the log-likelihood of
    the teacher's order under the student, ``"soft"`` (ListNet) the cross entropy between both sides' distributions over
    all L! orders:

    .. math:: L_q &= \sum_{k=1}^{L} \Big( \log \sum_{j \in \{c_k, ..., c_L\} \cup rest} e^{S_j} - S_{c_k} \Big) \\
        L_q &= \sum_{R \neq \emptyset} P_t(R) \log \sum_{j \in R \cup rest} e^{S_j} - \sum_{k=1}^{L} S_{c_k}

    with the teacher's probability P_t(R) that just the subset R of the list remains at some point. ``rest`` are the
    candidates outside of the list with ``tail=True`` and nothing with ``tail=False``; only with the tail a stranger
    before the list is penalised. A perfect student has a loss above zero, and with the tail or the hard loss a
    gradient. A miner's pairs restrict the candidates; then, or for a list as long as the batch, the soft loss has no
    second derivatives. Shapes: embeddings (B, Ds), ref_emb (B, Dt); one value per query.

    Source: Chen et al., "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer", AAAI
    2018, Eqs. 1-5, with alpha = beta = 3 and weight 2. Their code has alpha = 12.25 and beta = 4, soft with
    ``list_length=4, tail=False``; the repository of RKD ``transfer="hard", list_length=4, tail=False``. ``list_length``
    None ranks all others; it is cut to B - 1. The soft loss costs 2^L terms per query and takes up to 14.
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
        set_numbers(self, alpha=alpha, beta=beta)
        if list_length is not None and list_length < 1:
            raise ValueError(f"list_length must be None or at least 1, but is {list_length}.")
        self.transfer, self.list_length, self.tail = transfer, list_length, tail
        self.check_length(list_length or 1)

    def check_length(self, length: int) -> None:
        """Raise ``ValueError`` for a list whose subsets are too many."""
        if self.transfer == "soft" and length > LONGEST_SOFT_LIST:
            raise ValueError(
                f"list_length is {length}, but the soft loss sums over 2^list_length subsets and takes at most "
                f'{LONGEST_SOFT_LIST}. Shorten the list, or use transfer="hard".'
            )

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        size = len(embeddings)
        if size < 2:
            return self.zero_losses()
        outside = diagonal_mask(embeddings)
        if indices_tuple is not None:
            indices_tuple = self.pair_mask(indices_tuple, embeddings)
            outside = ~indices_tuple
        # The best of each query's candidates drops out of the loss, but would cost the digits.
        scores = (similarity_scores(self, rows) for rows in (embeddings, ref_emb))
        student, teacher = (x - x.detach().masked_fill(outside, ABSENT).amax(dim=1, keepdim=True) for x in scores)
        # A list of fixed length, whose last places may be empty, is one graph for all batch sizes.
        whole = self.list_length is None or self.list_length > size
        length = size - 1 if self.list_length is None or whole else self.list_length
        self.check_length(length)
        ranked = teacher.masked_fill(outside, -torch.inf).topk(length, dim=1).indices
        missing, rest = outside.gather(1, ranked), None
        if self.tail and not whole:
            rest = student.masked_fill(outside.scatter(1, ranked, True), ABSENT).logsumexp(dim=1)
        student, teacher = (x.gather(1, ranked).masked_fill(missing, ABSENT) for x in (student, teacher))
        picked = student.masked_fill(missing, 0).sum(dim=1, dtype=torch.float64)
        total = (
            soft_total(student, teacher, rest, missing)
            if self.transfer == "soft"
            else hard_total(student, rest, missing)
        )
        return self.query_losses((total - picked).to(student.dtype), indices_tuple, embeddings)


def similarity_scores(loss: BaseDistillationLoss, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the (B, B) scores -alpha d^beta (Eq. 4), for a similarity alpha sign(d) abs(d)^beta; queries are rows."""
    mat, alpha, beta = loss.distance_matrix(embeddings), loss.alpha, loss.beta
    if beta < 1:
        # The power's slope is infinite at 0; there the score gets no gradient.
        mat = torch.where(mat == 0, mat.detach().clamp(min=torch.finfo(mat.dtype).tiny), mat)
    return alpha * mat.sign() * mat.abs().pow(beta) if loss.distance.is_inverted else -alpha * mat.pow(beta)


def hard_total(student: torch.Tensor, rest: torch.Tensor | None, missing: torch.Tensor) -> torch.Tensor:
    """Sum the denominators of ListMLE: (Q, L) scores in the teacher's order, (Q,) log-sum-exp of the rest -> (Q,)."""
    chain, missing = student.flip(1), missing.flip(1)
    if rest is not None:
        chain, missing = torch.cat([rest[:, None], chain], dim=1), F.pad(missing, (1, 0), value=True)
    return log_cumulative_sum_exp(chain).masked_fill(missing, 0).sum(dim=1, dtype=torch.float64)


def log_cumulative_sum_exp(chain: torch.Tensor) -> torch.Tensor:
    """Return ``logcumsumexp(chain, dim=1)``, (Q, N), with a gradient that is exact for scores of any size.

    Each place keeps its largest entry and the sum of the exponentials above it; that of torch rounds the sum away. The
    reach of each place is doubled until it is the row, which takes log2(N) passes.
    """
    largest = chain.detach().cummax(dim=1).values
    kept = F.pad((largest[:, :-1] - largest[:, 1:]).exp(), (1, 0))
    total, step = (chain - largest).exp(), 1
    while step < chain.shape[1]:
        total = total + F.pad(kept[:, step:] * total[:, :-step], (step, 0))
        kept = F.pad(kept[:, step:] * kept[:, :-step], (step, 0))
        step *= 2
    return largest + total.log()


def soft_total(
    student: torch.Tensor, teacher: torch.Tensor, rest: torch.Tensor | None, missing: torch.Tensor
) -> torch.Tensor:
    """Sum the denominators of ListNet: (Q, L) scores of both sides, (Q,) log-sum-exp of the rest -> (Q,)."""
    remains = remaining_probabilities(teacher.t(), subset_logsumexp(teacher.t()))
    # A list is filled from the front: a subset is empty if it shares no bit with the places that are filled.
    filled = 2 ** (~missing).sum(dim=1) - 1
    remains = remains.masked_fill(torch.arange(len(remains), device=student.device)[:, None] & filled == 0, 0)
    return (remains[1:] * subset_logsumexp(student.t(), rest)[1:]).sum(dim=0, dtype=torch.float64)


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

    P(all) = 1 and P(R) = sum over c outside R of P(R + c) * exp(S_c) / sum over R + c of exp(S), by falling size of R.
    """
    length, queries = scores.shape
    probabilities = scores.new_zeros(2**length, queries)
    probabilities[-1] = 1
    bits = torch.arange(2**length, device=scores.device)[:, None] >> torch.arange(length, device=scores.device) & 1
    # Sorted and cut at places known beforehand: torch 2.4 cannot compile nonzero(), whose size depends on the values.
    by_size = bits.sum(dim=1).argsort(stable=True).split([comb(length, size) for size in range(length + 1)])
    for size in range(length - 1, 0, -1):
        subsets = by_size[size]
        added = bits[subsets].argsort(dim=1, stable=True)[:, : length - size]
        supersets = subsets[:, None] | 1 << added
        picked = (scores[added] - logsumexp[supersets]).exp()
        probabilities[subsets] = (probabilities[supersets] * picked).sum(dim=1)
    return probabilities
