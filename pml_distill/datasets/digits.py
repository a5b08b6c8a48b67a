from .class_disjoint_images import ClassDisjointImages


class Digits(ClassDisjointImages):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, split by class like ``Glyphs``.

    Five digits train (one of them is the validation split) and five test: a small problem for quick checks.

    Arguments, items, attributes and errors are those of ``Glyphs``.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 16,
        channels: int = 1,
        augment: bool | None = None,
        return_index: bool = False,
        seed: int = 0,
    ):
        from sklearn.datasets import load_digits

        data = load_digits()
        images = (data.images * (255 / 16)).astype("uint8")
        super().__init__(images, data.target, split, size, channels, augment, return_index, seed)
