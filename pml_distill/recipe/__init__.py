"""The whole job in one call: a large network and a folder of images in, a small network to deploy out."""

from .images import find_images
from .networks import find_network, load_student
from .run import Run, distill, embed, test
from .settings import Settings

__all__ = ["Run", "Settings", "distill", "embed", "find_images", "find_network", "load_student", "test"]
