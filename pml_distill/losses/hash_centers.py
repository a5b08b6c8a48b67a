import torch

ROUNDS, DRAWN, LINEAR_BITS, PART = 200, 256, 20, 1024
SYLVESTER = torch.tensor([[1.0, 1], [1, -1]])


def hash_centers(num_classes: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Return a code of -1 and 1 for each class, (num_classes, bits), far from one another (the hash centers of CSQ).

    - The rows of a Hadamard matrix H, then of -H, where one of order ``bits`` is known (powers of two, 12, 20, 24, 28,
      36, 40, 44, 48...): any two differ in bits / 2 places, opposite ones in all.
    - Beyond, random balanced codes of ``seed``, each with its opposite, at least bits / 4 from all others.
    - Where chance finds too few, up to 20 bits: a linear code, grown greedily (2048 words of 16 bits at distance 4).
    - Where these are too few, the distance shrinks by one bit at a time; ``center_distances`` tells what was reached.

    Yuan et al., CVPR 2020, have the first of these, for powers of two.
    """
    if num_classes < 1 or bits < 1:
        raise ValueError(f"num_classes and bits (embedding_size) must be at least 1, but are {num_classes} and {bits}.")
    matrix = hadamard(bits)
    centers, distance = torch.empty(0, bits) if matrix is None else torch.cat([matrix, -matrix]), -(-bits // 4)
    generator = torch.Generator().manual_seed(seed)
    while len(centers) < num_classes:
        centers = with_random_codes(centers, num_classes, distance, generator)
        if len(centers) < num_classes and bits <= LINEAR_BITS and distance > 0:
            words = linear_code(bits, distance)
            if len(words) >= num_classes:
                first = min(len(words), 2 * bits)
                chosen = first + torch.randperm(len(words) - first, generator=generator)
                centers = words[torch.cat([torch.arange(first), chosen])]
        distance -= 1
    return centers[:num_classes].clone()


def center_distances(centers: torch.Tensor) -> tuple[int, float]:
    """Return the smallest and the mean Hamming distance between two of the centers (C, bits), C from 2."""
    size, bits = centers.shape
    nearest = -bits
    # In parts: for many classes all products at once would not fit into memory.
    for start in range(0, size, PART):
        products = centers[start : start + PART] @ centers.T
        products.diagonal(start).fill_(-bits)
        nearest = max(nearest, int(products.max()))
    all_products = centers.double().sum(dim=0).square().sum().item()
    return (bits - nearest) // 2, (bits - (all_products - size * bits) / (size * (size - 1))) / 2


def with_random_codes(centers: torch.Tensor, wanted: int, distance: int, generator: torch.Generator) -> torch.Tensor:
    """Append pairs of opposite balanced codes, at least ``distance`` from all, until there are enough or no luck."""
    bits = centers.shape[1]
    largest_product = bits - 2 * max(distance, 0)
    for _ in range(ROUNDS):
        if len(centers) >= wanted:
            break
        # The places of the smallest of random numbers: as many 1 as -1, give or take one.
        ranks = torch.rand(DRAWN, bits, generator=generator).argsort(dim=1)
        codes = torch.where(ranks < bits // 2, 1.0, -1.0)
        codes = codes[((codes @ centers.T).abs() <= largest_product).all(dim=1)]
        kept = codes[:0]
        for code in codes:
            if ((kept @ code).abs() <= largest_product).all():
                kept = torch.cat([kept, code[None]])
        centers = torch.cat([centers, torch.stack([kept, -kept], dim=1).flatten(0, 1)])
    return centers


def linear_code(bits: int, distance: int) -> torch.Tensor:
    """Return the words (W, bits) of a linear code of this minimum distance, as -1 and 1.

    It starts from Sylvester's rows and their opposites where there are any, and takes in the first word that is far
    enough from all, with its sums with those there, until there is none.
    """
    places, words = 1 << torch.arange(bits - 1, -1, -1), torch.arange(2**bits)
    near, code = words[(words[:, None] & places).ne(0).sum(dim=1) < distance], torch.zeros(1, dtype=torch.long)
    rows = hadamard(bits)
    if bits & (bits - 1) == 0 and rows is not None:
        code = (torch.cat([rows, -rows]) < 0).long() @ places
    free = torch.ones(2**bits, dtype=torch.bool)
    free[(code[:, None] ^ near).flatten()] = False
    while free.any():
        added = code ^ free.long().argmax()
        free[(added[:, None] ^ near).flatten()] = False
        code = torch.cat([code, added])
    return 1.0 - 2 * (code[:, None] & places).ne(0).float()


def hadamard(order: int) -> torch.Tensor | None:
    """Return a Hadamard matrix with a first row and column of ones, or None where no construction is known here."""
    if order == 1:
        return torch.ones(1, 1)
    if order % 2 or order > 2 and order % 4:
        return None
    half = hadamard(order // 2)
    if order & (order - 1) and is_prime(order - 1):
        # Paley's first construction, of a prime that is 3 mod 4; the second one below, of one that is 1 mod 4.
        return residues(order - 1, -1.0)
    if half is not None:
        return torch.kron(SYLVESTER, half)
    if not is_prime(order // 2 - 1):
        return None
    core, one = residues(order // 2 - 1, 0.0), torch.eye(order // 2)
    core[0, 0] = 0
    matrix = torch.kron(SYLVESTER, core) + torch.kron(torch.tensor([[1.0, -1], [-1, -1]]), one)
    matrix = matrix * matrix[:, :1]
    return matrix * matrix[:1]


def residues(prime: int, diagonal: float) -> torch.Tensor:
    """Return which differences are squares modulo a prime, 1 or -1 and ``diagonal``, with a border of ones."""
    squares = -torch.ones(prime)
    squares[torch.arange(1, prime) ** 2 % prime] = 1
    squares[0] = diagonal
    places = torch.arange(prime)
    return torch.nn.functional.pad(squares[(places - places[:, None]) % prime], (1, 0, 1, 0), value=1.0)


def is_prime(number: int) -> bool:
    """Tell whether the number is a prime."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
