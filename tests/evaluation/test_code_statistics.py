import numpy as np
import pytest
import torch

from pml_distill.evaluation import code_statistics


def test_equals_numpys_correlations():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(500, 12, generator=generator) + torch.linspace(-1, 1, 12)
    outputs[:, 1] = outputs[:, 0] + 0.5 * outputs[:, 1]
    found = code_statistics(outputs)
    signs = np.where(outputs.numpy() > 0, 1.0, -1.0)
    correlations = np.corrcoef(signs.T)
    assert found.imbalance == pytest.approx(np.abs(signs.mean(axis=0)).mean(), rel=1e-5)
    np.testing.assert_allclose(found.correlations, correlations, atol=1e-4)
    assert found.dependence == pytest.approx(np.abs(correlations[~np.eye(12, dtype=bool)]).mean(), rel=1e-3)


def test_equal_and_constant_bits():
    bit = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    assert code_statistics(bit.repeat(1, 8)).dependence == pytest.approx(1, abs=1e-5)
    constant = code_statistics(torch.ones(200, 8))
    assert (constant.imbalance, constant.dependence) == (1, 0)
    with pytest.raises(ValueError, match=r"at least two rows, but has shape \(1, 8\)"):
        code_statistics(torch.ones(1, 8))
    with pytest.raises(ValueError, match="codes must be outputs or codes of -1 and 1, but is uint8"):
        code_statistics(torch.ones(4, 8, dtype=torch.uint8))
