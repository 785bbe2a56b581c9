"""torchao's own test cases for tensor subclasses, unmodified, on ``MixedPrecisionTensor``."""

from __future__ import annotations

import unittest

import pytest
import torch
import torchao.testing.utils as suites  # as a module: pytest would collect imported test classes too
from torch import Tensor

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor


class BasicSuite(suites.TorchAOBasicTestCase):
    """The suite, without the test that calls ``.cuda()`` whatever COMMON_DEVICES says, where there is none."""

    __test__ = False
    TENSOR_SUBCLASS = MixedPrecisionTensor
    test_device1_to_device2_device1_cpu_device2_cpu = unittest.skipUnless(
        torch.cuda.is_available(), "torchao's test calls .cuda()"
    )(suites.TorchAOBasicTestCase.test_device1_to_device2_device1_cpu_device2_cpu)


class TestBasicAtEightBits(BasicSuite):
    """torchao's bound of 40 dB between a linear layer and its quantized form takes 8 bits in all rows.

    absmax of 32 normal numbers is about 2.2 sigma: 12 * (127 / 2.2)**2 is 46 dB for each of the two operands, 43 dB
    for both. In groups of 128 it would be 41 dB, and the suite measures bfloat16 in steps of 0.25 dB.
    """

    __test__ = True
    FACTORY_FN = MixedPrecisionTensor.from_hp
    kwargs = {"row_bits": 8, "group_size": 32}


class TestCompileAtEightBits(suites.TorchAOCompileTestCase):
    """Default bounds: 40 dB for the layer, 50 dB between the weight quantized in eager mode and in a graph."""

    TENSOR_SUBCLASS = MixedPrecisionTensor
    FACTORY_FN = MixedPrecisionTensor.from_hp
    kwargs = {"row_bits": 8, "group_size": 32}


def mixed_from_hp(weight: Tensor) -> MixedPrecisionTensor:
    """Rows of 3, 4, 5 and 6 bits."""
    return MixedPrecisionTensor.from_hp(weight, row_bits(len(weight), (3, 4, 5, 6)))


class TestBasicMixed(BasicSuite):
    """Rows of several widths; the row with the fewest bits decides.

    A row of b bits and range r has an error of variance (r / (2**b - 1))**2 / 12. The range of 128 normal numbers
    is about 5.4 sigma: 3 bits give 12 * (7 / 5.4)**2 = 13 dB, and the mean error of rows of 3, 4, 5 and 6 bits is
    a third of that, 18 dB. The bound leaves 5 dB for the chance of four rows.
    """

    __test__ = True
    FACTORY_FN = staticmethod(mixed_from_hp)
    kwargs = {}
    LINEAR_MIN_SQNR = 13


@pytest.mark.slow
class TestCompileMixed(suites.TorchAOCompileTestCase):
    """As above; a weight of mixed widths is packed outside of the graph."""

    TENSOR_SUBCLASS = MixedPrecisionTensor
    FACTORY_FN = staticmethod(mixed_from_hp)
    kwargs = {}
    LINEAR_MIN_SQNR = 13


def test_chunks_of_rows_join_again_as_vllm_does() -> None:
    weight = mixed_from_hp(torch.randn(32, 256))
    suites.TorchAOIntegrationTestCase()._test_chunk_similar_to_vllm_llama4(weight, 0)
