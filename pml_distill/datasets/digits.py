from .class_disjoint_images import ClassDisjointImages


class Digits(ClassDisjointImages):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, split by class like ``Glyphs``.

    Five digits train (one of them is the validation split) and five test: a small problem for quick checks.

    Args:
        split: ``"train"``, ``"val"``, ``"train+val"`` or ``"test"``; the classes are disjoint.
        size: side of the images, 8 to 64 pixels.
        channels: 1, or 3 equal ones.
        augment: whether each read is jittered anew; None: for the training splits. Without, a fixed jittered copy.
        return_index: whether items are (image, label, index).
        seed: decides which classes belong to which split, and the fixed jitter.

    Items:
        (image, label): float32 (channels, size, size), about -1 to 1, and an int.

    Attributes:
        labels: (len,) int64 tensor.

    Raises:
        ValueError: ``split``, ``size`` or ``channels`` is none of the above.
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
