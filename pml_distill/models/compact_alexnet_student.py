from .compact_resnet import CompactResNet


class CompactAlexNetStudent(CompactResNet):
    """The student of an AlexNet: ``CompactResNet`` with 256 channels in the last stage.

    Its 4096 features at 224 pixels (256 at 32 and 64) are regressed on the AlexNet's 4096-wide fc7 features; the
    authors' code pairs them with the 9216-wide convolutional features, which cannot run.

    At 224 pixels: 4.798 M parameters, a twelfth of the AlexNet's 57 M, but 1.111 G multiply-adds, *more* than its
    0.71 G (0.66 G in the convolutions): this student saves memory, not time.

    Source, arguments and shapes: as ``CompactResNet``; version 2 of the paper.

    Example:
        >>> CompactAlexNetStudent().output_size
        4096
    """

    last_width = 256
