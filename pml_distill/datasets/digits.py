import numpy as np

from .class_disjoint_images import ClassDisjointImages


class Digits(ClassDisjointImages):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels; five digits train, the others test.

    Arguments, items, attributes and errors are those of ``Glyphs``, but ``size`` is 16 by default.
    """

    default_size = 16

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images and their labels."""
        from sklearn.datasets import load_digits

        data = load_digits()
        return (data.images * (255 / 16)).astype("uint8"), data.target
