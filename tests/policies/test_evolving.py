"""The evolving memory under the policies' seam is today's engine, bit for bit."""

import pytest
import torch
from echo_infinity.generator import Generator
from echo_infinity.noise import counter_noise
from echo_infinity.policies import POLICIES, make_sampler
from echo_infinity.sampler import BlockSampler
from numerics import assert_same_bits
from seen import WINDOWS, encode, make_checkpoint


@pytest.mark.parametrize("name", ["evolving", None])
def test_is_the_engine_bit_for_bit(name):
    checkpoint = make_checkpoint(dtype=torch.float32)
    plain = BlockSampler(
        Generator(checkpoint.config, checkpoint.model, checkpoint.memory), encode(checkpoint, 2), counter_noise(0), 2
    )
    stream = make_sampler(checkpoint, name, encode(checkpoint, 2), counter_noise(0), 2)
    for block in range(12):
        if block == 8:
            plain.switch(encode(checkpoint, 2), memory_recache=True)
            stream.switch(encode(checkpoint, 2), memory_recache=True)
        assert_same_bits(stream.next_block(), plain.next_block())
    assert_same_bits(stream.tensors(), plain.tensors())


def test_changes_no_configuration_and_needs_a_memory():
    config = make_checkpoint(WINDOWS["two blocks of sink"]).config
    assert POLICIES["evolving"].configure(config) is config
    with pytest.raises(ValueError, match="policy 'evolving' needs a model with a memory"):
        POLICIES["evolving"].configure(make_checkpoint(memory=False).config)
