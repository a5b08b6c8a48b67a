"""The whole job in one call: a large network and a folder of images in, a small network to deploy out."""
